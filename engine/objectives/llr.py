"""LLR (Qin et al., arXiv 1907.02610). 2k + 6 F and a double backward pass.

Paper: "Adversarial Robustness through Local Linearization". The loss (equations 6 and 8) penalises
the point of the ball where the loss surface is least linear:

    CE(x)  +  lambda |g(delta)|  +  mu |delta . grad CE(x)|,
    g(delta) = CE(x + delta) - CE(x) - delta . grad CE(x),   delta = argmax |g| in the ball

A few steps of projected ascent from a random point find delta. The loss is differentiated through
the clean gradient.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from .. import kernels
from ..adversary.ascent import passes_without_training, random_point
from ..adversary.attack import Attack
from ..adversary.held import once
from ..device.phases import ATTACK_BACKWARD, ATTACK_FORWARD, ATTACK_STEP, LOSS, phase
from ..kernels import Labels
from ..labels import correct, cross_entropy
from ..threat import ThreatModel
from .base import Objective, Outcome, Passes, Smoothing, attack_passes, trained_pass, trained_passes


@dataclass(frozen=True)
class LLR(Objective):
    """Penalise the curvature and the slope of the cross-entropy within the ball."""

    mixes: ClassVar[bool] = True

    name: Literal["llr"] = "llr"
    linearity: Annotated[
        float,
        Field(ge=0, allow_inf_nan=False, description="lambda, weight of the departure from linear"),
    ] = 4.0
    slope: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="mu, weight of the linear change")
    ] = 3.0
    label_smoothing: Smoothing = 0.0

    def passes(self, attack: Attack) -> Passes:
        return attack_passes(attack.steps) + self.loss_passes()

    def loss_passes(self) -> Passes:
        # Clean: the gradient, then a backward pass through it.
        return Passes(1, 2, 1) + trained_passes(1)

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
        point = x.detach().requires_grad_()
        at_clean = cross_entropy(trained_pass(model, point).float(), y, self.label_smoothing)
        with phase(ATTACK_BACKWARD):
            (slope,) = torch.autograd.grad(at_clean.sum(), point, create_graph=True)
        if start is None:
            start = random_point(threat.around(x), state)
        worst = once(
            lambda: self._least_linear(
                model, x, y, start, at_clean.detach(), slope.detach(), threat, attack
            )
        )
        logits = trained_pass(model, worst).float()
        with phase(LOSS):
            linear = ((worst - x) * slope).flatten(1).sum(1)
            bend = cross_entropy(logits, y, self.label_smoothing) - at_clean - linear
            terms = {
                "ce": at_clean.mean(),
                "linearity": bend.abs().mean(),
                "slope": linear.abs().mean(),
            }
            loss = terms["ce"] + self.linearity * terms["linearity"] + self.slope * terms["slope"]
            right = correct(logits, y)
        return Outcome(loss, worst, {k: v.detach() for k, v in terms.items()}, right)

    def _least_linear(
        self,
        model: nn.Module,
        x: Tensor,
        y: Labels,
        z: Tensor,
        at_clean: Tensor,
        slope: Tensor,
        threat: ThreatModel,
        attack: Attack,
    ) -> Tensor:
        """Take `attack.steps` of projected ascent on |g|.

        The gradient of |g| is sign(g) (grad CE(z) - grad CE(x)).
        """
        alpha = attack.step_size(threat.eps)
        batch_norm = "batch" if model.training else "eval"
        with passes_without_training(model, batch_norm):
            for _ in range(attack.steps):
                point = z.detach().requires_grad_()
                with phase(ATTACK_FORWARD):
                    loss = cross_entropy(model(point).float(), y, self.label_smoothing)
                with phase(ATTACK_BACKWARD):
                    (grad,) = torch.autograd.grad(loss.sum(), point)
                with phase(ATTACK_STEP):
                    linear = ((z - x) * slope).flatten(1).sum(1)
                    bent = (loss.detach() - at_clean - linear).sign().view(-1, *[1] * (x.dim() - 1))
                    z = kernels.attack_step(
                        x, z, bent * (grad - slope), threat.eps, alpha, norm=threat.norm
                    )
        return z
