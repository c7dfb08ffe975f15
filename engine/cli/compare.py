"""`engine compare`: methods side by side, trained here or as they are stored."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import EngineError
from .shared import Commands, add_command, parse_overrides


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "compare",
        _compare,
        "train methods side by side: accuracy over training time",
        overridable=True,
    )
    parser.add_argument(
        "recipes", nargs="*", metavar="RECIPE", help="recipes, or one protocol file with methods"
    )
    parser.add_argument("--methods", help="train these of the protocol's alone: pgd-10,memory-1")
    parser.add_argument("--seeds", type=int, help="seeds 0..N-1 of every method [count]")
    parser.add_argument("--epochs", help="budgets: 5,15,45 [passes over the training set]")
    parser.add_argument("--minutes", help="budgets: 1,2.5 [training minutes]")
    parser.add_argument("--target", type=float, help="robust accuracy to give the time to [0..1]")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time [count]")
    parser.add_argument("--out", type=Path, help="folder for the runs; finished ones are kept")
    parser.add_argument(
        "--from-store", action="store_true", help="show the results that come with the engine"
    )
    parser.add_argument("--json", action="store_true")


def _compare(arguments: argparse.Namespace, rest: list[str]) -> int:
    from .. import results
    from ..compare import protocol, scores, session
    from ..device.machine import keep_freed_memory

    if arguments.from_store:
        rows = scores.stored(results.FOLDER)
        if not rows:
            raise EngineError("engine compare: no results are stored")
    else:
        if not arguments.recipes:
            raise EngineError("engine compare: which recipes, or which protocol file?")
        if arguments.jobs < 1:
            raise EngineError(f"--jobs must be at least 1, got {arguments.jobs}")
        keep_freed_memory()
        chosen = protocol.read(
            arguments.recipes,
            parse_overrides(rest),
            methods=_list("--methods", arguments.methods, str),
            seeds=arguments.seeds,
            epochs=_list("--epochs", arguments.epochs, int),
            minutes=_list("--minutes", arguments.minutes, float),
        )
        rows = session.run(chosen, out=arguments.out, workers=arguments.jobs)["rows"]
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        _show(rows, arguments.target)
    return 0


def _list(flag: str, text: str | None, kind: type) -> list[Any]:
    try:
        return [kind(word) for word in (text or "").split(",") if word]
    except ValueError:
        raise EngineError(f"{flag} {text}: numbers with commas between them, please") from None


def _show(rows: Sequence[Mapping[str, Any]], target: float | None = None) -> None:
    """The rows as a table on stdout."""
    from rich.table import Table

    from ..compare.scores import robust, time_to
    from ..progress import stdout
    from ..text import percent

    reached = {} if target is None else time_to(rows, target)
    table = Table(
        "method", "k", "passes", "epochs", "seeds", "clean %", "robust %", "train s", "front"
    )
    if target is not None:
        table.add_column(f"s to {target:.1%}")
    for row in rows:
        clean = row["val_clean_mean"] if row["clean_mean"] is None else row["clean_mean"]
        cells = [
            row["method"],
            str(row["k"]),
            str(row["passes_per_step"]),
            str(row["epochs"]),
            str(row["seeds"]),
            percent(clean),
            percent(robust(row), robust(row, "_sd")),
            f"{row['train_seconds_mean']:.1f}",
            "*" if row["pareto"] else "",
        ]
        if target is not None:
            seconds = reached[row["method"]]
            cells.append("-" if seconds is None else f"{seconds:.1f}")
        table.add_row(*cells)
    stdout.print(table)
