"""The command line: `engine COMMAND`, one module a command, with its flags and what it does."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence

from ..errors import EngineError
from ..training.signals import terminate
from . import bench, compare, data, doctor, evaluate, export, kernels, plan, profile, report, train
from .shared import Parser, exit_status

# Heavy modules are imported inside the commands: `engine --help` answers at once, and the OpenMP
# runtime that torch loads still listens. By default its idle threads spin, and where another process
# wants the core, every parallel region then waits for a time slice: steps ten times slower.
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
    """Entry point; exits 0, 2 on a user's mistake, 130 on Ctrl-C, 143 on SIGTERM."""
    signal.signal(signal.SIGTERM, terminate)
    sys.exit(run(sys.argv[1:] if argv is None else list(argv)))


def run(argv: list[str]) -> int:
    """One command, as `main` runs it; its exit status."""
    logging.basicConfig(format="engine: %(message)s", level=logging.WARNING)
    try:
        parser = build_parser()
        arguments, rest = parser.parse_known_args(argv)
        command: Callable[..., int] = arguments.run
        if rest and not arguments.overridable:
            raise EngineError(f"unknown argument {rest[0]} (see engine {arguments.command} --help)")
        return command(arguments, rest) if arguments.overridable else command(arguments)
    except EngineError as error:
        rank = os.environ.get("RANK", "0")
        print(
            f"engine: {error}" if rank == "0" else f"engine: (process {rank}) {error}",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt as stopped:
        print("engine: interrupted; what was saved before is whole", file=sys.stderr)
        return exit_status(stopped)
    except BrokenPipeError:
        # The reader of our output has gone; there is nobody left to tell.
        sys.stderr.close()
        return 0


def build_parser() -> Parser:
    parser = Parser(prog="engine", description="Fast adversarial training on a local ball.")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=Parser
    )
    for command in _COMMANDS:
        command.add(commands)
    return parser
