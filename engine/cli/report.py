"""`engine report`: a run's page again."""

from __future__ import annotations

import argparse
from pathlib import Path

from .shared import Commands, add_command


def add(commands: Commands) -> None:
    parser = add_command(commands, "report", _report, "rebuild a run's report.html")
    parser.add_argument("run_dir", type=Path, metavar="RUN")


def _report(arguments: argparse.Namespace) -> int:
    from .. import report
    from ..runs import Run

    print(report.build(Run.open(arguments.run_dir)))
    return 0
