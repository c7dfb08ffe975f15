"""AutoAttack by both judges: `engine bench evaluation`. Seconds, and the images they disagree on.

Every network is trained here for a few epochs, then attacked by the authors' package and by the
engine, one after the other, from one seed and in the same batches.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine import recipes
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
_QUICK = (
    Setting("quickstart", _SHORT, 60),
    Setting("quickstart-pgd10", _SHORT | {"threat.norm": "L2", "threat.eps": "0.8"}, 60),
)
_FULL = (
    Setting("fashion-mnist-atta", _FASHION, 1000),
    Setting("fashion-mnist-pgd10", _FASHION, 1000),
    # Trained without adversaries, and by one step that lets gradients mask.
    Setting("fashion-mnist-clean", _FASHION | {"threat.eps": "0.02"}, 1000),
    Setting("fashion-mnist-fgsm-rs", _FASHION | {"threat.eps": "0.3"}, 1000),
    Setting("fashion-mnist-atta", _FASHION | {"threat.norm": "L2", "threat.eps": "1.5"}, 1000),
    # Ten times as dear a pass.
    Setting("fashion-mnist-atta", _FASHION | {"model.name": "small-cnn"}, 100),
)


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Attack each network by both judges.

    Args:
        quick: two networks of the 8x8 digits and 60 images of each, in place of six networks of
            Fashion-MNIST and 1,000 images (100 for small-cnn).
    Returns:
        A row an attack, and a row "all": network, recipe, norm, eps, images, attack; CPU seconds by
        each judge and their ratio (the engine's over the package's); robust accuracy after the
        attack by each judge; on the rows "all" the share of images with the same verdict.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [row for setting in (_QUICK if quick else _FULL) for row in _rows(setting)]
    finally:
        torch.set_num_threads(threads)


def _rows(setting: Setting) -> list[dict[str, Any]]:
    recipe = recipes.load(setting.recipe, setting.changes)
    stderr.print(f"training {recipe.name}, {recipe.model.name}, eps {recipe.threat.eps:g}")
    with tempfile.TemporaryDirectory() as folder:
        run = Run.create(recipe, Path(folder) / "run")
        train.train(run)
        network = evaluate.load_model(run)
    x, y = (t[: setting.examples] for t in images.test_set(recipe))
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
