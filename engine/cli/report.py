"""`engine report`: rebuild a run's page."""

from __future__ import annotations

import argparse

from ..text import printable
from .shared import Commands, add_command, add_import, path_of


def add(commands: Commands) -> None:
    parser = add_command(commands, "report", _report, "rebuild a run's report.html")
    parser.add_argument("run_dir", type=path_of, metavar="RUN", help="folder of the run")
    add_import(parser)


def _report(arguments: argparse.Namespace) -> int:
    from ..report import page
    from ..runs.folder import Run

    print(printable(str(page.build(Run.open(arguments.run_dir)))))
    return 0
