"""GAT (Sriramanan et al., arXiv 2011.14969). 8 F.

Paper: "Guided Adversarial Attack for Evaluating and Enhancing Adversarial Defenses". The loss is
section 5's, CE(f(x), y) + lambda ||p(x) - p(a)||^2. The adversary a is one step of size eps from
Bernoulli noise, along the gradient of CE(z) + lambda ||p(x) - p(z)||^2. On CIFAR-10 the authors'
code has lambda 10, noise of eps / 2, and the second term in every other iteration; on MNIST it has
lambda 15, noise of eps, and both terms in every iteration. The code raises lambda late in the run
(fourfold at 85 %, threefold at half of it), which is left out here. One clean pass serves attack
and loss; the authors' code makes two.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from .. import kernels
from ..adversary.ascent import LogitsGrad, climb
from ..adversary.attack import Attack
from ..device.phases import LOSS, phase
from ..kernels import Labels
from ..labels import correct
from ..threat import ThreatModel
from .base import (
    Objective,
    Outcome,
    Passes,
    Smoothing,
    attack_passes,
    bernoulli_start,
    trained_pass,
    trained_passes,
)


@dataclass(frozen=True)
class GAT(Objective):
    """Add the distance of the guided adversary's probabilities to the clean cross-entropy."""

    mixes: ClassVar[bool] = True

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
        clean = trained_pass(model, x)
        p = clean.float().softmax(1)
        if start is None:
            start = bernoulli_start(x, self.noise * threat.eps, state)
        # Alternate by the step counter, which is on the device: odd steps are guided.
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
            ce, stats = kernels.local_ball_loss(clean, y, label_smoothing=self.label_smoothing)
            distance = (p - adv.float().softmax(1)).square().sum(1).mean()
            loss = ce + self.weight * distance
            right = correct(adv, y)
        return Outcome(
            loss, adversary, {"ce": stats.cross_entropy, "distance": distance.detach()}, right
        )


def _guided(p: Tensor, y: Labels, weight: Tensor | float) -> LogitsGrad:
    """Return the gradient of CE + weight ||p - q||^2 in the logits of q = softmax(logits)."""

    def grad(logits: Tensor) -> Tensor:
        q = logits.float().softmax(1)
        apart = q - p
        pull = 2 * q * (apart - (q * apart).sum(1, keepdim=True))
        return kernels.cross_entropy_grad(logits, y) + (weight * pull).to(logits.dtype)

    return grad
