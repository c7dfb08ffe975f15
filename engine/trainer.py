"""Training: epochs, schedule, moving average, validation, checkpoints."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from . import evaluation
from .data.loaders import Batch, Loader, ResidentLoader
from .errors import EngineError
from .step import Step


@dataclass
class Hooks:
    """What a trainer tells the outside while it runs; all do nothing by default.

    Attributes:
        step: (steps done, steps in all, the epoch's means so far: calling it waits for the device).
        epoch: the row to log, after validation.
        checkpoint: ("best" or "last", model, row).
    """

    step: Callable[[int, int, Callable[[], dict[str, float]]], None] = lambda done, total, means: (
        None
    )
    epoch: Callable[[dict[str, Any]], None] = lambda row: None
    checkpoint: Callable[[str, nn.Module, dict[str, Any]], None] = lambda name, model, row: None


@dataclass
class Result:
    """What a training run gave.

    Attributes:
        model: the evaluated network (the moving average where there is one), last epoch.
        best: state dict of the epoch with the best validation PGD accuracy; the last epoch's without
            a validation set.
        train_seconds: wall-clock seconds of training steps, data included, evaluation excluded.
    """

    model: nn.Module
    best: dict[str, Tensor]
    best_epoch: int
    train_seconds: float
    steps: int
    rows: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """One training run, as a list of named parts.

    Args:
        step: its optimiser has a learning rate for each of `epochs` times `len(loader)` steps.
        loader: yields `Batch`es with `samples` and `where` if the step has an adversary memory. Where the
            step takes its batches itself, they are this loader's.
        validation: held-out (x float32 [V, C, H, W] in [0, 1], y int64 [V]), never the test set.
        seed: of the validation attack.
    """

    def __init__(
        self,
        step: Step,
        loader: Loader,
        *,
        epochs: int,
        validation: tuple[Tensor, Tensor] | None = None,
        validation_steps: int = 10,
        validate_every: int = 1,
        seed: int = 0,
        hooks: Hooks | None = None,
    ) -> None:
        self.step, self.loader, self.epochs = step, loader, epochs
        self.validation, self.validation_steps = validation, validation_steps
        self.validate_every, self.seed = validate_every, seed
        self.hooks = hooks or Hooks()
        if len(loader) == 0:
            raise EngineError("the loader has no batch to train on")

    def run(self) -> Result:
        """Train for the whole schedule.

        Raises:
            EngineError: when the loss is no longer a number, or a loader lacks what the memory needs.
        """
        result = Result(self.step.optimiser.average, {}, 0, 0.0, 0)
        if self.step.take is None and (example := self.loader.example()) is not None:
            self.step.capture(example)
        best = -math.inf
        for epoch in range(self.epochs):
            row = self._train_epoch(epoch, result)
            if self.validation and (
                epoch + 1 == self.epochs or (epoch + 1) % self.validate_every == 0
            ):
                row |= self._validate()
            # The last of equals: without a validation set that is the last epoch.
            score = row.get("val_pgd", -math.inf if self.validation else 0.0)
            if score >= best and ("val_pgd" in row or not self.validation):
                best, result.best_epoch = score, epoch + 1
                result.best = {k: v.clone() for k, v in result.model.state_dict().items()}
                self.hooks.checkpoint("best", result.model, row)
            result.rows.append(row)
            self.hooks.checkpoint("last", result.model, row)
            self.hooks.epoch(row)
        return result

    def _train_epoch(self, epoch: int, result: Result) -> dict[str, Any]:
        step, total = self.step, self.epochs * len(self.loader)
        began = time.perf_counter()
        step.train()
        step.clear()
        for batch in self._batches(epoch):
            step(batch)
            self.hooks.step(step.done, total, step.means)
        # The epoch's only read from the device, unless a hook asks for more.
        means = step.means()
        seconds = time.perf_counter() - began
        result.steps = step.done
        result.train_seconds += seconds
        if not math.isfinite(means.get("loss", math.nan)):
            raise EngineError(
                f"the loss is not finite in epoch {epoch + 1}: lower optim.lr or the loss weights"
            )
        return {
            "epoch": epoch + 1,
            "step": step.done,
            "lr": step.optimiser.rates[step.done - 1],
            "train_seconds": result.train_seconds,
            "images_per_second": step.images / seconds,
            **means,
        }

    def _batches(self, epoch: int) -> Iterable[Batch | None]:
        """An epoch's batches; nothing but their number where the step takes them itself."""
        if self.step.take is None:
            return self.loader.epoch(epoch)
        assert isinstance(self.loader, ResidentLoader)
        self.loader.begin(epoch)
        return itertools.repeat(None, len(self.loader))

    def _validate(self) -> dict[str, float]:
        assert self.validation is not None
        x, y = self.validation
        with evaluation.evaluation_mode(self.step.optimiser.average) as model:
            clean = evaluation.predictions(model, x) == y
            robust = evaluation.pgd(
                model,
                x,
                y,
                self.step.threat,
                steps=self.validation_steps,
                restarts=1,
                seed=self.seed,
            )
        return {
            "val_clean": float(clean.double().mean()),
            "val_pgd": float(robust.double().mean()),
        }
