"""`engine eval`: evaluate a run's checkpoint, or check it for masked gradients."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import timedelta
from typing import TYPE_CHECKING

from ..errors import EngineError
from . import result
from .shared import (
    Commands,
    add_command,
    add_import,
    exit_status,
    parse_overrides,
    path_of,
    print_rows,
)

if TYPE_CHECKING:
    from ..device.distributed import World
    from ..runs.folder import Run

# One process may attack a large batch while another has none left.
_PATIENCE = timedelta(days=2)


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "eval",
        _eval,
        "evaluate a run's checkpoint under attack, or check it for masked gradients",
        overridable=True,
        fields="--evaluation.FIELD VALUE sets how the run is evaluated: examples, pgd_steps, "
        "pgd_restarts, autoattack (standard, apgd, none), judge (pyautoattack, engine), precision "
        "(fp32, bf16), batch_size; so does --threads. "
        "`engine train --help evaluation` lists their meanings.",
    )
    parser.add_argument("run_dir", type=path_of, metavar="RUN", help="folder of the run")
    parser.add_argument(
        "--checkpoint",
        choices=("best", "last"),
        default="best",
        help="weights: of the best epoch (the default), or of the last",
    )
    parser.add_argument(
        "--masking", action="store_true", help="look for masked gradients instead of evaluating"
    )
    parser.add_argument(
        "--transfer",
        type=path_of,
        metavar="RUN",
        help="with --masking: also try adversaries of that run's network",
    )
    add_import(parser)
    parser.add_argument(
        "--nproc",
        type=int,
        default=1,
        metavar="N",
        help="N processes share the evaluation; default %(default)s",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _eval(arguments: argparse.Namespace, rest: list[str]) -> int:
    from .. import recipes
    from ..device import distributed
    from ..device.machine import keep_freed_memory
    from ..progress import stderr
    from ..runs import build
    from ..runs.folder import Run

    overrides = parse_overrides(rest)
    for key in overrides:
        if not key.startswith("evaluation.") and key != "threads":
            raise EngineError(f"--{key}: only --evaluation.* can be changed for a finished run")
    keep_freed_memory()
    Run.open(arguments.run_dir)
    recipe = recipes.load(str(arguments.run_dir / "recipe.toml"), overrides)
    run = Run(arguments.run_dir, recipe)
    if arguments.nproc < 1:
        raise EngineError(f"--nproc must be at least 1, got {arguments.nproc}")
    if arguments.nproc > 1:
        return _launch(arguments, rest)
    world = distributed.join(_PATIENCE)
    stderr.quiet = not world.first
    for note in build.evaluation_notes(recipe):
        stderr.print(f"engine: {note}", highlight=False, soft_wrap=True)
    if arguments.transfer and not arguments.masking:
        raise EngineError("--transfer belongs to --masking")
    if arguments.masking:
        return _check_masking(run, arguments)
    return _measure(run, arguments, world)


def _launch(arguments: argparse.Namespace, rest: list[str]) -> int:
    """Run the same command in `--nproc` processes."""
    from .. import plugins
    from ..device import distributed

    if arguments.masking:
        raise EngineError("--masking runs in one process: leave out --nproc")
    words = [
        "eval",
        *plugins.words(),
        str(arguments.run_dir),
        "--checkpoint",
        arguments.checkpoint,
        *rest,
    ]
    return distributed.launch(arguments.nproc, words + ["--json"] * arguments.json)


def _check_masking(run: Run, arguments: argparse.Namespace) -> int:
    from ..report import page
    from ..runs import evaluate
    from ..runs.folder import Run

    surrogate = Run.open(arguments.transfer) if arguments.transfer else None
    masking = evaluate.check_masking(run, arguments.checkpoint, surrogate)
    page.build(run)
    if arguments.json:
        print(json.dumps(masking))
    else:
        print_rows(masking["checks"], as_json=False)
    return 0 if masking["passed"] else 1


def _measure(run: Run, arguments: argparse.Namespace, world: World) -> int:
    from ..device import distributed
    from ..report import page
    from ..runs import evaluate

    recipe = run.recipe
    try:
        report = evaluate.evaluate_run(run, arguments.checkpoint, world)
    except KeyboardInterrupt as stopped:
        if world.first:
            print(
                "engine: stopped; the same command goes on with the images that are left",
                file=sys.stderr,
            )
        return exit_status(stopped)
    distributed.leave()
    if not world.first:
        return 0
    page.build(run)
    row = {
        "recipe": recipe.name,
        **evaluate.accuracies(report),
        "worst_case": report.worst_case,
        "run_dir": str(run.path),
        "report": str(run.path / "report.html"),
    }
    result.show(row, recipe, arguments.json)
    return 0
