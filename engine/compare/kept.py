"""Read the files of earlier sittings of a comparison, compare.json and steps.json, with checks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import files
from ..errors import EngineError
from ..runs.found import Check, is_count, is_number, is_share, is_text
from ..text import shown


def _timing(value: object) -> bool:
    return isinstance(value, dict) and all(
        is_number(value.get(name)) and value[name] > 0 for name in ("p20_ms", "p50_ms", "p80_ms")
    )


_POINT: dict[str, Check] = {
    **dict.fromkeys(("method", "dataset", "network", "norm", "objective", "start"), is_text),
    **dict.fromkeys(("k", "epochs", "seed", "steps"), is_count),
    **dict.fromkeys(("eps", "passes_per_step"), is_number),
    **dict.fromkeys(("clean", "pgd", "autoattack", "val_clean", "val_pgd"), is_share),
    **dict.fromkeys(("examples", "peak_memory_mb"), lambda v: v is None or is_count(v)),
}


def comparison(path: Path) -> dict[str, Any]:
    """Return compare.json: `recipes` (TOML by method), `score`, `points`; each point checked.

    Raises:
        EngineError: where the file is damaged.
    """
    kept = _read(path)
    recipes, points = kept.get("recipes", {}), kept.get("points")
    if not (isinstance(recipes, dict) and all(map(is_text, recipes.values()))):
        raise _damaged(path, "its recipes are not texts by method")
    if not isinstance(points, list):
        raise _damaged(path, "it has no list of points")
    for number, point in enumerate(points):
        if not isinstance(point, dict):
            raise _damaged(path, f"point {number} has no fields")
        for name, fits in _POINT.items():
            if not fits(point.get(name)):
                raise _damaged(path, f"{name} of point {number} is {shown(point.get(name))}")
    return {"recipes": recipes, "points": points, "score": kept.get("score")}


def step_times(path: Path, wanted: Mapping[str, str]) -> dict[str, dict[str, float]] | None:
    """Return the timings in steps.json; None where they are of other recipes than `wanted`.

    Raises:
        EngineError: where the file is damaged.
    """
    kept = _read(path)
    if kept.get("recipes") != wanted:
        return None
    steps = kept.get("steps")
    if not (isinstance(steps, dict) and all(_timing(steps.get(name)) for name in wanted)):
        raise _damaged(path, "a method has no timing")
    return steps


def _read(path: Path) -> dict[str, Any]:
    try:
        kept = json.loads(files.read_text(path))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from None
    if not isinstance(kept, dict):
        raise _damaged(path, "it has no fields")
    return kept


def _damaged(path: Path, reason: str) -> EngineError:
    return EngineError(f"{path} is damaged ({reason}): move it away")
