"""A command's rows as a stored result, beside the source: what the tables in the docs are made from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine import files
from engine.device.machine import environment
from engine.errors import EngineError

from .tables import RESULTS


def place(what: str) -> Path:
    """Where the result named `what` is kept.

    Raises:
        EngineError: outside a source checkout: an installed engine's results are those it came with.
    """
    root = RESULTS.parents[1]
    if not (root / ".git").exists():
        raise EngineError(
            f"--store writes into a source checkout, and {root} is none: keep the rows with --json > FILE"
        )
    return RESULTS / f"{what}.json"


def write(what: str, words: Sequence[str], rows: list[dict[str, Any]]) -> Path:
    """Keep the rows with the machine that gave them and the command to get them again.

    Args:
        words: the command behind `engine`, `--store` left out.
    """
    command = " ".join(["engine", *words, "--store"])
    path = place(what)
    # As people type it: what started this process may be a path on this machine.
    stamp = {**environment(), "command": command}
    files.write_json(path, {"environment": stamp, "command": command, "rows": rows})
    return path
