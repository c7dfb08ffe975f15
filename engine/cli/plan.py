"""`engine plan`: a step's cost on a GPU, on paper."""

from __future__ import annotations

import argparse
import json

from .shared import Commands, add_command, parse_overrides


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "plan",
        _plan,
        "what a recipe's step should cost on a GPU, on paper",
        overridable=True,
    )
    parser.add_argument("recipe")
    parser.add_argument("--gpu", default="h100", help="a100, h100 or h200")
    parser.add_argument("--json", action="store_true")


def _plan(arguments: argparse.Namespace, rest: list[str]) -> int:
    from dataclasses import asdict

    from .. import recipes
    from ..performance import plan
    from ..progress import stdout

    found = plan.plan(recipes.load(arguments.recipe, parse_overrides(rest)), arguments.gpu)
    if arguments.json:
        print(json.dumps(asdict(found)))
        return 0
    passes = ", ".join(
        f"{count:g} {kind.replace('_', ' ')}" for kind, count in found.passes.items()
    )
    bound = ", ".join(f"{name} {share:.0%}" for name, share in found.bound_by.items())
    memory = ", ".join(f"{name} {size:.3g}" for name, size in found.memory_gb.items())
    lines = {
        "recipe": f"{found.recipe}, batch {found.batch}, {found.precision}, on {found.gpu}",
        "passes": passes,
        "FLOPs a step": f"{found.flops / 1e9:.4g} G",
        "bytes a step": f"{found.bytes / 1e9:.4g} GB",
        "launches": f"{found.launches} eager, 1 captured",
        "step": f"{found.step_ms:.3g} ms captured, {found.eager_ms:.3g} ms eager (predicted)",
        "bound by": bound,
        "images": f"{found.images_per_second:,.0f} a second",
        "training": f"{found.train_minutes:.3g} minutes, evaluation excluded",
        "memory": f"GB: {memory}",
        "PGD-10": f"{found.pgd10_ms:.3g} ms a step: this takes {found.share_of_pgd10:.0%} of it",
        "measured": "no GPU here" if found.measured_ms is None else f"{found.measured_ms:.3g} ms",
        "assumed": "; ".join(found.assumptions),
    }
    for name, text in lines.items():
        stdout.print(f"{name:14} {text}", highlight=False, soft_wrap=True)
    return 0
