"""`engine compare`: methods side by side, trained here or as they are stored."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..errors import EngineError
from .shared import Commands, add_command, keep_freed_memory, parse_overrides


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
    from .. import compare

    if arguments.from_store:
        from ..benchmarks import tables

        rows = compare.stored(tables.RESULTS)
        if not rows:
            raise EngineError("engine compare: no results are stored")
    else:
        if not arguments.recipes:
            raise EngineError("engine compare: which recipes, or which protocol file?")
        if arguments.jobs < 1:
            raise EngineError(f"--jobs must be at least 1, got {arguments.jobs}")
        keep_freed_memory()
        protocol = compare.read(
            arguments.recipes,
            parse_overrides(rest),
            methods=_list("--methods", arguments.methods, str),
            seeds=arguments.seeds,
            epochs=_list("--epochs", arguments.epochs, int),
            minutes=_list("--minutes", arguments.minutes, float),
        )
        rows = compare.run(protocol, out=arguments.out, workers=arguments.jobs)["rows"]
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        compare.show(rows, arguments.target)
    return 0


def _list(flag: str, text: str | None, kind: type) -> list[Any]:
    try:
        return [kind(word) for word in (text or "").split(",") if word]
    except ValueError:
        raise EngineError(f"{flag} {text}: numbers with commas between them, please") from None
