"""GAT (Sriramanan et al., "Guided Adversarial Attack for Evaluating and Enhancing Adversarial Defenses", arXiv 2011.14969).

Their section 5: CE(f(x), y) + lambda ||p(x) - p(a)||^2, a one step of size eps from Bernoulli noise,
along the gradient of CE(z) + lambda ||p(x) - p(z)||^2. On CIFAR-10 their code has lambda 10, noise of eps / 2
and the second term in every other iteration; on MNIST 15, noise of eps, and both terms in all. It raises lambda
late in the run (fourfold at 85 %, threefold at half of it), which is left out here. The clean pass serves attack and
loss: 8 F, where their code makes it twice.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from .. import kernels
from ..adversary.ascent import LogitsGrad, climb, random_point
from ..adversary.attack import Attack
from ..device.phases import ATTACK_START, LOSS, phase
from ..threat import Ball, ThreatModel
from .base import Objective, Outcome, Passes, attack_passes, trained_pass, trained_passes


@dataclass(frozen=True)
class GAT(Objective):
    """Cross-entropy on the clean image, and the distance of the guided adversary's probabilities."""

    name: Literal["gat"] = "gat"
    weight: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="lambda, weight of the distance")
    ] = 10.0
    noise: Annotated[
        float, Field(ge=0, le=1, description="size of the start's noise [fraction of eps]")
    ] = 0.5
    guided: Annotated[
        Literal["alternate", "always"],
        Field(description="steps whose attack follows the distance too: every other one, or all"),
    ] = "alternate"

    def passes(self, attack: Attack) -> Passes:
        return attack_passes(attack.steps) + trained_passes(2)

    def compute(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        attack: Attack,
        start: Tensor | None,
        state: Tensor,
    ) -> Outcome:
        clean = trained_pass(model, x)
        p = clean.float().softmax(1)
        if start is None:
            start = self._noisy(x, threat, state)
        # Alternating: odd steps only; the counter lies on the device.
        guided = self.weight * (state[1] % 2) if self.guided == "alternate" else self.weight
        adversary, _ = climb(
            model,
            threat.around(x),
            start,
            _guided(p.detach(), y, guided),
            steps=attack.steps,
            alpha=threat.eps / attack.steps if attack.alpha is None else attack.alpha,
            batch_norm=attack.batch_norm,
        )
        adv = trained_pass(model, adversary)
        with phase(LOSS):
            ce, stats = kernels.local_ball_loss(clean, y)
            distance = (p - adv.float().softmax(1)).square().sum(1).mean()
            loss = ce + self.weight * distance
            correct = (adv.detach().argmax(1) == y).sum()
        return Outcome(
            loss, adversary, {"ce": stats.cross_entropy, "distance": distance.detach()}, correct
        )

    def _noisy(self, x: Tensor, threat: ThreatModel, state: Tensor) -> Tensor:
        """Return `x` plus Bernoulli noise of -/+ `noise` eps, clipped to [0, 1]."""
        with phase(ATTACK_START):
            middle = torch.full_like(x, 0.5)
            signs = (random_point(Ball(middle, 0.25, "Linf"), state) - middle).sign()
            return (x + self.noise * threat.eps * signs).clamp(0, 1)


def _guided(p: Tensor, y: Tensor, weight: Tensor | float) -> LogitsGrad:
    """The gradient of CE + weight ||p - q||^2 with respect to the logits of q = softmax(logits)."""

    def grad(logits: Tensor) -> Tensor:
        q = logits.float().softmax(1)
        apart = q - p
        pull = 2 * q * (apart - (q * apart).sum(1, keepdim=True))
        return kernels.cross_entropy_grad(logits, y) + (weight * pull).to(logits.dtype)

    return grad
