"""Training runs: epochs, validation, the best epoch, roll-backs, and the state to resume from."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..adversary.host_memory import HostMemory, ahead
from ..data.loaders import Loader
from ..device import distributed
from ..errors import EngineError
from ..evaluation import robust_accuracy
from ..objectives import Clean
from ..threat import check_pixels
from .step import Step

log = logging.getLogger(__name__)

# Catastrophic overfitting (Wong et al., arXiv 2001.03994): within an epoch, accuracy on the weak
# attack's images goes on rising while accuracy on a stronger attack's falls to about zero. Here it
# is a fall below this share of the best accuracy, and by more than noise. Where both accuracies
# fall, the start is unsteady, and training recovers by itself.
_COLLAPSE, _NOISE = 0.6, 0.1


@dataclass
class Hooks:
    """Hold the functions that a trainer calls while it runs; by default they do nothing.

    Attributes:
        step: (steps done, steps in all, the epoch's means so far: calling it waits for the device).
        epoch: the row to log, after validation.
        checkpoint: ("best" or "last", model, row).
        safe_point: called wherever `Trainer.state` can be saved: after every step, and once an
            epoch has been logged. An exception from it ends the training.
    """

    step: Callable[[int, int, Callable[[], dict[str, float]]], None] = lambda done, total, means: (
        None
    )
    epoch: Callable[[dict[str, Any]], None] = lambda row: None
    checkpoint: Callable[[str, nn.Module, dict[str, Any]], None] = lambda name, model, row: None
    safe_point: Callable[[], None] = lambda: None


@dataclass
class Result:
    """Hold the outcome of a training run.

    Attributes:
        model: the evaluated network (the moving average where there is one), last epoch.
        best: state dict of the epoch with the best validation PGD accuracy; the last epoch's
            without a validation set.
        best_epoch: that epoch's number, from 1; steps: the number of steps.
        rows: the logged rows, one for each epoch.
        train_seconds: wall-clock seconds of training steps, data included, evaluation excluded.
        rolled_back: epochs after which training went back to the best epoch before.
    """

    model: nn.Module = field(repr=False)
    best: dict[str, Tensor] = field(default_factory=dict, repr=False)
    best_epoch: int = 0
    train_seconds: float = 0.0
    steps: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list, repr=False)
    rolled_back: list[int] = field(default_factory=list)


class Trainer:
    """Train for some epochs.

    Args:
        step: the training step; its optimiser has a learning rate for each of `epochs` times
            `len(loader)` steps.
        loader: yields `Batch`es with `samples` and `crops` if the step has an adversary memory.
            Where the step takes its batches itself, they are this loader's.
        validation: held-out images, never the test set, in parts (x float32 [V, C, H, W] in [0, 1],
            y int64 [V]) that are iterated over in every validation; each of several processes has
            its share of them. A pair of tensors is one part.
        seed: of the validation attack.
    """

    def __init__(
        self,
        step: Step,
        loader: Loader,
        *,
        epochs: int,
        validation: tuple[Tensor, Tensor] | robust_accuracy.Parts | None = None,
        validation_steps: int = 10,
        validation_loss: robust_accuracy.PgdLoss = "cross-entropy",
        validation_step: robust_accuracy.PgdStep = "constant",
        validate_every: int = 1,
        seed: int = 0,
        hooks: Hooks | None = None,
    ) -> None:
        self.step, self.loader, self.epochs = step, loader, epochs
        if isinstance(validation, tuple):
            validation = [validation]
        self.validation, self.validation_steps = validation, validation_steps
        self.validation_loss, self.validation_step = validation_loss, validation_step
        self.validate_every, self.seed = validate_every, seed
        self.hooks = hooks or Hooks()
        self.result = Result(step.optimiser.average)
        # The best epoch's accuracies under the validation attack and under the training attack.
        self._best, self._best_adversarial = -math.inf, 0.0
        # The number of validations in a row that gave all images one class.
        self._constant = 0
        # Whether the first batch's pixels were looked at.
        self._checked = False
        self._began = time.perf_counter()
        if len(loader) == 0:
            raise EngineError("the loader has no batch to train on")

    def run(self) -> Result:
        """Train to the end of the schedule, from the beginning or from where `load` has put it.

        Raises:
            EngineError: when training has failed beyond repair (`_fault`), or a loader lacks what
                the memory needs.
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
            # On ties, keep the latest epoch: without a validation set, the last one.
            score = row.get("val_pgd", -math.inf if self.validation else 0.0)
            if fault is None and score >= self._best and ("val_pgd" in row or not self.validation):
                # While eps grows, use validation accuracy: a lower bound for the weaker training
                # attack at full eps.
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

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors and plain values that `load` needs to resume here, bit for bit.

        Only at a safe point.
        """
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
        """Resume from a `state`.

        Raises:
            EngineError: for the state of another run.
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

    def _train_epoch(self, epoch: int) -> dict[str, Any]:
        step, result, total = self.step, self.result, self.epochs * len(self.loader)
        before, end = result.train_seconds, (epoch + 1) * len(self.loader)
        self._began = time.perf_counter()
        step.train()
        # An earlier process may have done the first part of the epoch.
        first, images = step.done - epoch * len(self.loader), step.images
        batches = self.loader.feed(epoch, first, taken=step.take is not None)
        if isinstance(step.memory, HostMemory):
            batches = ahead(batches, step.memory.prefetch)
        for batch in batches:
            if batch is not None and not self._checked:
                check_pixels(batch.x)
                self._checked = True
            step(batch)
            self.hooks.step(step.done, total, step.means)
            if step.done < end:
                self.hooks.safe_point()
        for model in step.networks():
            distributed.average_statistics(model)
        # The only read from the device in an epoch, unless a hook asks for more.
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

    def _fault(self, row: dict[str, Any]) -> str | None:
        """Return the fault of the epoch of `row`, or None."""
        skipped, steps = row["skipped"], len(self.loader)
        if 2 * skipped > steps or not math.isfinite(row["loss"]):
            return f"{skipped} of {steps} steps had gradients that are not finite"
        robust = row.get("val_pgd", math.inf)
        fell = robust < min(_COLLAPSE * self._best, self._best - _NOISE)
        # While eps grows, the validation attack is stronger than any attack in training so far.
        overfits = row["adv_accuracy"] >= self._best_adversarial and not self._growing(row)
        # Clean training has no attack to overfit to, and no robustness to lose.
        if not isinstance(self.step.objective, Clean) and fell and overfits:
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
        """Return whether the epoch of `row` ended at a smaller eps than the threat's."""
        whole = self.step.threat.eps
        return row.get("eps", whole) < whole

    def _mend(self, fault: str, row: dict[str, Any]) -> None:
        """Roll back to the best epoch.

        Raises:
            EngineError: where there is no such epoch, or gradients were not finite twice in a row.
        """
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
        with robust_accuracy.evaluation_mode(self.step.optimiser.average) as model:
            found = [
                self._validated(model, x, y, seed)
                for seed, (x, y) in enumerate(self.validation, start=self.seed)
            ]
        predicted, robust, y = (torch.cat(column) for column in zip(*found, strict=True))
        clean = predicted == y
        several = bool((y != y[:1]).any())
        constant = several and bool((predicted == predicted[:1]).all())
        self._constant = self._constant + 1 if constant else 0
        if self._constant == 2:
            # A fresh network under PGD from random starts ends here where eps is large.
            log.warning(
                "twice in a row the network gave all validation images one class: it does not "
                "learn; let eps grow at first (schedule.eps_warmup = 0.2), or lower optim.lr"
            )
        # Each process has a part of the images; the parts have nearly the same size.
        right = torch.stack([clean.double().sum(), robust.double().sum(), y.new_tensor(len(y))])
        right_clean, right_robust, count = distributed.mean_(right).tolist()
        return {"val_clean": right_clean / count, "val_pgd": right_robust / count}

    def _validated(
        self, model: nn.Module, x: Tensor, y: Tensor, seed: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the predictions int64 [V] of a part, where PGD failed bool [V], and labels."""
        robust = robust_accuracy.pgd(
            model,
            x,
            y,
            self.step.threat,
            steps=self.validation_steps,
            restarts=1,
            loss=self.validation_loss,
            step=self.validation_step,
            seed=seed,
        )
        return robust_accuracy.predictions(model, x), robust, y
