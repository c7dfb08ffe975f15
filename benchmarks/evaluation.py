"""AutoAttack by both judges: `engine bench evaluation`. Seconds, and the images they disagree on.

Every network is trained here for a few epochs, then attacked by the authors' package and by the
engine, one after the other, from one seed and in the same batches.

The full form takes more than an hour. `python -m engine.benchmarks.evaluation --store` runs it
network by network, stores each network's rows as soon as they are known, and goes on after a stop.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine import files, recipes, results
from engine.device.machine import environment, keep_freed_memory
from engine.evaluation import robust_accuracy
from engine.evaluation.autoattack.verdict import Verdict
from engine.evaluation.work import Work
from engine.progress import stderr
from engine.recipes import Recipe
from engine.runs import evaluate, images, train
from engine.runs.folder import Run


@dataclass(frozen=True)
class Setting:
    """Hold a network to attack.

    Attributes:
        recipe: trains the network; changes: made to the recipe.
        examples: test images to attack [count].
    """

    recipe: str
    changes: Mapping[str, str]
    examples: int


_SHORT = {"optim.epochs": "4", "validation.every": "4"}
_FASHION = {**_SHORT, "data.train_examples": "20000", "threat.eps": "0.15"}
_L2 = _FASHION | {"threat.norm": "L2", "threat.eps": "1.5"}
_THIN = {"model.name": "preact-resnet18", "model.width": "8"}
_SMALL = {"model.name": "small-cnn"}
_QUICK = (
    Setting("quickstart", _SHORT, 60),
    Setting("quickstart-pgd10", _SHORT | {"threat.norm": "L2", "threat.eps": "0.8"}, 60),
)
# The networks of `engine bench evaluation` in full; the dearer a network, the fewer the images.
FULL = {
    "ours": Setting("fashion-mnist-atta", _FASHION, 1000),
    "pgd": Setting("fashion-mnist-pgd10", _FASHION, 1000),
    # One large step from a random start: gradients mask.
    "masked": Setting("fashion-mnist-fgsm-rs", _FASHION | {"threat.eps": "0.3"}, 1000),
    "thin-resnet": Setting("fashion-mnist-atta", _FASHION | _THIN, 200),
    "small-cnn": Setting("fashion-mnist-atta", _FASHION | _SMALL, 60),
    # Few images withstand, so 1,000 images of a dear network can be paid.
    "thin-resnet-clean": Setting(
        "fashion-mnist-clean", _FASHION | _THIN | {"threat.eps": "0.03"}, 1000
    ),
    "small-cnn-clean": Setting(
        "fashion-mnist-clean", _FASHION | _SMALL | {"threat.eps": "0.1"}, 1000
    ),
    "ours-l2": Setting("fashion-mnist-atta", _L2, 1000),
    "clean": Setting("fashion-mnist-clean", _FASHION | {"threat.eps": "0.02"}, 1000),
    "pgd-l2": Setting("fashion-mnist-pgd10", _L2, 1000),
}


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Attack each network by both judges.

    Args:
        quick: two networks of the 8x8 digits and 60 images of each, in place of the networks of
            `FULL`, trained on Fashion-MNIST.
    Returns:
        A row an attack, and a row "all": network, recipe, norm, eps, images, attack; CPU seconds by
        each judge and their ratio (the engine's over the package's); robust accuracy after the
        attack by each judge; on the rows "all" the share of images with the same verdict.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [row for setting in (_QUICK if quick else FULL.values()) for row in _rows(setting)]
    finally:
        torch.set_num_threads(threads)


def _rows(setting: Setting) -> list[dict[str, Any]]:
    examples = {"evaluation.examples": str(setting.examples)}
    recipe = recipes.load(setting.recipe, {**setting.changes, **examples})
    stderr.print(f"training {recipe.name}, {recipe.model.name}, eps {recipe.threat.eps:g}")
    with tempfile.TemporaryDirectory() as folder:
        run = Run.create(recipe, Path(folder) / "run")
        train.train(run)
        network = evaluate.load_model(run)
    x, y = images.test_set(recipe)
    verdicts: dict[str, Verdict] = {}
    clocks: dict[str, _Clock] = {}
    with robust_accuracy.evaluation_mode(network):
        for judge, attack in robust_accuracy.JUDGES.items():
            clocks[judge] = _Clock()
            verdicts[judge] = attack(
                network, x, y, recipe.threat, seed=recipe.seed, work=Work(clocks[judge])
            )
    about = _about(recipe, len(x))
    rows = [
        {
            **about,
            "attack": name,
            **_compared(*(clock.seconds.get(name, 0.0) for clock in clocks.values())),
            **{f"robust_{judge}": verdict.after.get(name) for judge, verdict in verdicts.items()},
        }
        for name in verdicts["engine"].after
    ]
    robust = {judge: verdict.robust for judge, verdict in verdicts.items()}
    whole = {
        **about,
        "attack": "all",
        **_compared(*(sum(clock.seconds.values()) for clock in clocks.values())),
        **{f"robust_{judge}": float(mask.double().mean()) for judge, mask in robust.items()},
        "agreement": float((robust["engine"] == robust["pyautoattack"]).double().mean()),
    }
    return [*rows, whole]


def _about(recipe: Recipe, count: int) -> dict[str, Any]:
    return {
        "network": recipe.model.name,
        "recipe": recipe.name,
        "norm": recipe.threat.norm,
        "eps": recipe.threat.eps,
        "images": count,
    }


def _compared(package: float, engine: float) -> dict[str, float | None]:
    return {
        "seconds_pyautoattack": round(package, 3),
        "seconds_engine": round(engine, 3),
        "ratio": round(engine / package, 3) if package else None,
    }


class _Clock:
    """Add up the CPU seconds of each attack, from the judge's calls for progress."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.process_time()

    def __call__(self, attack: str, done: int, total: int) -> None:
        now = time.process_time()
        self.seconds[attack] = self.seconds.get(attack, 0.0) + now - self._since
        self._since = now


def main() -> None:
    """Run the full form, or some of its networks; with --store, keep each network's rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", choices=[[], *FULL], metavar="NAME", help=", ".join(FULL)
    )
    parser.add_argument(
        "--images", type=int, default=1000, help="of each network at most so many [count]"
    )
    parser.add_argument("--store", action="store_true", help="keep the rows in benchmarks/results")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    for name in chosen.names or FULL:
        stored = _stored() if chosen.store else []
        if any(row["setting"] == name for row in stored):
            stderr.print(f"{name} is stored already")
            continue
        setting = replace(FULL[name], examples=min(FULL[name].examples, chosen.images))
        rows = [{"setting": name, **row} for row in _rows(setting)]
        stderr.print(str(rows[-1]), highlight=False, soft_wrap=True)
        if chosen.store:
            command = "python -m engine.benchmarks.evaluation --store"
            stamp = {**environment(), "command": command}
            found = {"environment": stamp, "command": command, "rows": [*stored, *rows]}
            files.write_json(results.place(_STORE), found)


_STORE = "agreement"


def _stored() -> list[dict[str, Any]]:
    """Return the rows of the networks that are stored, or none."""
    path = results.place(_STORE)
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


if __name__ == "__main__":
    main()
