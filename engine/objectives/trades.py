"""TRADES (Zhang et al., arXiv 1901.08573). 2k + 7 F.

Paper: "Theoretically Principled Trade-off between Robustness and Accuracy". The loss is equation
    5's,
CE(f(x), y) + beta max_a KL(p(x) || p(a)), with a in the ball around x. The attack's clean logits
come from one pass in evaluation mode, the authors' mode; their code makes a pass for each step.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from .. import kernels
from ..adversary.ascent import away_from, climb, passes_without_training, random_point
from ..adversary.attack import Attack
from ..adversary.held import once
from ..device.phases import ATTACK_FORWARD, LOSS, phase
from ..kernels import Labels
from ..threat import Ball, ThreatModel
from .base import Objective, Outcome, Passes, Smoothing, attack_passes, trained_pass, trained_passes

# The attack's gradient is zero at the clean image. The authors' code starts from normal noise of
# 0.001.
_NEAR = 1e-3


@dataclass(frozen=True)
class TRADES(Objective):
    """Add the divergence of the prediction over the ball to the clean cross-entropy."""

    mixes: ClassVar[bool] = True

    name: Literal["trades"] = "trades"
    beta: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="weight of the divergence")
    ] = 6.0
    label_smoothing: Smoothing = 0.0

    def passes(self, attack: Attack) -> Passes:
        return Passes(1, 0, 0) + attack_passes(attack.steps) + self.loss_passes()

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
        with phase(ATTACK_FORWARD), passes_without_training(model, attack.batch_norm):
            # Detached, not under no_grad: see `engine.adversary.ascent` on autocast's cache.
            anchor = once(lambda: model(x).detach())
        if start is None:
            start = random_point(Ball(x, threat.at_most(_NEAR), threat.norm), state)
        adversary, _ = climb(
            model,
            threat.around(x),
            start,
            away_from(anchor),
            steps=attack.steps,
            alpha=attack.step_size(threat.eps),
            batch_norm=attack.batch_norm,
        )
        at_clean, at_adversary = trained_pass(model, x), trained_pass(model, adversary)
        with phase(LOSS):
            # CE(clean) + beta KL(clean || adversary): the local-ball loss around the clean image.
            loss, stats = kernels.local_ball_loss(
                at_clean, y, at_adversary, lam=self.beta, label_smoothing=self.label_smoothing
            )
        return Outcome(
            loss,
            adversary,
            {"ce": stats.cross_entropy, "divergence": stats.local_kl},
            stats.correct_ball,
        )
