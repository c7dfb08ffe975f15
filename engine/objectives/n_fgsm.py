"""N-FGSM (de Jorge et al., arXiv 2202.01181). 2k + 3 F.

Paper: "Make Some Noise: Reliable and Efficient Single-Step Adversarial Training". Strong noise
    before
the step, and no projection into the ball, keep one-step training from collapse. Section 4:
x + eta + alpha sign(grad CE(x + eta)), eta uniform in [-k eps, k eps], k = 2, alpha = eps, clipped
to [0, 1] only.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from .. import kernels
from ..adversary.ascent import climb, random_point, towards_errors
from ..adversary.attack import Attack
from ..device.phases import LOSS, phase
from ..kernels import Labels
from ..threat import Ball, ThreatModel
from .base import Objective, Outcome, Passes, Smoothing, attack_passes, trained_pass, trained_passes


@dataclass(frozen=True)
class NFGSM(Objective):
    """Minimise the cross-entropy at one unclipped step from a noisy image.

    The default of `attack.alpha` is eps.
    """

    mixes: ClassVar[bool] = True

    name: Literal["n-fgsm"] = "n-fgsm"
    noise: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="radius of the noise [fraction of eps]")
    ] = 2.0
    label_smoothing: Smoothing = 0.0

    def passes(self, attack: Attack) -> Passes:
        return attack_passes(attack.steps) + self.loss_passes()

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
        alpha = threat.eps if attack.alpha is None else attack.alpha
        if start is None:
            start = random_point(Ball(x, self.noise * threat.eps, threat.norm), state)
        adversary, _ = climb(
            model,
            # The steps cannot leave this ball: only the range of the pixels clips them.
            Ball(start, attack.steps * alpha, threat.norm),
            start,
            towards_errors(y),
            steps=attack.steps,
            alpha=alpha,
            batch_norm=attack.batch_norm,
        )
        logits = trained_pass(model, adversary)
        with phase(LOSS):
            loss, stats = kernels.local_ball_loss(logits, y, label_smoothing=self.label_smoothing)
        return Outcome(loss, adversary, {"ce": stats.cross_entropy}, stats.correct_adv)
