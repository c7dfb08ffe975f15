"""The local-ball objective: robustness on a ball around each weak adversary, and a global term.

The objective follows the abstract of Lu & Kumar, "Improving Local Effectiveness for Global robust
training" (arXiv 2110.14030). The paper's formula is not public; this formula is the project's own
(docs/method.md):

    CE(f(a), y)  +  lambda KL(p(a) || p(b))  +  mu KL(p(x) || p(a))

a is the k-step adversary of x; b is the worst point that one ascent step finds in the ball of
radius rho * eps around a; p = softmax(f).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from .. import kernels, rng
from ..adversary.ascent import ascend_from_training, away_from, climb, random_point
from ..adversary.attack import Attack
from ..device.phases import LOSS, phase
from ..errors import EngineError
from ..kernels import Labels
from ..labels import cross_entropy
from ..threat import Ball, ThreatModel
from .base import (
    Objective,
    Outcome,
    Passes,
    Smoothing,
    attack_passes,
    attacked_pass,
    trained_pass,
    trained_passes,
)


class _Centre(NamedTuple):
    """Hold the passes at the adversaries a and at the points b of their local balls.

    Attributes:
        logits: [B, K] at a, with their graph.
        keep: the adversaries to remember, as `Outcome.adversary` takes them.
        ball: logits [n, K] at b for the first n samples, with their graph; None without b.
        slope: 0-d, the first-order local term; None with b.
    """

    logits: Tensor
    keep: Tensor | Callable[[], Tensor]
    ball: Tensor | None = None
    slope: Tensor | None = None


@dataclass(frozen=True)
class LocalBall(Objective):
    """Minimise CE(f(a), y) + lambda KL(p(a) || p(b)) + mu KL(p(x) || p(a)), or a variant of it.

    docs/method.md describes the formula and its variants.
    """

    free_step: ClassVar[bool] = True
    mixes: ClassVar[bool] = True

    name: Literal["local-ball"] = "local-ball"
    local_weight: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="lambda, weight of the local term")
    ] = 3.0
    global_weight: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="mu, weight of the global term")
    ] = 0.0
    rho: Annotated[
        float, Field(gt=0, le=1, description="radius of the local ball [fraction of eps, (0..1]]")
    ] = 0.5
    local_share: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="share of a batch's samples that get a local ball, the term being the mean "
            "over them [(0..1]]",
        ),
    ] = 1.0
    direction: Annotated[
        Literal["kl", "ce", "gradient-norm"],
        Field(
            description="local term: b along the KL gradient at a random point of the ball; along "
            "the cross-entropy gradient at the centre (shares its forward pass); or no b and the "
            "first-order bound rho eps ||grad CE(a)||_dual (double backward)"
        ),
    ] = "kl"
    distance: Annotated[
        Literal["kl", "squared"],
        Field(description="both terms by KL, or by the mean squared difference of the logits"),
    ] = "kl"
    anchor: Annotated[
        Literal["clean", "start"],
        Field(
            description="global term against the clean image, or against the attack's start, whose "
            "logits are there already (held constant: no pass)"
        ),
    ] = "clean"
    label_smoothing: Smoothing = 0.0

    def check(self, attack: Attack) -> None:
        super().check(attack)
        if self.local_share < 1 and self.direction == "gradient-norm":
            raise EngineError("objective.local_share below 1 needs objective.direction kl or ce")
        if attack.steps == 0 and self.global_weight > 0 and self.anchor == "start":
            raise EngineError("objective.anchor = start needs attack.steps of at least 1")
        if attack.steps == 0 and self.local_weight > 0 and self.direction == "gradient-norm":
            raise EngineError(
                "objective.direction = gradient-norm needs attack.steps of at least 1"
            )

    def passes(self, attack: Attack) -> Passes:
        cost = attack_passes(attack.steps) + self.loss_passes()
        if self.local_weight > 0 and self.direction == "kl":
            cost += attack_passes(1).of(self.local_share)
        elif self.local_weight > 0 and self.direction == "ce":
            cost += Passes(0, 1, 0)
        return cost

    def loss_passes(self) -> Passes:
        cost = trained_passes(1)
        if self.local_weight > 0 and self.direction == "gradient-norm":
            # The gradient, then a backward pass through it: about one more pass of each kind.
            cost += Passes(1, 2, 1)
        elif self.local_weight > 0:
            cost += trained_passes(1).of(self.local_share)
        if self.global_weight > 0 and self.anchor == "clean":
            cost += trained_passes(1)
        return cost

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
        adversary, start_logits = attack(model, x, y, threat, start=start, state=state)
        if self.local_weight == 0:
            centre = _Centre(*attacked_pass(model, x, adversary, threat, attack))
        elif self.direction == "kl":
            centre = self._ball_along_kl(model, x, adversary, threat, attack, state)
        elif self.direction == "ce":
            centre = self._ball_along_ce(model, x, y, adversary, threat, attack)
        else:
            centre = self._first_order(model, y, adversary, threat)
        anchor = None
        if self.global_weight > 0:
            anchor = trained_pass(model, x) if self.anchor == "clean" else start_logits
        loss_of = self._kl_loss if self.distance == "kl" else self._squared_loss
        with phase(LOSS):
            loss, terms, correct = loss_of(centre, anchor, y)
            if centre.slope is not None:
                terms["local"] = centre.slope
                loss = loss + self.local_weight * centre.slope
        return Outcome(loss, centre.keep, {k: v.detach() for k, v in terms.items()}, correct)

    def _balls(self, x: Tensor) -> int:
        """Return how many samples get a local ball: the first ones, as batches are shuffled."""
        # The 1e-9 guards ceil against rounding.
        return math.ceil(self.local_share * len(x) - 1e-9)

    def _ball_along_kl(
        self,
        model: nn.Module,
        x: Tensor,
        adversary: Tensor,
        threat: ThreatModel,
        attack: Attack,
        state: Tensor,
    ) -> _Centre:
        """Find b by one ascent step on KL(p(a) || p(b)) from a random point of the local ball."""
        logits, keep = attacked_pass(model, x, adversary, threat, attack)
        n, radius = self._balls(x), self.rho * threat.eps
        ball = Ball(adversary[:n], radius, threat.norm)
        # The logits at a come from a training-mode pass, so BatchNorm must be in that mode here
        # too.
        point, _ = climb(
            model,
            ball,
            random_point(ball, state, stream=rng.LOCAL),
            away_from(logits[:n].detach()),
            steps=1,
            alpha=radius,
            batch_norm="batch" if model.training else "eval",
        )
        return _Centre(logits, keep, trained_pass(model, point))

    def _ball_along_ce(
        self,
        model: nn.Module,
        x: Tensor,
        y: Labels,
        adversary: Tensor,
        threat: ThreatModel,
        attack: Attack,
    ) -> _Centre:
        """Find b by one step from a along the gradient of CE(f(a), y), in a's forward pass."""
        logits, step = ascend_from_training(model, adversary, y)
        radius = self.rho * threat.eps
        point = step(Ball(adversary, radius, threat.norm), radius)[: self._balls(x)]
        ball = trained_pass(model, point)
        keep = adversary
        if attack.steps == 0:
            keep = step(threat.around(x), attack.step_size(threat.eps))
        return _Centre(logits, keep, ball)

    def _first_order(
        self, model: nn.Module, y: Labels, adversary: Tensor, threat: ThreatModel
    ) -> _Centre:
        """Bound the growth of CE in the local ball to first order: rho eps ||grad CE(a)||_dual.

        The term is the batch mean. The dual norm is L1 for Linf, and L2 for L2.
        """
        point = adversary.detach().requires_grad_()
        logits = trained_pass(model, point)
        total = cross_entropy(logits, y).sum()
        (grad,) = torch.autograd.grad(total, point, create_graph=True)
        norm = grad.flatten(1).norm(p=1 if threat.norm == "Linf" else 2, dim=1)
        return _Centre(logits, adversary, slope=self.rho * threat.eps * norm.mean())

    def _kl_loss(
        self, centre: _Centre, anchor: Tensor | None, y: Labels
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Return CE + lambda KL(p(a) || p(b)) + mu KL(p(anchor) || p(a)), terms, correct count."""
        ball, share = _whole_batch(centre)
        loss, stats = kernels.local_ball_loss(
            centre.logits,
            y,
            ball,
            anchor,
            lam=self.local_weight / share,
            mu=self.global_weight,
            label_smoothing=self.label_smoothing,
        )
        terms = {"ce": stats.cross_entropy}
        if ball is not None:
            terms["local"] = stats.local_kl / share if share < 1 else stats.local_kl
        if anchor is not None:
            terms["global"] = stats.global_kl
        return loss, terms, stats.correct_adv

    def _squared_loss(
        self, centre: _Centre, anchor: Tensor | None, y: Labels
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Return CE + lambda (f(a) - f(b))^2 + mu (f(anchor) - f(a))^2, terms and correct count.

        Both squares are means over the classes and the batch.
        """
        ball, share = _whole_batch(centre)
        loss, stats = kernels.local_ball_loss(
            centre.logits, y, label_smoothing=self.label_smoothing
        )
        terms = {"ce": stats.cross_entropy}
        if ball is not None:
            terms["local"] = (centre.logits - ball).square().mean() / share
            loss = loss + self.local_weight * terms["local"]
        if anchor is not None:
            terms["global"] = (anchor - centre.logits).square().mean()
            loss = loss + self.global_weight * terms["global"]
        return loss, terms, stats.correct_adv


def _whole_batch(centre: _Centre) -> tuple[Tensor | None, float]:
    """Return logits [B, K] of b for every sample, and the share of the samples that have a ball.

    For a sample without a ball b is a itself: its local term and both gradients of it are zero.
    """
    ball, logits = centre.ball, centre.logits
    if ball is None or len(ball) == len(logits):
        return ball, 1.0
    return torch.cat([ball, logits[len(ball) :]]), len(ball) / len(logits)
