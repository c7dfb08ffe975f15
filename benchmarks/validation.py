"""Which validation attack tells the truth? `python -m engine.benchmarks.validation`.

One training run a method; every few epochs its network is attacked on the same held-out training images by PGD on the
cross-entropy, by PGD on the margin, and by AutoAttack's two APGD attacks. No test image is looked at.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch

from engine import files, recipes
from engine.device.machine import environment
from engine.evaluation import robust_accuracy
from engine.progress import stderr
from engine.runs import build, images
from engine.runs.train import build_trainer
from engine.training.trainer import Hooks

from . import store

# On top of the recipe `mnist`.
COMMON = {
    "model.name": "fast-at-mnist",
    "data.train_examples": "20000",
    "optim.lr": "5e-3",
    "attack.steps": "1",
    "threads": "1",
}
METHODS: dict[str, Mapping[str, str]] = {
    "memory-1": {"objective.name": "pgd"},
    "ball-1": {"objective.local_weight": "3", "objective.rho": "0.25"},
}


def run(
    method: str, *, epochs: int = 30, every: int = 3, examples: int = 300, **changes: str
) -> list[dict[str, Any]]:
    """Train `method` and attack its network every `every` epochs.

    Args:
        examples: the first so many held-out images are attacked [count].
        changes: of the recipe, on top of the method's.
    Returns:
        One row an epoch that was attacked: method, epoch, and accuracies [0..1]: clean; ce_10, ce_50, margin_10
        and margin_50 by PGD with so many steps; apgd.
    """
    wanted = {**COMMON, **METHODS[method], **changes, "optim.epochs": str(epochs)}
    recipe = recipes.load("mnist", {**wanted, "validation.every": str(epochs)})
    torch.set_num_threads(recipe.threads or 1)
    step, loader = build.prepare(recipe, epochs)
    x, y = images.as_floats(*images.split(recipe).validation, step.device)
    x, y = x[:examples], y[:examples]
    rows: list[dict[str, Any]] = []

    def attack(row: dict[str, Any]) -> None:
        if row["epoch"] % every:
            return
        found = {"method": method, "epoch": row["epoch"], "examples": len(x)}
        with robust_accuracy.evaluation_mode(step.optimiser.average) as model:
            right = robust_accuracy.predictions(model, x) == y
            found["clean"] = robust_accuracy.share(right)
            for name, loss in (("ce", "cross-entropy"), ("margin", "margin")):
                for steps in (10, 50):
                    robust = robust_accuracy.pgd(
                        model, x, y, recipe.threat, steps=steps, restarts=1, loss=loss
                    )
                    found[f"{name}_{steps}"] = robust_accuracy.share(robust)
            robust, _, _ = robust_accuracy.autoattack(model, x, y, recipe.threat, version="apgd")
        found["apgd"] = robust_accuracy.share(robust)
        stderr.print(str(found), highlight=False, soft_wrap=True)
        rows.append(found)

    build_trainer(recipe, step, loader, Hooks(epoch=attack)).run()
    return rows


def main() -> None:
    """Run every method; with --store, keep the rows beside the source."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", action="store_true", help="keep the rows in benchmarks/results")
    parser.add_argument(
        "--methods", nargs="*", default=list(METHODS), choices=list(METHODS), help="those to train"
    )
    chosen = parser.parse_args()
    rows = [row for method in chosen.methods for row in run(method)]
    if chosen.store:
        command = "python -m engine.benchmarks.validation --store"
        stamp = {**environment(), "command": command}
        found = {"environment": stamp, "command": command, "rows": rows}
        files.write_json(store.place("validation"), found)


if __name__ == "__main__":
    main()
