"""MART (Wang et al., ICLR 2020). 2k + 6 F.

Paper: "Improving Adversarial Robustness Requires Revisiting Misclassified Examples". The loss is
    that
of table 1 and equation 8, with the PGD adversary a of x and p = softmax(f):

    -log p_y(a) - log(1 - max_{k != y} p_k(a))  +  lambda KL(p(x) || p(a)) (1 - p_y(x))

The attack is PGD on the cross-entropy. It starts within 0.001 of the clean image, as in the
authors' code.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from ..adversary.ascent import random_point
from ..adversary.attack import Attack
from ..device.phases import LOSS, phase
from ..kernels import Labels
from ..labels import correct, cross_entropy
from ..threat import Ball, ThreatModel
from .base import Objective, Outcome, Passes, Smoothing, attack_passes, trained_pass, trained_passes

_NEAR = 1e-3


@dataclass(frozen=True)
class MART(Objective):
    """Minimise boosted cross-entropy and a divergence, weighted by the clean image's error."""

    name: Literal["mart"] = "mart"
    weight: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="lambda, weight of the divergence")
    ] = 5.0
    label_smoothing: Smoothing = 0.0

    def passes(self, attack: Attack) -> Passes:
        return attack_passes(attack.steps) + self.loss_passes()

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
        assert isinstance(y, Tensor)
        if start is None:
            start = random_point(Ball(x, threat.at_most(_NEAR), threat.norm), state)
        adversary, _ = attack(model, x, y, threat, start=start, state=state)
        clean, adv = trained_pass(model, x).float(), trained_pass(model, adversary).float()
        with phase(LOSS):
            boosted = boosted_cross_entropy(adv, y, self.label_smoothing).mean()
            log_p, log_q = clean.log_softmax(1), adv.log_softmax(1)
            p = log_p.exp()
            misread = 1 - p.gather(1, y[:, None]).squeeze(1)
            divergence = ((p * (log_p - log_q)).sum(1) * misread).mean()
            loss = boosted + self.weight * divergence
            right = correct(adv, y)
        stats = {"boosted_ce": boosted.detach(), "divergence": divergence.detach()}
        return Outcome(loss, adversary, stats, right)


def boosted_cross_entropy(logits: Tensor, y: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return -log p_y - log(1 - max_{k != y} p_k), [B], of logits [B, K] at labels int64 [B].

    Smoothing changes the first term only.
    """
    rest = logits.scatter(1, y[:, None], -torch.inf)
    rival = rest.argmax(1, keepdim=True)
    # 1 - p is the sum of the other classes: this avoids a difference of nearly equal numbers.
    others = logits.scatter(1, rival, -torch.inf).logsumexp(1)
    return cross_entropy(logits, y, label_smoothing) - (others - logits.logsumexp(1))
