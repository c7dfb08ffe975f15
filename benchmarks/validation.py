"""Which validation attack tells the truth? `python -m engine.benchmarks.validation RUN [RUN ...]`.

The checkpoints of finished runs are attacked on the same held-out training images by PGD on the cross-entropy, by PGD on
the margin, and by AutoAttack's two APGD attacks. No test image is looked at.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from engine import files, results
from engine.device.machine import device, environment
from engine.evaluation import robust_accuracy
from engine.progress import stderr
from engine.runs import evaluate, images
from engine.runs.folder import Run


def attacked(run: Run, *, checkpoint: str = "best", examples: int = 300) -> dict[str, Any]:
    """Attack a run's checkpoint on the first `examples` of its held-out images.

    Returns:
        run (its folder's name), checkpoint, examples, and accuracies [0..1]: clean; ce_10, ce_50, margin_10 and
        margin_50 by PGD with so many steps; apgd.
    """
    recipe = run.recipe
    model = evaluate.load_model(run, checkpoint)
    x, y = images.as_floats(*images.split(recipe).validation, device())
    x, y = x[:examples], y[:examples]
    found: dict[str, Any] = {"run": run.path.name, "checkpoint": checkpoint, "examples": len(x)}
    with robust_accuracy.evaluation_mode(model):
        found["clean"] = robust_accuracy.share(robust_accuracy.predictions(model, x) == y)
        losses: tuple[tuple[str, robust_accuracy.PgdLoss], ...] = (
            ("ce", "cross-entropy"),
            ("margin", "margin"),
        )
        for name, loss in losses:
            for steps in (10, 50):
                robust = robust_accuracy.pgd(
                    model, x, y, recipe.threat, steps=steps, restarts=1, loss=loss
                )
                found[f"{name}_{steps}"] = robust_accuracy.share(robust)
        robust, _, _ = robust_accuracy.autoattack(model, x, y, recipe.threat, version="apgd")
    found["apgd"] = robust_accuracy.share(robust)
    return found


def main() -> None:
    """Attack every run's best checkpoint; with --store, keep the rows beside the source."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="folders of finished runs"
    )
    parser.add_argument("--store", action="store_true", help="keep the rows in benchmarks/results")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for path in chosen.runs:
        rows.append(attacked(Run.open(path)))
        stderr.print(str(rows[-1]), highlight=False, soft_wrap=True)
    if chosen.store:
        names = " ".join(f"runs/{path.parent.name}/{path.name}" for path in chosen.runs)
        command = f"python -m engine.benchmarks.validation {names} --store"
        stamp = {**environment(), "command": command}
        found = {"environment": stamp, "command": command, "rows": rows}
        files.write_json(results.place("validation"), found)


if __name__ == "__main__":
    main()
