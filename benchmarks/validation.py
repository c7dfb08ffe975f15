"""Which validation attack tells the truth? `python -m engine.benchmarks.validation RUN [RUN ...]`.

The checkpoints of finished runs are attacked on the same held-out training images by PGD on the
cross-entropy, by PGD on the margin, and by AutoAttack's two APGD attacks. No test image is looked
at.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

import torch

from engine import files, results
from engine.device.machine import device, environment
from engine.evaluation import robust_accuracy
from engine.evaluation.autoattack import package
from engine.progress import stderr
from engine.runs import evaluate, images
from engine.runs.folder import Run

LOSSES: dict[str, robust_accuracy.PgdLoss] = {"ce": "cross-entropy", "margin": "margin"}


def attacked(run: Run, *, checkpoint: str = "best", examples: int = 300) -> dict[str, Any]:
    """Attack a run's checkpoint on the first `examples` of its held-out images.

    Returns:
        run (its folder and the folder around it), checkpoint, examples, and accuracies [0..1]:
        clean; constant_ce, constant_margin, decaying_ce and decaying_margin by PGD with 20 steps;
        apgd.
    """
    recipe = run.recipe
    model = evaluate.load_model(run, checkpoint)
    held, labels = images.split(recipe).validation
    held, labels = held[:examples], labels[:examples]
    x, y = next(iter(images.parts(held, labels, device(), len(labels))))
    found: dict[str, Any] = {"run": _name(run.path), "checkpoint": checkpoint, "examples": len(x)}
    with robust_accuracy.evaluation_mode(model):
        found["clean"] = robust_accuracy.share(robust_accuracy.predictions(model, x) == y)
        for step in get_args(robust_accuracy.PgdStep):
            for name, loss in LOSSES.items():
                robust = robust_accuracy.pgd(
                    model, x, y, recipe.threat, steps=20, restarts=1, loss=loss, step=step
                )
                found[f"{step}_{name}"] = robust_accuracy.share(robust)
        robust = package.run(model, x, y, recipe.threat, version="apgd").robust
    found["apgd"] = robust_accuracy.share(robust)
    return found


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


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
        names = " ".join(f"runs/{_name(path)}" for path in chosen.runs)
        command = f"python -m engine.benchmarks.validation {names} --store"
        stamp = {**environment(), "command": command}
        found = {"environment": stamp, "command": command, "rows": rows}
        files.write_json(results.place("validation"), found)


if __name__ == "__main__":
    main()
