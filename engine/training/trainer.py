"""Training: epochs, validation, what to keep, when to roll back; and where to go on from."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..data.loaders import Loader
from ..device import distributed
from ..errors import EngineError
from ..evaluation import robust_accuracy
from ..threat import check_pixels
from .step import Step

log = logging.getLogger(__name__)

# Catastrophic overfitting (Wong et al., arXiv 2001.03994): accuracy on the weak attack's images goes on
# rising while on a stronger attack's it falls to about nothing, within an epoch. Here: below this share of
# its best, and by more than noise; where both fall it is an unsteady start, which mends itself.
_COLLAPSE, _NOISE = 0.6, 0.1


@dataclass
class Hooks:
    """What a trainer tells the outside while it runs; all do nothing by default.

    Attributes:
        step: (steps done, steps in all, the epoch's means so far: calling it waits for the device).
        epoch: the row to log, after validation.
        checkpoint: ("best" or "last", model, row).
        safe_point: called wherever `Trainer.state` can be saved: after every step, and once an epoch
            has been logged. What it raises ends the training.
    """

    step: Callable[[int, int, Callable[[], dict[str, float]]], None] = lambda done, total, means: (
        None
    )
    epoch: Callable[[dict[str, Any]], None] = lambda row: None
    checkpoint: Callable[[str, nn.Module, dict[str, Any]], None] = lambda name, model, row: None
    safe_point: Callable[[], None] = lambda: None


@dataclass
class Result:
    """What a training run gave.

    Attributes:
        model: the evaluated network (the moving average where there is one), last epoch.
        best: state dict of the epoch with the best validation PGD accuracy; the last epoch's without
            a validation set.
        best_epoch: its number, from 1; steps: how many were made in all.
        rows: what was logged, a row an epoch.
        train_seconds: wall-clock seconds of training steps, data included, evaluation excluded.
        rolled_back: epochs whose outcome was given up, for the best one's before.
    """

    model: nn.Module = field(repr=False)
    best: dict[str, Tensor] = field(default_factory=dict, repr=False)
    best_epoch: int = 0
    train_seconds: float = 0.0
    steps: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list, repr=False)
    rolled_back: list[int] = field(default_factory=list)


class Trainer:
    """One training run, as a list of named parts.

    Args:
        step: its optimiser has a learning rate for each of `epochs` times `len(loader)` steps.
        loader: yields `Batch`es with `samples` and `crops` if the step has an adversary memory. Where the
            step takes its batches itself, they are this loader's.
        validation: held-out (x float32 [V, C, H, W] in [0, 1], y int64 [V]), never the test set; of
            several processes each has its part of it.
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
        self.result = Result(step.optimiser.average)
        # The best epoch's accuracies, under the validation attack and under training's own.
        self._best, self._best_adversarial = -math.inf, 0.0
        # Validations in a row at which the network answered the same to everything.
        self._constant = 0
        # Whether the first batch's pixels were looked at.
        self._checked = False
        self._began = time.perf_counter()
        if len(loader) == 0:
            raise EngineError("the loader has no batch to train on")

    def run(self) -> Result:
        """Train to the end of the schedule, from the beginning or from where `load` has put it.

        Raises:
            EngineError: when training has failed beyond repair (`_fault`), or a loader lacks what the
                memory needs.
        """
        step, result = self.step, self.result
        self._capture()
        for epoch in range(step.done // len(self.loader), self.epochs):
            row = self._train_epoch(epoch)
            if self.validation and (
                epoch + 1 == self.epochs or (epoch + 1) % self.validate_every == 0
            ):
                row |= self._validate()
            fault = self._fault(row)
            if fault is not None:
                self._mend(fault, row)
            # The last of equals: without a validation set that is the last epoch.
            score = row.get("val_pgd", -math.inf if self.validation else 0.0)
            if fault is None and score >= self._best and ("val_pgd" in row or not self.validation):
                # At the whole eps its own attack, the weaker one, would leave at least as much as validation's.
                own = score if self._growing(row) else row["adv_accuracy"]
                self._best, self._best_adversarial = score, own
                result.best_epoch = epoch + 1
                result.best = {k: v.clone() for k, v in result.model.state_dict().items()}
                self.hooks.checkpoint("best", result.model, row)
            result.rows.append(row)
            self.hooks.checkpoint("last", result.model, row)
            self.hooks.epoch(row)
            step.clear()
            self._began = time.perf_counter()
            self.hooks.safe_point()
        return result

    # ---- stopping and going on -------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that `load` needs to go on from here, bit for bit: tensors, and plain values. At a safe point only."""
        step, result = self.step, self.result
        tensors = {f"step.{name}": t for name, t in step.tensors().items()}
        tensors |= {f"best.{name}": t for name, t in result.best.items()}
        under_way = time.perf_counter() - self._began if step.batches else 0.0
        return tensors, {
            "done": step.done,
            "batches": step.batches,
            "images": step.images,
            "seconds": result.train_seconds + under_way,
            "best_epoch": result.best_epoch,
            "best": self._best if math.isfinite(self._best) else None,
            "best_adversarial": self._best_adversarial,
            "rolled_back": result.rolled_back,
        }

    def load(self, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Go on from a `state`.

        Raises:
            EngineError: if it is another run's.
        """
        parts: dict[str, dict[str, Tensor]] = {"step": {}, "best": {}}
        for name, t in tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = t
        result = self.result
        try:
            done, seconds = int(about["done"]), float(about["seconds"])
            counts = {"batches": int(about["batches"]), "images": int(about["images"])}
            result.best_epoch, best = int(about["best_epoch"]), about["best"]
            result.rolled_back = [int(epoch) for epoch in about["rolled_back"]]
            self._best = -math.inf if best is None else float(best)
            self._best_adversarial = float(about["best_adversarial"])
            self.step.load(parts["step"], done=done, **counts)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise EngineError(f"the checkpoint is not a whole one: {error!r}") from None
        result.best = parts["best"]
        result.train_seconds, result.steps = seconds, done

    def _capture(self) -> None:
        """Record the step before the first epoch: no thread of a loader runs yet, and no clock."""
        step = self.step
        step.train()
        if step.take is not None:
            # The step takes its batches from the epoch's order.
            self.loader.begin(step.done // len(self.loader))
            step.capture()
        elif (example := self.loader.example()) is not None:
            step.capture(example)

    # ---- an epoch --------------------------------------------------------------------------------

    def _train_epoch(self, epoch: int) -> dict[str, Any]:
        step, result, total = self.step, self.result, self.epochs * len(self.loader)
        before, end = result.train_seconds, (epoch + 1) * len(self.loader)
        self._began = time.perf_counter()
        step.train()
        # The rest of it, where an earlier process did the first part.
        first, images = step.done - epoch * len(self.loader), step.images
        for batch in self.loader.feed(epoch, first, taken=step.take is not None):
            if batch is not None and not self._checked:
                check_pixels(batch.x)
                self._checked = True
            step(batch)
            self.hooks.step(step.done, total, step.means)
            if step.done < end:
                self.hooks.safe_point()
        for model in step.networks():
            distributed.average_statistics(model)
        # The epoch's only read from the device, unless a hook asks for more.
        means = step.means(everywhere=True)
        seconds = time.perf_counter() - self._began
        result.steps, result.train_seconds = step.done, before + seconds
        self._began = time.perf_counter()
        radii = step.radii
        return {
            "epoch": epoch + 1,
            "step": step.done,
            "lr": step.optimiser.rates[step.done - 1],
            **({} if radii is None else {"eps": radii[step.done - 1]}),
            "train_seconds": result.train_seconds,
            "images_per_second": distributed.size() * (step.images - images) / seconds,
            **means,
        }

    # ---- when training fails ---------------------------------------------------------------------

    def _fault(self, row: dict[str, Any]) -> str | None:
        """What went wrong in the epoch of `row`; None: nothing did."""
        skipped, steps = row["skipped"], len(self.loader)
        if 2 * skipped > steps or not math.isfinite(row["loss"]):
            return f"{skipped} of {steps} steps had gradients that are not finite"
        robust = row.get("val_pgd", math.inf)
        fell = robust < min(_COLLAPSE * self._best, self._best - _NOISE)
        # While eps grows, validation is under a stronger attack than training has met yet.
        overfits = row["adv_accuracy"] >= self._best_adversarial and not self._growing(row)
        if fell and overfits:
            return (
                f"validation PGD accuracy fell from {self._best:.1%} to {robust:.1%}: catastrophic "
                "overfitting to the weak attack"
            )
        if skipped and self.step.precision != "fp16":
            log.warning(
                "epoch %d: %d of %d steps had gradients that are not finite and were skipped",
                row["epoch"],
                skipped,
                steps,
            )
        return None

    def _growing(self, row: dict[str, Any]) -> bool:
        """The epoch of `row` ended at a smaller eps than the network shall withstand."""
        whole = self.step.threat.eps
        return row.get("eps", whole) < whole

    def _mend(self, fault: str, row: dict[str, Any]) -> None:
        """Roll back to the best epoch; EngineError where there is none, or gradients stay without a number."""
        result, epoch = self.result, row["epoch"]
        again = result.rolled_back[-1:] == [epoch - 1] and row["skipped"] > 0
        if not result.best or again:
            raise EngineError(
                f"epoch {epoch}: {fault}: lower optim.lr or the loss weights"
                + (f"; epoch {result.best_epoch} is kept as the best" if result.best else "")
            )
        self.step.roll_back(result.best)
        result.rolled_back.append(epoch)
        row["rolled_back_to"] = result.best_epoch
        log.warning("epoch %d: %s; rolled back to epoch %d", epoch, fault, result.best_epoch)

    def _validate(self) -> dict[str, float]:
        assert self.validation is not None
        x, y = self.validation
        with robust_accuracy.evaluation_mode(self.step.optimiser.average) as model:
            predicted = robust_accuracy.predictions(model, x)
            clean = predicted == y
            robust = robust_accuracy.pgd(
                model,
                x,
                y,
                self.step.threat,
                steps=self.validation_steps,
                restarts=1,
                seed=self.seed,
            )
        several = bool((y != y[:1]).any())
        constant = several and bool((predicted == predicted[:1]).all())
        self._constant = self._constant + 1 if constant else 0
        if self._constant == 2:
            # As PGD from random starts does at a large radius: a fresh network finds nothing to hold on to.
            log.warning(
                "twice in a row the network gave all validation images one class: it does not learn; let eps "
                "grow at first (schedule.eps_warmup = 0.2), or lower optim.lr"
            )
        # Each process has a part of the images, of nearly the same size.
        right = torch.stack([clean.double().sum(), robust.double().sum(), y.new_tensor(len(y))])
        right_clean, right_robust, count = distributed.mean_(right).tolist()
        return {"val_clean": right_clean / count, "val_pgd": right_robust / count}
