"""NuAT (Sriramanan et al., "Towards Efficient and Effective Adversarial Training", NeurIPS 2021).

With D(a) = f(x) - f(a), the batch's logit differences as a matrix [B, K]:

    CE(f(x), y)  +  lambda ||D(a)||_* / B

||.||_* is the nuclear norm, the sum of singular values. The adversary a takes one step of size eps
from Bernoulli noise of eps / 2, along the gradient of CE(f(z), y) in even steps and of CE(f(z), y)
+ lambda ||D(z)||_* / B in odd ones. Their code lets lambda grow from 0 to 4.5 on CIFAR-10
(ResNet-18) over the run; here lambda is constant. The clean pass serves attack and loss: 8 F, where
their code makes it twice.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
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

# Each iteration grows a small singular value 1.5-fold, so singular values above a thousandth of the
# Frobenius norm arrive at 1.
_NEWTON_SCHULZ = 22


@dataclass(frozen=True)
class NuAT(Objective):
    """Train on the clean cross-entropy and the nuclear norm of the logit differences."""

    mixes: ClassVar[bool] = True

    name: Literal["nuat"] = "nuat"
    weight: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="lambda, weight of the nuclear norm")
    ] = 4.5
    noise: Annotated[
        float, Field(ge=0, le=1, description="size of the start's noise [fraction of eps]")
    ] = 0.5
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
        if start is None:
            start = bernoulli_start(x, self.noise * threat.eps, state)
        # The counter lies on the device.
        guided = self.weight * (state[1] % 2)
        adversary, _ = climb(
            model,
            threat.around(x),
            start,
            _guided(clean.detach().float(), y, guided),
            steps=attack.steps,
            alpha=threat.eps / attack.steps if attack.alpha is None else attack.alpha,
            batch_norm=attack.batch_norm,
        )
        adv = trained_pass(model, adversary)
        with phase(LOSS):
            ce, stats = kernels.local_ball_loss(clean, y, label_smoothing=self.label_smoothing)
            apart = clean.float() - adv.float()
            # The norm and its gradient: the unitary factor is the derivative.
            nuclear = (unitary_factor(apart.detach()) * apart).sum() / len(x)
            loss = ce + self.weight * nuclear
            right = correct(adv, y)
        return Outcome(
            loss, adversary, {"ce": stats.cross_entropy, "nuclear": nuclear.detach()}, right
        )


def _guided(clean: Tensor, y: Labels, weight: Tensor) -> LogitsGrad:
    """Return the gradient of summed CE + weight ||clean - logits||_* with respect to the logits."""

    def grad(logits: Tensor) -> Tensor:
        pull = -weight * unitary_factor(clean - logits.float())
        return kernels.cross_entropy_grad(logits, y) + pull.to(logits.dtype)

    return grad


def unitary_factor(matrix: Tensor) -> Tensor:
    """Return U V^T of the singular value decomposition U S V^T of a float matrix [B, K].

    By Newton-Schulz iteration: products alone, which a CUDA graph can hold, where a decomposition
    makes the host wait. Singular values below a thousandth of the Frobenius norm count in part,
    those that are zero not at all.
    """
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.t()
    tiny = torch.finfo(tall.dtype).tiny
    factor = tall / tall.norm().clamp(min=tiny)
    for _ in range(_NEWTON_SCHULZ):
        factor = torch.addmm(factor, factor, factor.t() @ factor, beta=1.5, alpha=-0.5)
    return factor if tall is matrix else factor.t()
