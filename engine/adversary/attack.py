"""Define the attack as a value: how many steps, how long, from where."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from .. import kernels, rng
from ..device.phases import (
    ATTACK_START,
    phase,
)
from ..threat import Number, ThreatModel
from .ascent import climb, towards_errors


@dataclass(frozen=True)
class Attack:
    """Projected gradient ascent on the cross-entropy (Madry et al., arXiv 1706.06083).

    Weak adversaries take one or two steps, strong ones ten (forty on MNIST).
    """

    steps: Annotated[
        int,
        Field(
            ge=0,
            description="gradient steps k [count]; 0: train at the remembered adversary itself, and move "
            "it along the gradient that training computes anyway",
        ),
    ] = 2
    alpha: Annotated[
        Annotated[Number, Field(gt=0)] | None,
        Field(
            description="step size [pixel units]; left out: 0.5 eps from memory, else 1.25 eps "
            "for one step, 0.75 eps for two, 2.5 eps / k for more"
        ),
    ] = None
    start: Annotated[
        Literal["random", "memory"],
        Field(
            description="where it starts: a random point of the ball, or the sample's last adversary"
        ),
    ] = "random"
    batch_norm: Annotated[
        Literal["eval", "batch"],
        Field(
            description="BatchNorm in attack passes: running statistics, or the batch's own; "
            "neither updates them"
        ),
    ] = "eval"

    def step_size(self, eps: float) -> float:
        """Step size in pixel units for a ball of radius `eps`; while that grows both are 0-d tensors."""
        if self.alpha is not None:
            return self.alpha
        if self.start == "memory":
            return 0.5 * eps
        return eps * {1: 1.25, 2: 0.75}.get(self.steps, 2.5 / self.steps)

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        threat: ThreatModel,
        *,
        start: Tensor | None = None,
        state: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the attack.

        Args:
            model: [0, 1] images to logits [B, K].
            x: float32 [B, ...] in [0, 1]; y: int64 [B].
            start: where to begin, like `x`; left out: a uniform random point of the ball.
            state: int64 [2] random state (see `engine.rng`), read only.
        Returns:
            The adversaries, like `x`, and the logits at the start, [B, K]: the first step's
            forward pass has computed them anyway (None without a step).
        """
        z = start
        if z is None:
            with phase(ATTACK_START):
                z = kernels.uniform_start(x, threat.eps, state, norm=threat.norm, stream=rng.START)
        if self.steps == 0:
            return z, None
        return climb(
            model,
            x,
            z,
            towards_errors(y),
            steps=self.steps,
            eps=threat.eps,
            alpha=self.step_size(threat.eps),
            norm=threat.norm,
            batch_norm=self.batch_norm,
        )
