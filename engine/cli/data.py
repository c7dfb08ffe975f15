"""`engine data`: list, fetch, verify, describe or label datasets."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from ..errors import EngineError
from ..text import printable
from .shared import Commands, add_command, path_of


def add(commands: Commands) -> None:
    parser = add_command(commands, "data", _data, "list, fetch, verify, describe or label datasets")
    parser.add_argument(
        "action",
        choices=("list", "fetch", "verify", "info", "label"),
        help="list: all datasets; fetch: download; verify: check the files; info: shape, counts "
        "and classes; label: pictures without labels, by a run's network",
    )
    parser.add_argument("name", nargs="?", help="a dataset by name, or the path of your own")
    parser.add_argument("--run", type=path_of, dest="run_dir", help="label: the run that labels")
    parser.add_argument("--out", type=path_of, help="label: the .npz to write, for data.extra")


def _data(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from .. import data

    if arguments.action == "list":
        return _list()
    if arguments.name is None:
        known = ", ".join(data.names())
        raise EngineError(f"engine data {arguments.action}: which dataset? {known}")
    if arguments.action == "label":
        return _label(arguments)
    if arguments.action == "fetch":
        print(printable(str(data.fetch(arguments.name))))
        return 0
    if arguments.action == "info":
        about = data.info(arguments.name)
        print(json.dumps(asdict(about), indent=2, default=str))
        if about.shape is None:
            print(
                "engine: the pictures have several sizes: --data.size 224 streams them",
                file=sys.stderr,
            )
        return 0
    checks = data.verify(arguments.name)
    for check in checks:
        print(printable(f"{'ok ' if check.ok else 'BAD'} {check.file}: {check.detail}"))
    return 0 if all(check.ok for check in checks) else 2


def _list() -> int:
    from .. import data

    head = ("dataset", "images", "training", "test", "classes", "lies in")
    rows: list[tuple[str, ...]] = [head]
    for name in data.names():
        about = data.info(name, read=False)
        shape = "x".join(map(str, about.shape)) if about.shape else "any size"
        counts = map(str, (about.train, about.test, len(about.classes)))
        rows.append((name, shape, *counts, _place(about)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    # The path comes last and is never folded: a terminal wraps it so that it can still be copied.
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(printable("  ".join(cells).rstrip()))
    return 0


def _label(arguments: argparse.Namespace) -> int:
    from ..runs.folder import Run
    from ..runs.label import label

    if arguments.run_dir is None or arguments.out is None:
        raise EngineError("engine data label SET needs --run RUN and --out FILE")
    count, classes = label(Run.open(arguments.run_dir), arguments.name, arguments.out)
    print(printable(f"{arguments.out}: {count} images; by class: {', '.join(map(str, classes))}"))
    return 0


def _place(about: Any) -> str:
    """Return where a data set lies, in a few words."""
    if about.folder is not None:
        return str(about.folder)
    return "scikit-learn" if about.name == "digits" else "not fetched"
