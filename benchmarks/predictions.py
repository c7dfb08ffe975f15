"""The tables of `engine plan`'s predictions, for the documents."""

from __future__ import annotations

from collections.abc import Sequence

from engine import recipes
from engine.performance import plan

from .markdown import header


def plans(names: Sequence[str] = ("cifar10", "cifar10-pgd10", "cifar10-strong")) -> str:
    """Return a Markdown table of `engine plan` for CIFAR-10 on every known GPU: predictions."""
    lines = header(
        "recipe",
        "GPU",
        "passes",
        "step ms",
        "images/s",
        "training, min",
        "bound by compute",
        "bound by memory",
        "share of PGD-10",
    )
    gpus = list(plan.GPUS)
    predicted = [plan.plans(recipes.load(name), gpus) for name in names]
    for gpu, predictions in zip(gpus, zip(*predicted, strict=True), strict=True):
        for name, prediction in zip(names, predictions, strict=True):
            cells = [
                f"`{name}`",
                gpu,
                prediction.passes["total"],
                f"{prediction.step_ms:.1f}",
                f"{prediction.images_per_second:,.0f}",
                f"{prediction.train_minutes:.1f}",
                f"{prediction.bound_by['compute']:.0%}",
                f"{prediction.bound_by['memory']:.0%}",
                f"{prediction.share_of_pgd10:.0%}",
            ]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def full_scale() -> str:
    """Return a Markdown table of the MNIST and CIFAR recipes, with predictions."""
    lines = header(
        "recipe",
        "network",
        "Linf",
        "objective, k",
        "passes",
        "epochs",
        "H100, min (predicted)",
    )
    for name in recipes.names():
        loaded = recipes.load(name)
        if loaded.data.name not in ("mnist", "cifar10", "cifar100"):
            continue
        eps = loaded.threat.eps
        cells = [
            f"`{name}`",
            loaded.model.name,
            f"{eps * 255:.0f}/255" if loaded.data.name != "mnist" else f"{eps:g}",
            f"{loaded.objective.name}, {loaded.attack.steps}",
            f"{loaded.passes().total:g}",
            loaded.optim.epochs,
            f"{plan.training_minutes(loaded, 'h100'):.2g}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)
