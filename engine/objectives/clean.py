"""Training on clean images, the yardstick for the cost of robustness. 3 F."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from .. import kernels
from ..adversary.attack import Attack
from ..device.phases import LOSS, phase
from ..kernels import Labels
from ..threat import ThreatModel
from .base import Objective, Outcome, Passes, Smoothing, trained_pass, trained_passes


@dataclass(frozen=True)
class Clean(Objective):
    """Minimise E[CE(f(x), y)] without an attack; `adv_accuracy` is the accuracy on clean images."""

    mixes: ClassVar[bool] = True

    name: Literal["clean"] = "clean"
    label_smoothing: Smoothing = 0.0

    def passes(self, attack: Attack) -> Passes:
        return self.loss_passes()

    def loss_passes(self) -> Passes:
        return trained_passes(1)

    def compute(
        self,
        model: nn.Module,
        x: Tensor,
        y: Labels,
        threat: ThreatModel,
        attack: Attack,
        start: Tensor | None,
        state: Tensor,
    ) -> Outcome:
        logits = trained_pass(model, x)
        with phase(LOSS):
            loss, stats = kernels.local_ball_loss(logits, y, label_smoothing=self.label_smoothing)
        return Outcome(loss, x, {"ce": stats.cross_entropy}, stats.correct_adv)
