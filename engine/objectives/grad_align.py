"""GradAlign (Andriushchenko & Flammarion, arXiv 2007.02617). About 9 F.

Paper: "Understanding and Improving Fast Adversarial Training". A regulariser keeps one-step
    training
from collapse (equation 5):

    CE(f(a), y)  +  lambda (1 - cos(grad CE(x), grad CE(x + eta))),   eta uniform in the ball

a = x + alpha sign(grad CE(x)), projected. As in the authors' code, the gradient at x is constant in
the cosine. The derivative of the other gradient costs a double backward pass.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from .. import kernels
from ..adversary.ascent import random_point
from ..adversary.attack import Attack
from ..adversary.held import once
from ..device.phases import ATTACK_BACKWARD, ATTACK_STEP, LOSS, phase
from ..kernels import Labels
from ..labels import cross_entropy
from ..threat import ThreatModel
from .base import Objective, Outcome, Passes, Smoothing, trained_pass, trained_passes


@dataclass(frozen=True)
class GradAlign(Objective):
    """Train with FGSM from the clean image and aligned gradients.

    `attack.steps` and `attack.start` have no effect.
    """

    mixes: ClassVar[bool] = True

    name: Literal["grad-align"] = "grad-align"
    weight: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="lambda, weight of the alignment")
    ] = 0.2
    label_smoothing: Smoothing = 0.0

    def passes(self, attack: Attack) -> Passes:
        # The gradient at the noise, then a backward pass through it: about one more of each.
        return Passes(1, 1, 0) + self.loss_passes()

    def loss_passes(self) -> Passes:
        return trained_passes(1) + Passes(1, 2, 1)

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
        at_clean = once(lambda: input_gradient(model, x, y))
        with phase(ATTACK_STEP):
            alpha = attack.alpha or 1.25 * threat.eps
            adversary = kernels.attack_step(x, x, at_clean, threat.eps, alpha, norm=threat.norm)
        noisy = random_point(threat.around(x), state)
        at_noise = input_gradient(model, noisy, y, create_graph=True)
        logits = trained_pass(model, adversary)
        with phase(LOSS):
            ce, stats = kernels.local_ball_loss(logits, y, label_smoothing=self.label_smoothing)
            alignment = 1 - _cosine(at_clean.flatten(1), at_noise.flatten(1)).mean()
            loss = ce + self.weight * alignment
        terms = {"ce": stats.cross_entropy, "alignment": alignment.detach()}
        return Outcome(loss, adversary, terms, stats.correct_adv)


def input_gradient(model: nn.Module, x: Tensor, y: Labels, *, create_graph: bool = False) -> Tensor:
    """Return the gradient of every image's cross-entropy at `x` with labels `y`, like `x`."""
    point = x.detach().requires_grad_()
    total = cross_entropy(trained_pass(model, point).float(), y).sum()
    with phase(ATTACK_BACKWARD):
        (grad,) = torch.autograd.grad(total, point, create_graph=create_graph)
    return grad


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine of each pair of rows; 0, without gradient, if a row is zero."""
    # Scale the rows first. The squares of a small row may underflow to 0, and then the derivative
    # is 0 times infinity. A row's size does not change the cosine.
    a, b = (t * _inverse_size(t) for t in (a, b))
    squares = a.square().sum(1) * b.square().sum(1)
    return (a * b).sum(1) * (squares + 1e-20).rsqrt()


def _inverse_size(rows: Tensor) -> Tensor:
    """Return 1 / max |entry| of each row as a constant; 0 for a row of zeros."""
    size = torch.linalg.vector_norm(rows.detach(), math.inf, dim=1, keepdim=True)
    return size.reciprocal().nan_to_num(posinf=0.0)
