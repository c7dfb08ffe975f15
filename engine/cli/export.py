"""`engine export`: write a run's network for other tools and other people."""

from __future__ import annotations

import argparse

from ..text import printable
from .shared import Commands, add_command, add_import, path_of

# Those of `runs.export`, which imports torch; a test compares them.
FORMATS = ("robustbench", "hub", "onnx", "torchscript", "pt2")


def add(commands: Commands) -> None:
    parser = add_command(
        commands, "export", _export, "write a run's network for other tools: weights, ONNX, a card"
    )
    parser.add_argument("run_dir", type=path_of, metavar="RUN", help="folder of the run")
    add_import(parser)
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="robustbench",
        help="robustbench (the default): weights, RobustBench's claim and a model card; hub: a "
        "folder for a hub of models; onnx, torchscript, pt2: one file with the graph",
    )
    parser.add_argument(
        "--out", type=path_of, help="folder; default RUN/export, hub: RUN/export/hub"
    )


def _export(arguments: argparse.Namespace) -> int:
    from ..runs.export import export
    from ..runs.folder import Run

    for path in export(Run.open(arguments.run_dir), arguments.out, arguments.format):
        print(printable(str(path)))
    return 0
