"""`engine export`: write a run's weights and model card for others."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..text import printable
from .shared import Commands, add_command, add_import


def add(commands: Commands) -> None:
    parser = add_command(
        commands, "export", _export, "write a run's weights, RobustBench's claim and a model card"
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN")
    add_import(parser)
    parser.add_argument("--out", type=Path, help="folder; default RUN/export")


def _export(arguments: argparse.Namespace) -> int:
    from ..runs.export import export
    from ..runs.folder import Run

    for path in export(Run.open(arguments.run_dir), arguments.out):
        print(printable(str(path)))
    return 0
