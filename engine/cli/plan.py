"""`engine plan`: predict a step's cost on a GPU, on paper."""

from __future__ import annotations

import argparse
import json

from .shared import Commands, add_command, add_import, parse_overrides


def add(commands: Commands) -> None:
    parser = add_command(
        commands,
        "plan",
        _plan,
        "predict the cost of a recipe's step on a GPU, on paper",
        overridable=True,
    )
    parser.add_argument("recipe", help="a recipe by name, or a .toml file")
    parser.add_argument("--gpu", default="h100", help="a100, h100 or h200; default %(default)s")
    add_import(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


# Kernels that the report names; the others are added up.
_NAMED = 10


def _most(kernels: dict[str, int]) -> str:
    named = [f"{count} {name}" for name, count in list(kernels.items())[:_NAMED]]
    rest = sum(list(kernels.values())[_NAMED:])
    return ", ".join([*named, f"{rest} others"] if rest else named)


def _plan(arguments: argparse.Namespace, rest: list[str]) -> int:
    from dataclasses import asdict

    from .. import recipes
    from ..performance import plan
    from ..progress import stdout

    cost = plan.plan(recipes.load(arguments.recipe, parse_overrides(rest)), arguments.gpu)
    if arguments.json:
        print(json.dumps(asdict(cost)))
        return 0
    passes = ", ".join(f"{count:g} {kind.replace('_', ' ')}" for kind, count in cost.passes.items())
    bound = ", ".join(f"{name} {share:.0%}" for name, share in cost.bound_by.items())
    saved = ", ".join(f"{name} {ms:.2g}" for name, ms in cost.fusions.items()) or "nothing"
    memory = ", ".join(f"{name} {size:.3g}" for name, size in cost.memory_gb.items())
    lines = {
        "recipe": f"{cost.recipe}, batch {cost.batch}, {cost.precision}, on {cost.gpu}",
        "passes": passes,
        "FLOPs a step": f"{cost.flops / 1e9:.4g} G",
        "bytes a step": f"{cost.bytes / 1e9:.4g} GB",
        "launches": f"{cost.launches} kernels eager, 1 graph captured: {_most(cost.kernels)}",
        "step": f"{cost.step_ms:.3g} ms captured, {cost.eager_ms:.3g} ms eager (predicted)",
        "bound by": bound,
        "fusion": f"{cost.fused_ms:.3g} ms with step.compile = on, if it saves what it can: "
        f"{saved}; convolutions and products alone {cost.products_ms:.3g} ms",
        "images": f"{cost.images_per_second:,.0f} a second",
        "training": f"{cost.train_minutes:.3g} minutes, evaluation excluded",
        "memory": f"GB: {memory}",
        "PGD-10": f"{cost.pgd10_ms:.3g} ms a step: this takes {cost.share_of_pgd10:.0%} of it",
        "measured": "no GPU here" if cost.measured_ms is None else f"{cost.measured_ms:.3g} ms",
        "assumed": "; ".join(cost.assumptions),
    }
    for name, text in lines.items():
        stdout.print(f"{name:14} {text}", highlight=False, soft_wrap=True)
    return 0
