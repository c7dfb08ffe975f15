"""Run whole trainings side by side: `engine bench end-to-end`.

An epoch is an epoch of `engine train`: batches, steps, the moving average, the log's row,
validation under PGD, the best and the last weights, and a whole checkpoint at its end (a run writes
one a minute). Beside the recipes runs a plain PGD-10 loop around torch's DataLoader, which does
none of this. All trainings take turns, an epoch each. So does the matrix product whose rate is the
yardstick. A machine that slows down slows them all.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from engine import recipes
from engine.data import datasets
from engine.device import machine, precision
from engine.errors import EngineError
from engine.performance import plan, timing
from engine.progress import TrainingBar, bar, stderr
from engine.recipes import Recipe
from engine.runs import build, train
from engine.runs.folder import Run
from engine.runs.images import split
from engine.training.checkpoint import Checkpoints
from engine.training.trainer import Hooks

from . import rivals

PLAIN = "plain PyTorch, PGD-10"


@dataclass(frozen=True)
class Setting:
    """Hold the trainings to run.

    Attributes:
        trainings: by the name in the rows: a recipe and its changed fields.
        plain: the PGD recipe that gives the plain loop its data, network, threat and attack.
        epochs: of each training [count].
        changes: fields set in every recipe.
    """

    trainings: Mapping[str, tuple[str, Mapping[str, str]]]
    plain: str
    epochs: int
    changes: Mapping[str, str]

    def recipe(self, name: str, changes: Mapping[str, str]) -> Recipe:
        return recipes.load(name, {**self.changes, **changes, "optim.epochs": str(self.epochs)})


_FASHION: dict[str, tuple[str, dict[str, str]]] = {
    name: (name, {}) for name in ("fashion-mnist", "fashion-mnist-atta", "fashion-mnist-pgd10")
}
_DIGITS: dict[str, tuple[str, dict[str, str]]] = {
    "quickstart": ("quickstart", {}),
    "quickstart-pgd10, one step from memory": (
        "quickstart-pgd10",
        {"attack.steps": "1", "attack.start": "memory"},
    ),
    "quickstart-pgd10": ("quickstart-pgd10", {}),
}


def settings(quick: bool) -> Setting:
    """Return the setting: Fashion-MNIST's recipes.

    Quick: the same on fewer images, or on the 8x8 digits where Fashion-MNIST is not fetched.
    """
    if not quick:
        return Setting(_FASHION, "fashion-mnist-pgd10", 9, {})
    if datasets.info("fashion-mnist").folder is None:
        return Setting(_DIGITS, "quickstart-pgd10", 5, {})
    # Keep the ratio of validation images to training images.
    few = {"data.train_examples": "2560", "data.validation": "44"}
    return Setting(_FASHION, "fashion-mnist-pgd10", 5, few)


class _Turn(Exception):
    """Stop a training at the end of an epoch, for the next training's turn."""


class Training:
    """Run a recipe's training, one epoch a call.

    Attributes:
        images, steps: of an epoch [count]; passes, flops: of a step.
    """

    def __init__(self, recipe: Recipe, folder: Path, bar_of_run: TrainingBar) -> None:
        run = Run.create(recipe, folder)
        self._step, self._loader = build.prepare(recipe, recipe.optim.epochs)
        checkpoints = Checkpoints(folder / "checkpoints", keep=recipe.checkpoint.keep)

        def keep(name: str, model: torch.nn.Module, row: dict[str, Any]) -> None:
            run.save(name, model, epoch=row["epoch"], recipe=recipe.name)

        def safe_point() -> None:
            if self._step.batches == 0:
                tensors, about = self._trainer.state()
                checkpoints.save(self._step.done, tensors, {**about, "logged": run.logged()})
                raise _Turn

        hooks = Hooks(bar_of_run.step, run.log, keep, safe_point)
        self._trainer = train.build_trainer(recipe, self._step, self._loader, hooks)
        self.steps = len(self._loader)
        self.images = self.steps * recipe.optim.batch_size
        self.passes = recipe.passes().total
        self.flops = plan.flops(recipe)

    def epoch(self) -> None:
        # The trainer resumes at the end of its last turn.
        with contextlib.suppress(_Turn):
            self._trainer.run()

    @property
    def seconds(self) -> float:
        """The seconds of all epochs so far, in steps and their batches."""
        return self._trainer.result.train_seconds

    def close(self) -> None:
        self._step.close()
        self._loader.close()


class Plain:
    """Run the plain loop on a PGD recipe's data and network.

    It has the methods and attributes of `Training`.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._where = machine.device()
        parts = split(recipe)
        images, labels = parts.train
        if not isinstance(images, Tensor):
            raise EngineError("engine bench end-to-end: the set must fit in memory")
        torch.manual_seed(recipe.seed)
        network = build.build_model(recipe, images, len(parts.classes), images.shape[1:])
        # The plain loop keeps the default memory layout.
        network = rivals.plain(network.to(self._where, memory_format=torch.contiguous_format))
        attack, eps = recipe.attack, recipe.threat.eps
        self._step = rivals.fast_adversarial(network, eps, attack.step_size(eps), attack.steps)
        self._loader: DataLoader = DataLoader(
            TensorDataset(images.float() / 255.0, labels),
            recipe.optim.batch_size,
            shuffle=True,
            drop_last=True,
            pin_memory=self._where.type == "cuda",
        )
        self.steps = len(self._loader)
        self.images = self.steps * recipe.optim.batch_size
        # Count the passes that the objective needs; the loop also computes weight gradients in
        # every attack step.
        self.passes = recipe.objective.passes(attack).total
        self.seconds = 0.0
        self.flops = plan.count(lambda: self._train(1)).total()

    def epoch(self) -> None:
        self.seconds += timing.timed(lambda: self._train(self.steps))

    def _train(self, steps: int) -> None:
        for x, y in itertools.islice(self._loader, steps):
            self._step(x.to(self._where), y.to(self._where))

    def close(self) -> None:
        """Do nothing: this training holds no files."""


# ---- running ---------------------------------------------------------------------------------


def run(quick: bool) -> list[dict[str, Any]]:
    """Train all in turn.

    Args:
        quick: fewer images and epochs; under a minute.
    Returns:
        One row a training. p20_ms, p50_ms, p80_ms: of an epoch, validation included. images_per_s:
        by the median epoch; passes_per_s: images times the objective's passes; gflop_per_s: of
        training steps (validation adds time and no work); share_of_peak: of peak_gflop_per_s, the
        best rate of a matrix product in any turn; gflop_per_step: arithmetic done, so the plain
        loop has more for the same passes; share_in_steps: time in steps and their batches, of all
        epochs; speedup_vs_plain: median of epoch times paired by turn.
    """
    setting = settings(quick)
    chosen = {name: setting.recipe(*about) for name, about in setting.trainings.items()}
    plain = setting.recipe(setting.plain, {})
    for recipe in (*chosen.values(), plain):
        build.check(recipe, evaluated=False)
    images = len(split(plain).train[0])
    stderr.print(
        f"{plain.data.name}: {images:,} images, {setting.epochs} epochs of each in turn",
        highlight=False,
    )
    before = torch.get_num_threads()
    torch.set_num_threads(plain.threads or before)
    try:
        return _measure(setting, chosen, plain)
    finally:
        torch.set_num_threads(before)


def _measure(setting: Setting, chosen: Mapping[str, Recipe], plain: Recipe) -> list[dict[str, Any]]:
    device = machine.device()
    arithmetic = precision.resolve(plain.step.precision, device)
    peak = 0.0
    with tempfile.TemporaryDirectory() as folder, bar() as progress, contextlib.ExitStack() as held:
        trainings: dict[str, Training | Plain] = {
            name: Training(
                recipe, Path(folder) / str(number), TrainingBar(progress, name, setting.epochs)
            )
            for number, (name, recipe) in enumerate(chosen.items())
        }
        trainings[PLAIN] = Plain(plain)
        for training in trainings.values():
            held.callback(training.close)
        times: dict[str, list[float]] = {name: [] for name in trainings}
        for _ in range(setting.epochs):
            peak = max(peak, timing.peak_gflops(device, arithmetic))
            for name, training in trainings.items():
                times[name].append(timing.timed(training.epoch))
    timings = {name: timing.quantiles(values) for name, values in times.items()}
    rows = []
    for name, training in trainings.items():
        measured = timings[name]
        rate = 1e3 / measured.p50
        gflops = 1e-9 * training.flops * training.steps * rate
        rows.append(
            {
                "training": name,
                "data": plain.data.name,
                "images": training.images,
                "epochs": setting.epochs,
                "threads": torch.get_num_threads(),
                "passes": training.passes,
                "p20_ms": round(measured.p20, 1),
                "p50_ms": round(measured.p50, 1),
                "p80_ms": round(measured.p80, 1),
                "images_per_s": round(training.images * rate),
                "passes_per_s": float(round(training.images * training.passes * rate)),
                "gflop_per_step": round(training.flops / 1e9, 4),
                "gflop_per_s": round(gflops, 2),
                "share_of_peak": round(gflops / peak, 4),
                "share_in_steps": round(training.seconds / sum(times[name]), 4),
                "speedup_vs_plain": round(timings[PLAIN].over(measured), 2),
                "peak_gflop_per_s": round(peak, 1),
            }
        )
    return rows
