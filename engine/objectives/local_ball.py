"""The local-ball objective: robust on a ball centred on each weak adversary, the balls tied together.

Written to the abstract of Lu & Kumar, "Improving Local Effectiveness for Global robust training"
(arXiv 2110.14030). The paper's own formula is not public to us; this one is ours (docs/method.md):

    CE(f(a), y)  +  lambda KL(p(a) || p(b))  +  mu KL(p(x) || p(a))

a is the k-step adversary of x, b the worst point found by one ascent step in the ball of radius
rho * eps around a, p = softmax(f).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from .. import kernels, rng
from ..adversary.ascent import ascend_from_training, away_from, climb
from ..adversary.attack import Attack
from ..device.phases import ATTACK_START, LOSS, phase
from ..errors import EngineError
from ..threat import ThreatModel
from .base import (
    Objective,
    Outcome,
    Passes,
    attack_passes,
    attacked_pass,
    trained_pass,
    trained_passes,
)


@dataclass(frozen=True)
class LocalBall(Objective):
    """CE(f(a), y) + lambda KL(p(a) || p(b)) + mu KL(p(x) || p(a)), and its variants (docs/method.md)."""

    free_step: ClassVar[bool] = True

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
            description="share of a batch's samples that get a local ball, the term being the mean over "
            "them [(0..1]]",
        ),
    ] = 1.0
    direction: Annotated[
        Literal["kl", "ce", "gradient-norm"],
        Field(
            description="local term: b along the KL gradient at a random point of the ball; along the "
            "cross-entropy gradient at the centre (shares its forward pass); or no b and the "
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
    label_smoothing: Annotated[
        float, Field(ge=0, lt=1, description="label smoothing of the cross-entropy [0..1)")
    ] = 0.0

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
        cost = attack_passes(attack.steps) + trained_passes(1)
        if self.local_weight > 0:
            ball = trained_passes(1).of(self.local_share)
            if self.direction == "kl":
                cost += attack_passes(1).of(self.local_share) + ball
            elif self.direction == "ce":
                cost += Passes(0, 1, 0) + ball
            else:
                # The gradient itself, then a backward pass through it: about one more of each.
                cost += Passes(1, 2, 1)
        if self.global_weight > 0 and self.anchor == "clean":
            cost += trained_passes(1)
        return cost

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
        adversary, start_logits = attack(model, x, y, threat, start=start, state=state)
        local = self.local_weight > 0
        at_ball = slope = at_anchor = None
        keep: Tensor | Callable[[], Tensor] = adversary
        if local and self.direction == "gradient-norm":
            centre = adversary.detach().requires_grad_()
            at_centre = trained_pass(model, centre)
            slope = self._dual_norm(at_centre, centre, y, threat)
        elif local and self.direction == "ce":
            at_centre, along = ascend_from_training(model, adversary, y, threat.norm)
            radius = self.rho * threat.eps
            ball = along(adversary, radius, radius)[: self._balls(x)]
            at_ball = trained_pass(model, ball)
            if attack.steps == 0:
                keep = along(x, threat.eps, attack.step_size(threat.eps))
        elif local:
            at_centre, keep = attacked_pass(model, x, adversary, threat, attack)
            n = self._balls(x)
            ball = self._along_kl(model, adversary[:n], at_centre[:n], threat, state)
            at_ball = trained_pass(model, ball)
        else:
            at_centre, keep = attacked_pass(model, x, adversary, threat, attack)
        if self.global_weight > 0:
            at_anchor = trained_pass(model, x) if self.anchor == "clean" else start_logits

        share = 1.0
        if at_ball is not None and len(at_ball) < len(x):
            # A ball of no extent for the others: its term and both its gradients are exactly zero.
            share = len(at_ball) / len(x)
            at_ball = torch.cat([at_ball, at_centre[len(at_ball) :]])
        fused = self.distance == "kl"
        with phase(LOSS):
            loss, stats = kernels.local_ball_loss(
                at_centre,
                y,
                at_ball if fused else None,
                at_anchor if fused else None,
                lam=self.local_weight / share,
                mu=self.global_weight,
                label_smoothing=self.label_smoothing,
            )
        terms = {"ce": stats[0]}
        if at_ball is not None:
            terms["local"] = stats[1] / share if share < 1 else stats[1]
        if at_anchor is not None:
            terms["global"] = stats[2]
        if not fused and at_ball is not None:
            terms["local"] = (at_centre - at_ball).square().mean() / share
            loss = loss + self.local_weight * terms["local"]
        if not fused and at_anchor is not None:
            terms["global"] = (at_anchor - at_centre).square().mean()
            loss = loss + self.global_weight * terms["global"]
        if slope is not None:
            terms["local"] = slope
            loss = loss + self.local_weight * slope
        return Outcome(loss, keep, {k: v.detach() for k, v in terms.items()}, stats[3])

    def _balls(self, x: Tensor) -> int:
        """How many of the batch's samples get a local ball: the first, as batches are shuffled."""
        # Not one more for a product's last bit.
        return math.ceil(self.local_share * len(x) - 1e-9)

    def _along_kl(
        self,
        model: nn.Module,
        centre: Tensor,
        at_centre: Tensor,
        threat: ThreatModel,
        state: Tensor,
    ) -> Tensor:
        """b: one ascent step of length rho eps on KL(p(a) || p(b)) from a random point of the ball."""
        radius = self.rho * threat.eps
        with phase(ATTACK_START):
            near = kernels.uniform_start(centre, radius, state, norm=threat.norm, stream=rng.LOCAL)
        # The centre's logits come from a training-mode pass; b's must be comparable with them.
        ball, _ = climb(
            model,
            centre,
            near,
            away_from(at_centre.detach()),
            steps=1,
            eps=radius,
            alpha=radius,
            norm=threat.norm,
            batch_norm="batch" if model.training else "eval",
        )
        return ball

    def _dual_norm(
        self, at_centre: Tensor, centre: Tensor, y: Tensor, threat: ThreatModel
    ) -> Tensor:
        """rho eps ||grad CE||_dual, batch mean: by how much CE can grow in the local ball, to first order."""
        total = torch.nn.functional.cross_entropy(at_centre, y, reduction="sum")
        (grad,) = torch.autograd.grad(total, centre, create_graph=True)
        norm = grad.flatten(1).norm(p=1 if threat.norm == "Linf" else 2, dim=1)
        return self.rho * threat.eps * norm.mean()
