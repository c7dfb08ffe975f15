"""`engine eval`: a finished run's checkpoint again, or whether its gradient is masked."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..errors import EngineError
from .shared import Commands, add_command, parse_overrides, print_row, print_rows


def add(commands: Commands) -> None:
    parser = add_command(
        commands, "eval", _eval, "evaluate a run's checkpoint again", overridable=True
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best")
    parser.add_argument(
        "--masking", action="store_true", help="look for masked gradients instead of evaluating"
    )
    parser.add_argument(
        "--transfer",
        type=Path,
        metavar="RUN",
        help="with --masking: try that run's adversaries too",
    )
    parser.add_argument("--json", action="store_true")


def _eval(arguments: argparse.Namespace, rest: list[str]) -> int:
    from .. import recipes
    from ..device.machine import keep_freed_memory
    from ..report import page
    from ..runs import evaluate
    from ..runs.folder import Run

    overrides = parse_overrides(rest)
    if stray := [
        key for key in overrides if not key.startswith("evaluation.") and key != "threads"
    ]:
        raise EngineError(f"--{stray[0]}: only --evaluation.* can be changed for a finished run")
    keep_freed_memory()
    Run.open(arguments.run_dir)
    recipe = recipes.load(str(arguments.run_dir / "recipe.toml"), overrides)
    run = Run(arguments.run_dir, recipe)
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
    found = evaluate.evaluate_run(run, arguments.checkpoint)
    page.build(run)
    row = {
        "recipe": recipe.name,
        "clean": found.clean,
        "pgd": found.pgd,
        "autoattack": found.autoattack,
        "worst_case": found.worst_case,
        "examples": found.examples,
        "eval_seconds": round(found.seconds, 2),
        "run_dir": str(run.path),
    }
    print_row(row, arguments.json)
    return 0
