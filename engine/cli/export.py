"""`engine export`: a run as others want it."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import printable
from .shared import Commands, add_command


def add(commands: Commands) -> None:
    parser = add_command(
        commands, "export", _export, "weights, RobustBench's claim and a model card of a run"
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, help="folder; default RUN/export")


def _export(arguments: argparse.Namespace) -> int:
    from ..runs.export import export
    from ..runs.folder import Run

    for path in export(Run.open(arguments.run_dir), arguments.out):
        print(printable(str(path)))
    return 0
