"""LIET (Pan et al., "Mitigating Catastrophic Overfitting in Fast Adversarial Training via Label
Information Elimination", ICCV 2025).

One step that collapses learns to write the label into the perturbation. So the step starts from
what such a network writes, with a part of it erased. For every class k, I_k = eps sign(grad
CE(f(g), k)) at a grey image g. The start is s = x + I_y or x - I_y, one sign for the batch, where a
random share of the pixels has uniform noise in place of I_y. From there one step of size eps to a,
and with p = softmax(f):

    CE(f(a), y)  +  lambda (KL(p(s) || m) + KL(p(a) || m)) / 2,    m = (p(s) + p(a)) / 2

Above 8/255 their code leaves out the projection to the ball, has noise of 2 eps and shares from 0
to 1 (`projected`, `noise`, `erased`). It lets lambda grow from 0 to 100 on CIFAR-10 (to 20 at
16/255) over the run and smooths labels by random amounts: here lambda is constant, its mean the
default, and the smoothing even. It renews I every ten steps; here every step does, for no state is
kept. The start's pass is trained through: 7 F, and one forward pass and one input gradient of K
grey images.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from .. import kernels, rng
from ..adversary.ascent import (
    ascend_from_training,
    climb,
    passes_without_training,
    random_point,
    towards_errors,
)
from ..adversary.attack import Attack
from ..device.phases import ATTACK_START, LOSS, phase
from ..errors import EngineError
from ..kernels import Labels
from ..threat import Ball, ThreatModel
from .base import Objective, Outcome, Passes, trained_pass, trained_passes


@dataclass(frozen=True)
class LIET(Objective):
    """Train on one step from a start whose label information is partly erased.

    A divergence ties the start and the end of the step together.
    """

    name: Literal["liet"] = "liet"
    weight: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="lambda, weight of the divergence")
    ] = 50.0
    label_smoothing: Annotated[
        float,
        Field(
            ge=0, lt=1, description="label smoothing of the cross-entropy and of the steps [0..1)"
        ),
    ] = 0.6
    erased: Annotated[
        tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]],
        Field(description="least and largest share of pixels that become noise [0..1]"),
    ] = (0.1, 0.5)
    noise: Annotated[
        float,
        Field(ge=0, allow_inf_nan=False, description="radius of that noise [fraction of eps]"),
    ] = 1.0
    projected: Annotated[
        bool, Field(description="project the adversary to the ball, or clip it to [0, 1] only")
    ] = True

    def check(self, attack: Attack) -> None:
        super().check(attack)
        if attack.start != "random":
            raise EngineError("the objective liet makes its own start: attack.start must be random")

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
        assert isinstance(y, Tensor)
        if start is None:
            start = self._start(model, x, y, threat, state)
        at_start, step = ascend_from_training(model, start, y, label_smoothing=self.label_smoothing)
        alpha = threat.eps if attack.alpha is None else attack.alpha
        ball = threat.around(x) if self.projected else Ball(start, alpha, threat.norm)
        adversary = step(ball, alpha)
        at_end = trained_pass(model, adversary)
        with phase(LOSS):
            ce, stats = kernels.local_ball_loss(at_end, y, label_smoothing=self.label_smoothing)
            apart = _jensen_shannon(at_start.float(), at_end.float())
            loss = ce + self.weight * apart
        return Outcome(
            loss, adversary, {"ce": stats.cross_entropy, "apart": apart.detach()}, stats.correct_adv
        )

    def _start(
        self, model: nn.Module, x: Tensor, y: Tensor, threat: ThreatModel, state: Tensor
    ) -> Tensor:
        written = self._label_information(model, x, threat).index_select(0, y)
        with phase(ATTACK_START):
            # Uniform on [0, 1]: a ball of radius a half around a half.
            coins = Ball(x.new_full((1, 2), 0.5), 0.5, "Linf")
            share, sign = random_point(coins, state, stream=rng.COINS)[0]
            pixels = Ball(torch.full_like(x, 0.5), 0.5, "Linf")
            low, high = self.erased
            erase = random_point(pixels, state, stream=rng.MASK) < low + share * (high - low)
            unit = 2 * random_point(pixels, state) - 1
            delta = torch.where(erase, self.noise * threat.eps * unit, written)
            return (x + delta * (sign - 0.5).sign()).clamp(0, 1)

    def _label_information(self, model: nn.Module, x: Tensor, threat: ThreatModel) -> Tensor:
        """Return I, [K, ...], for all classes."""
        grey = torch.full_like(x[:1], 0.5)
        with passes_without_training(model), torch.no_grad():
            classes = model(grey).shape[1]
        grey = grey.expand(classes, *x.shape[1:]).contiguous()
        labels = torch.arange(classes, device=x.device)
        end, _ = climb(
            model,
            threat.around(grey),
            grey,
            towards_errors(labels, self.label_smoothing),
            steps=1,
            alpha=threat.eps,
        )
        return end - grey


def _jensen_shannon(one: Tensor, other: Tensor) -> Tensor:
    """Return the mean Jensen-Shannon divergence of two sets of logits [B, K], 0-d, in nats."""
    log_p, log_q = one.log_softmax(1), other.log_softmax(1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    p_to_m = (log_p.exp() * (log_p - log_m)).sum(1)
    q_to_m = (log_q.exp() * (log_q - log_m)).sum(1)
    return 0.5 * (p_to_m + q_to_m).mean()
