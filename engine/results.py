"""Keep the stored results: a command's rows, its machine and the command line, as JSON files.

The files lie in benchmarks/results of a source checkout, and come with an installed engine. The
tables in the docs are made from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from . import files
from .device.machine import environment
from .errors import EngineError

# A folder of data beside the benchmarks' code; their package is empty, and imports nothing.
FOLDER = Path(str(resources.files("engine.benchmarks") / "results"))


def place(name: str) -> Path:
    """Return the file of the result `name`.

    Raises:
        EngineError: outside a source checkout; an installed engine's results are read-only.
    """
    root = FOLDER.parents[1]
    if not (root / ".git").exists():
        raise EngineError(
            f"--store writes into a source checkout, and {root} is none: "
            "keep the rows with --json > FILE"
        )
    return FOLDER / f"{name}.json"


def write(name: str, words: Sequence[str], rows: list[dict[str, Any]]) -> Path:
    """Store the rows with the machine and the command; return the file's path.

    Args:
        words: the command line after `engine`, without `--store`.
    """
    command = " ".join(["engine", *words, "--store"])
    path = place(name)
    # The environment's own command may hold a path of this machine; people type this one.
    stamp = {**environment(), "command": command}
    files.write_json(path, {"environment": stamp, "command": command, "rows": rows})
    return path
