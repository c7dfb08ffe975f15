"""`engine bench`: measurements on this machine, alone or against a reference."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import EngineError
from .shared import Commands, add_command, add_output, print_rows, store_rows

# The modules of engine.benchmarks by the name on the command line; `run(quick=...)` returns rows.
BENCHMARKS = {
    "ops": "ops",
    "step": "step",
    "loaders": "loaders",
    "scaling": "scaling",
    "end-to-end": "end_to_end",
    "accuracy": "accuracy",
    "evaluation": "evaluation",
}


def add(commands: Commands) -> None:
    parser = add_command(commands, "bench", _bench, "measure on this machine")
    parser.add_argument("what", choices=BENCHMARKS, help="the benchmark to run")
    parser.add_argument(
        "--against", metavar="REF", help="a commit, or a file of results, to compare with"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="with --against COMMIT: measure both so often; default %(default)s [count]",
    )
    parser.add_argument(
        "--quick", action="store_true", help="under a minute; step, accuracy, evaluation: under two"
    )
    parser.add_argument(
        "--clone",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="step: also time the authors' code, from your clone of fast_adversarial or trades; "
        "this executes the code in it; may be repeated",
    )
    add_output(parser)


def _bench(arguments: argparse.Namespace) -> int:
    from importlib import import_module

    from .. import results
    from ..device.machine import keep_freed_memory

    if arguments.clone and (arguments.what != "step" or arguments.against is not None):
        raise EngineError("--clone goes with `engine bench step`, without --against")
    if arguments.store and arguments.against is not None:
        raise EngineError("--store keeps a measurement, and --against makes a comparison: drop one")
    if arguments.against is not None:
        from ..benchmarks import against

        rows = against.run(
            arguments.what, arguments.against, quick=arguments.quick, rounds=arguments.rounds
        )
        print_rows(rows, arguments.json)
        return 0
    if arguments.store:
        # A wrong place shows before anything is measured.
        results.place(arguments.what)
    options: dict[str, Any] = {}
    if arguments.what == "step":
        from ..benchmarks import clones

        options["cloned"] = clones.parse(arguments.clone)
    if arguments.what in ("step", "loaders", "scaling", "end-to-end", "accuracy", "evaluation"):
        # `engine train` and `engine eval` do so as well.
        keep_freed_memory()
    module = import_module(f"engine.benchmarks.{BENCHMARKS[arguments.what]}")
    rows = module.run(quick=arguments.quick, **options)
    print_rows(rows, arguments.json)
    if arguments.store:
        words = ["bench", arguments.what, *["--quick"] * arguments.quick]
        # The path of a clone is left out of a stored result.
        words += [f"--clone {name}=PATH" for name in options.get("cloned", ())]
        store_rows(arguments.what, words, rows)
    return 0
