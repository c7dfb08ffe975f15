"""Training: epochs, schedule, moving average, validation, checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from . import evaluation, rng
from .adversary import Attack
from .data.loader import Batch
from .errors import EngineError
from .memory import AdversaryMemory
from .objectives import Objective
from .optim import Optimiser
from .schedule import Schedule
from .threat import ThreatModel


class Loader(Protocol):
    """What feeds a trainer: batches of one epoch, the same for the same epoch."""

    def __len__(self) -> int: ...
    def epoch(self, epoch: int) -> Any: ...


@dataclass
class Hooks:
    """What a trainer tells the outside while it runs; all do nothing by default.

    Attributes:
        step: (steps done, steps in all, latest stats as device tensors).
        epoch: the row to log, after validation.
        checkpoint: ("best" or "last", model, row).
    """

    step: Callable[[int, int, dict[str, Tensor]], None] = lambda done, total, stats: None
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
        loader: yields `Batch`es with `index` and `where` if `memory` is given.
        validation: held-out (x float32 [V, C, H, W] in [0, 1], y int64 [V]), never the test set.
        memory: the adversary memory, if attacks start from it.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Loader,
        *,
        objective: Objective,
        threat: ThreatModel,
        attack: Attack,
        optimiser: Optimiser,
        schedule: Schedule,
        lr: float,
        epochs: int,
        validation: tuple[Tensor, Tensor] | None = None,
        validation_steps: int = 10,
        validate_every: int = 1,
        memory: AdversaryMemory | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        hooks: Hooks | None = None,
    ) -> None:
        self.model, self.loader, self.objective = model, loader, objective
        self.threat, self.attack, self.memory = threat, attack, memory
        self.optimiser, self.schedule, self.lr, self.epochs = optimiser, schedule, lr, epochs
        self.validation, self.validation_steps = validation, validation_steps
        self.validate_every, self.seed = validate_every, seed
        self.hooks = hooks or Hooks()
        self.state = rng.state(seed, device)
        if len(loader) == 0:
            raise EngineError("the loader has no batch to train on")

    def step(self, batch: Batch, lr: float) -> dict[str, Tensor]:
        """One training step: attack, loss, backward, optimiser, memory. Talks to no host."""
        start = batch.start
        if start is None and self.memory is not None:
            start = self.memory.recall(_samples(batch), batch.x, batch.where)
        outcome = self.objective(
            self.model, batch.x, batch.y, self.threat, self.attack, start=start, state=self.state
        )
        self.optimiser.zero_grad()
        outcome.loss.backward()
        self.optimiser.step(lr)
        if self.memory is not None:
            self.memory.remember(_samples(batch), batch.x, outcome.adversary, batch.where)
        self.state[1] += 1
        accuracy = outcome.correct / len(batch.y)
        return {"loss": outcome.loss.detach(), "adv_accuracy": accuracy, **outcome.stats}

    def run(self) -> Result:
        """Train for the whole schedule.

        Raises:
            EngineError: when the loss is no longer a number, or a loader lacks what the memory needs.
        """
        total = self.epochs * len(self.loader)
        result = Result(self.optimiser.average, {}, 0, 0.0, 0)
        best = -math.inf
        for epoch in range(self.epochs):
            row = self._train_epoch(epoch, total, result)
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

    def _train_epoch(self, epoch: int, total: int, result: Result) -> dict[str, Any]:
        began = time.perf_counter()
        self.model.train()
        sums: dict[str, Tensor] = {}
        batches = images = 0
        for batch in self.loader.epoch(epoch):
            stats = self.step(batch, self.lr * self.schedule.at(result.steps, total))
            for name, value in stats.items():
                sums[name] = sums[name] + value if name in sums else value
            result.steps += 1
            batches += 1
            images += len(batch.y)
            self.hooks.step(result.steps, total, stats)
        # The epoch's only read from the device.
        means = {name: float(value) / max(batches, 1) for name, value in sums.items()}
        seconds = time.perf_counter() - began
        result.train_seconds += seconds
        if not math.isfinite(means.get("loss", math.nan)):
            raise EngineError(
                f"the loss is not finite in epoch {epoch + 1}: lower optim.lr or the loss weights"
            )
        return {
            "epoch": epoch + 1,
            "step": result.steps,
            "lr": self.lr * self.schedule.at(result.steps - 1, total),
            "train_seconds": result.train_seconds,
            "images_per_second": images / seconds,
            **means,
        }

    def _validate(self) -> dict[str, float]:
        assert self.validation is not None
        x, y = self.validation
        with evaluation.evaluation_mode(self.optimiser.average) as model:
            clean = evaluation.predictions(model, x) == y
            robust = evaluation.pgd(
                model, x, y, self.threat, steps=self.validation_steps, restarts=1, seed=self.seed
            )
        return {
            "val_clean": float(clean.double().mean()),
            "val_pgd": float(robust.double().mean()),
        }


def _samples(batch: Batch) -> Tensor:
    if batch.samples is None:
        raise EngineError("attack.start = memory needs a loader that hands over sample indices")
    return batch.samples
