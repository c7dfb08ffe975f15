"""Summarise a comparison's runs: means, spreads, the Pareto front, the time to a target."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_SCORES = ("autoattack", "pgd", "clean", "val_pgd", "val_clean")


def summarise(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each method and budget, in the points' order.

    A row holds means, standard deviations and errors of the mean over seeds.
    """
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for point in points:
        groups.setdefault((point["method"], point["epochs"]), []).append(point)
    rows = []
    for (method, epochs), group in groups.items():
        first = group[0]
        row: dict[str, Any] = {
            "method": method,
            **{
                key: first[key]
                for key in ("dataset", "network", "norm", "eps", "objective", "k", "start")
            },
            "epochs": epochs,
            "seeds": len(group),
            "examples": first["examples"],
            "autoattack_version": first["autoattack_version"],
        }
        for score in _SCORES:
            values = [p[score] for p in group if p.get(score) is not None]
            spread = statistics.stdev(values) if len(values) > 1 else None
            row[f"{score}_mean"] = statistics.fmean(values) if values else None
            row[f"{score}_sd"] = spread
            row[f"{score}_se"] = None if spread is None else spread / math.sqrt(len(values))
        memories = [p["peak_memory_mb"] for p in group if p.get("peak_memory_mb")]
        row |= {
            "train_seconds_mean": statistics.fmean(p["seconds"] for p in group),
            "passes_per_step": first["passes_per_step"],
            "rolled_back": sum(bool(p.get("rolled_back")) for p in group),
            "peak_memory_mb": max(memories) if memories else None,
        }
        rows.append(row)
    best = -math.inf
    on_front = set()
    for row in sorted(rows, key=lambda r: (r["train_seconds_mean"], -(robust(r) or 0))):
        if (robust(row) or 0) > best:
            best = robust(row) or 0
            on_front.add((row["method"], row["epochs"]))
    for row in rows:
        row["pareto"] = (row["method"], row["epochs"]) in on_front
    return rows


def robust(row: Mapping[str, Any], suffix: str = "_mean") -> float | None:
    """Return a row's robust accuracy by AutoAttack, else PGD, else PGD in validation."""
    score = score_of(row, suffix)
    return None if score is None else row[f"{score}{suffix}"]


def score_of(row: Mapping[str, Any], suffix: str = "_mean") -> str | None:
    """Return the name of the score that `robust` takes; None: the row has none."""
    scores = ("autoattack", "pgd", "val_pgd")
    return next((score for score in scores if row.get(f"{score}{suffix}") is not None), None)


def time_to(rows: Sequence[Mapping[str, Any]], target: float) -> dict[str, float | None]:
    """Return the training seconds until each method's mean robust accuracy reaches `target`.

    Between two budgets the accuracy is taken as linear; None: no budget reaches the target.
    """
    seconds_of: dict[str, float | None] = {}
    for method in dict.fromkeys(row["method"] for row in rows):
        curve = sorted(
            (row["train_seconds_mean"], robust(row) or 0.0)
            for row in rows
            if row["method"] == method
        )
        seconds_of[method] = None
        before: tuple[float, float] | None = None
        for seconds, accuracy in curve:
            if accuracy >= target:
                if before is not None and accuracy > before[1]:
                    share = (target - before[1]) / (accuracy - before[1])
                    seconds = before[0] + share * (seconds - before[0])
                seconds_of[method] = seconds
                break
            before = seconds, accuracy
    return seconds_of


def stored(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of all comparisons in `folder`, with the protocol's name."""
    return [
        {"protocol": kept.get("protocol", path.stem), **row}
        for path in sorted(folder.glob("compare-*.json"))
        for kept in [json.loads(path.read_text())]
        for row in kept["rows"]
    ]
