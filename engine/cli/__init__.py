"""The command line: `engine COMMAND`, one module a command, with its flags and what it does."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence

from ..errors import EngineError
from ..text import printable
from ..training.signals import end_tidily
from . import (
    bench,
    compare,
    data,
    doctor,
    evaluate,
    export,
    kernels,
    plan,
    profile,
    report,
    streams,
    train,
)
from .shared import Parser, exit_status

# Heavy modules are imported inside the commands, so that `engine --help` answers at once and the
# OpenMP runtime, which torch loads, still reads this variable. By default its idle threads spin.
# Where another process wants the core, every parallel region then waits for a time slice, and a
# step takes ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# In the order of `engine --help`.
_COMMANDS = (
    train,
    evaluate,
    export,
    report,
    compare,
    data,
    kernels,
    plan,
    profile,
    bench,
    doctor,
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; exit 0, 2 on a user's mistake, 130 on Ctrl-C, 143 on SIGTERM."""
    end_tidily()
    streams.install()
    status = run(sys.argv[1:] if argv is None else list(argv))
    try:
        sys.stdout.flush()
    except EngineError as error:
        status = _refuse(error)
    sys.exit(status)


def run(argv: list[str]) -> int:
    """Run one command and return its exit status."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines("engine: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    try:
        parser = build_parser()
        arguments, rest = parser.parse_known_args(argv)
        command: Callable[..., int] = arguments.run
        if rest and not arguments.overridable:
            raise EngineError(f"unknown argument {rest[0]} (see engine {arguments.command} --help)")
        if modules := getattr(arguments, "imports", None):
            from .. import plugins

            plugins.load(modules)
        return command(arguments, rest) if arguments.overridable else command(arguments)
    except EngineError as error:
        return _refuse(error)
    except OSError as error:
        # A folder that may not be searched, a name that is too long: every look at the path fails.
        if error.filename is None:
            raise
        return _refuse(EngineError(f"cannot use {error.filename}: {error.strerror}"))
    except KeyboardInterrupt as stopped:
        print("engine: interrupted; what was saved before is whole", file=sys.stderr)
        return exit_status(stopped)


def _refuse(error: EngineError) -> int:
    """Print the line of a mistake; return its exit status."""
    rank = os.environ.get("RANK", "0")
    process = "" if rank == "0" else f"(process {rank}) "
    print(f"engine: {process}{printable(str(error))}", file=sys.stderr)
    return 2


class _Lines(logging.Formatter):
    """Format warnings with control characters as escapes."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), "\n\t")


def build_parser() -> Parser:
    parser = Parser(prog="engine", description="Fast adversarial training on a local ball.")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=Parser
    )
    for command in _COMMANDS:
        command.add(commands)
    return parser
