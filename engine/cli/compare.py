"""`engine compare`: train methods side by side, or show the stored comparisons."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import EngineError
from ..text import printable
from .shared import Commands, add_command, add_import, parse_overrides, path_of

Row = Mapping[str, Any]


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "compare",
        _compare,
        "train methods side by side: accuracy over training time",
        overridable=True,
        fields="Every field of a recipe can be set for all methods: --data.train_examples 1000, "
        "--evaluation.examples 500, --evaluation.autoattack none, ... `engine train --help` lists "
        "the fields; `engine train --help SECTION` lists one section.",
    )
    parser.add_argument(
        "recipes", nargs="*", metavar="RECIPE", help="recipes, or one protocol file with methods"
    )
    parser.add_argument(
        "--methods", help="train only these of the protocol's: pgd-10,memory-1; default all"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        help="seeds 0..N-1 of every method; default: the protocol's, or 3 [count]",
    )
    parser.add_argument(
        "--epochs",
        help="budgets: 5,15,45; default: the protocol's, or the recipe's epochs [passes over the "
        "training set]",
    )
    parser.add_argument("--minutes", help="budgets: 1,2.5 [training minutes]")
    parser.add_argument(
        "--target",
        type=float,
        help="also show the training time to this robust accuracy, above 0 and at most 1",
    )
    parser.add_argument("--jobs", type=int, help="runs at a time; default 1 [count]")
    parser.add_argument(
        "--out",
        type=path_of,
        help="folder of the runs; finished runs in it are kept; default runs/NAME-DATE-TIME",
    )
    parser.add_argument(
        "--from-store",
        action="store_true",
        help="show the results that come with the engine; RECIPE: those of this recipe, method or "
        "comparison",
    )
    add_import(parser)
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")


def _compare(arguments: argparse.Namespace, rest: list[str]) -> int:
    if arguments.target is not None and not 0 < arguments.target <= 1:
        raise EngineError(
            f"--target must be above 0 and at most 1, got {arguments.target:g}: 50 % is 0.5"
        )
    if arguments.from_store:
        if unused := [*_given(arguments), *rest]:
            raise EngineError(
                f"{unused[0]}: stored results cannot be changed: drop it or --from-store"
            )
        rows, picture = _stored(arguments.recipes), None
    else:
        rows, picture = _trained(arguments, parse_overrides(rest))
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    for line in _lines(rows, arguments.target):
        print(printable(line))
    if picture is not None:
        print(printable(f"picture: {shlex.quote(str(picture))}"))
    return 0


def _given(arguments: argparse.Namespace) -> list[str]:
    """Return the flags of the command line that only a training obeys."""
    flags = ("methods", "seeds", "epochs", "minutes", "jobs", "out")
    return [f"--{flag}" for flag in flags if getattr(arguments, flag) is not None]


def _trained(
    arguments: argparse.Namespace, overrides: Mapping[str, str]
) -> tuple[list[dict[str, Any]], Path]:
    """Train what is missing; return the rows and the picture's path."""
    from ..compare import protocol, session
    from ..device.machine import keep_freed_memory

    if not arguments.recipes:
        raise EngineError("engine compare: which recipes, or which protocol file?")
    workers = 1 if arguments.jobs is None else arguments.jobs
    if workers < 1:
        raise EngineError(f"--jobs must be at least 1, got {workers}")
    keep_freed_memory()
    chosen = protocol.read(
        arguments.recipes,
        overrides,
        methods=_list("--methods", arguments.methods, str),
        seeds=arguments.seeds,
        epochs=_list("--epochs", arguments.epochs, int),
        minutes=_list("--minutes", arguments.minutes, float),
    )
    out = arguments.out or Path("runs") / f"{chosen.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return session.run(chosen, out=out, workers=workers)["rows"], out / "compare.png"


def _stored(names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the stored rows of the named comparisons, methods and recipes; without names all."""
    from .. import recipes, results
    from ..compare import scores

    rows = scores.stored(results.FOLDER)
    if not rows:
        raise EngineError("engine compare: no results are stored")
    if not names:
        return rows
    chosen = []
    for name in names:
        matches = [row for row in rows if name in (row["protocol"], row["method"])]
        if not matches:
            recipe = recipes.load(name)
            key = (
                recipe.data.name,
                recipe.objective.name,
                recipe.attack.steps,
                recipe.attack.start,
            )
            columns = ("dataset", "objective", "k", "start")
            matches = [row for row in rows if tuple(row[c] for c in columns) == key]
        if not matches:
            kept = ", ".join(dict.fromkeys(row["protocol"] for row in rows))
            raise EngineError(f"no stored result of {name}; stored comparisons: {kept}")
        chosen += [row for row in matches if row not in chosen]
    return chosen


def _list(flag: str, text: str | None, kind: type) -> list[Any]:
    try:
        return [kind(word) for word in (text or "").split(",") if word]
    except ValueError:
        raise EngineError(f"{flag} {text}: write numbers with commas between them") from None


def _lines(rows: Sequence[Row], target: float | None) -> list[str]:
    """The rows as tables for 80 columns, one for each comparison, ordered by budget."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.get("protocol", ""), []).append(row)
    lines = []
    for protocol, group in groups.items():
        title = f"{protocol}: " if protocol else ""
        lines += [f"{title}robust % is {_attacks(group)}", *_table(group, target), ""]
    return [
        *lines,
        "* no method is more robust in less training time; ±: spread over seeds",
    ]


def _attacks(rows: Sequence[Row]) -> str:
    """Name the attacks behind the robust accuracy of rows."""
    from ..compare.scores import score_of

    names = {
        "autoattack": "accuracy under AutoAttack",
        "pgd": "accuracy under PGD",
        "val_pgd": "accuracy under PGD on held-out images",
    }
    scores = dict.fromkeys(score_of(row) for row in rows)
    return " or ".join(names[score] for score in scores if score) or "not measured"


def _table(rows: Sequence[Row], target: float | None) -> list[str]:
    from ..compare.scores import robust, time_to
    from ..text import percent

    reached = {} if target is None else time_to(rows, target)
    table = [["method", "passes", "epochs", "seeds", "clean %", "robust %", "train s"]]
    table[0] += [] if target is None else [f"s to {target:.0%}"]
    for row in sorted(rows, key=lambda row: (row["epochs"], -(robust(row) or 0))):
        clean = row["val_clean_mean"] if row["clean_mean"] is None else row["clean_mean"]
        cells = [
            row["method"] + "*" * row["pareto"],
            str(row["passes_per_step"]),
            str(row["epochs"]),
            str(row["seeds"]),
            percent(clean),
            percent(robust(row), robust(row, "_sd")),
            f"{row['train_seconds_mean']:.1f}",
        ]
        if target is not None:
            seconds = reached[row["method"]]
            cells.append("-" if seconds is None else f"{seconds:.1f}")
        table.append(cells)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in table
    ]
