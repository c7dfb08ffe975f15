"""FGSM-PGI (Jia et al., arXiv 2207.08859). 7 F.

Paper: "Prior-Guided Adversarial Initialization for Fast Adversarial Training". The attack is one
    step
of size eps from the sample's last adversary (the paper's FGSM-EP: the adversary memory). A
regulariser
ties the logits at both ends of the step (equation 9):

    CE(f(a), y)  +  lambda mean (f(a) - f(start))^2

The loss is differentiated through the start's pass too. Labels are smoothed in the step's gradient
and in the loss, as in the authors' code, which gives the true class 0.6: a smoothing of 0.444 with
ten classes. The paper's FGSM-MEP moves the next start along a momentum of each sample's gradients.
It needs a second memory and is left out.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from .. import kernels
from ..adversary.ascent import ascend_from_training, random_point
from ..adversary.attack import Attack
from ..device.phases import LOSS, phase
from ..kernels import Labels
from ..threat import ThreatModel
from .base import Objective, Outcome, Passes, trained_pass, trained_passes


@dataclass(frozen=True)
class FGSMPGI(Objective):
    """Tie the logits at both ends of one step from the prior; `attack.steps` has no effect."""

    mixes: ClassVar[bool] = True

    name: Literal["fgsm-pgi"] = "fgsm-pgi"
    weight: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="lambda, weight of the tie")
    ] = 10.0
    label_smoothing: Annotated[
        float,
        Field(
            ge=0, lt=1, description="label smoothing of the cross-entropy and of the step [0..1)"
        ),
    ] = 0.0

    def passes(self, attack: Attack) -> Passes:
        return Passes(0, 1, 0) + self.loss_passes()

    def loss_passes(self) -> Passes:
        return trained_passes(2)

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
        ball = threat.around(x)
        if start is None:
            start = random_point(ball, state)
        at_start, step = ascend_from_training(model, start, y, label_smoothing=self.label_smoothing)
        adversary = step(ball, threat.eps if attack.alpha is None else attack.alpha)
        at_end = trained_pass(model, adversary)
        with phase(LOSS):
            ce, stats = kernels.local_ball_loss(at_end, y, label_smoothing=self.label_smoothing)
            tie = (at_end.float() - at_start.float()).square().mean()
            loss = ce + self.weight * tie
        return Outcome(
            loss, adversary, {"ce": stats.cross_entropy, "tie": tie.detach()}, stats.correct_adv
        )
