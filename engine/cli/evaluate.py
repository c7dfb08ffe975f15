"""`engine eval`: evaluate a run's checkpoint, or check it for masked gradients."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..errors import EngineError
from . import result
from .shared import Commands, add_command, add_import, parse_overrides, print_rows


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "eval",
        _eval,
        "evaluate a run's checkpoint under attack, or check it for masked gradients",
        overridable=True,
        fields="--evaluation.FIELD VALUE sets how the run is evaluated: examples, pgd_steps, "
        "pgd_restarts, autoattack (standard, apgd, none), batch_size; so does --threads. "
        "`engine train --help evaluation` lists their meanings.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument(
        "--checkpoint",
        choices=("best", "last"),
        default="best",
        help="weights: of the best epoch, or of the last",
    )
    parser.add_argument(
        "--masking", action="store_true", help="look for masked gradients instead of evaluating"
    )
    parser.add_argument(
        "--transfer",
        type=Path,
        metavar="RUN",
        help="with --masking: also try adversaries of that run's network",
    )
    add_import(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def _eval(arguments: argparse.Namespace, rest: list[str]) -> int:
    from .. import recipes
    from ..device.machine import keep_freed_memory
    from ..progress import stderr
    from ..report import page
    from ..runs import build, evaluate
    from ..runs.folder import Run

    overrides = parse_overrides(rest)
    for key in overrides:
        if not key.startswith("evaluation.") and key != "threads":
            raise EngineError(f"--{key}: only --evaluation.* can be changed for a finished run")
    keep_freed_memory()
    Run.open(arguments.run_dir)
    recipe = recipes.load(str(arguments.run_dir / "recipe.toml"), overrides)
    run = Run(arguments.run_dir, recipe)
    for note in build.evaluation_notes(recipe):
        stderr.print(f"engine: {note}", highlight=False, soft_wrap=True)
    if arguments.transfer and not arguments.masking:
        raise EngineError("--transfer belongs to --masking")
    if arguments.masking:
        surrogate = Run.open(arguments.transfer) if arguments.transfer else None
        masking = evaluate.check_masking(run, arguments.checkpoint, surrogate)
        page.build(run)
        if arguments.json:
            print(json.dumps(masking))
        else:
            print_rows(masking["checks"], as_json=False)
        return 0 if masking["passed"] else 1
    report = evaluate.evaluate_run(run, arguments.checkpoint)
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
