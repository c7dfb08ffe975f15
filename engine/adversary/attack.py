"""The attack: its number of steps, their size and the starting point."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from ..kernels import Labels
from ..threat import Number, ThreatModel
from .ascent import climb, random_point, towards_errors


@dataclass(frozen=True)
class Attack:
    """Run projected gradient ascent on the cross-entropy: PGD (Madry et al., arXiv 1706.06083).

    Weak adversaries take one or two steps, strong ones ten (forty on MNIST).
    """

    steps: Annotated[
        int,
        Field(
            ge=0,
            description="gradient steps k [count]; 0: train at the remembered adversary itself, "
            "and move it along the gradient that training computes anyway",
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
            description="starting point: a random point of the ball, or the sample's last adversary"
        ),
    ] = "random"
    memory: Annotated[
        Literal["device", "host"],
        Field(
            description="with start = memory, where the last adversaries lie, a byte a pixel of "
            "the set: on the device, or in a file of the run folder, for sets too large for it"
        ),
    ] = "device"
    batch_norm: Annotated[
        Literal["eval", "batch"],
        Field(
            description="BatchNorm in attack passes: running statistics, or the batch's own; "
            "neither updates them"
        ),
    ] = "eval"

    def step_size(self, eps: float) -> float:
        """Return the step size for a ball of radius `eps`, both in pixel units.

        While eps grows, both are 0-d tensors.
        """
        if self.alpha is not None:
            return self.alpha
        if self.start == "memory":
            return 0.5 * eps
        return eps * {1: 1.25, 2: 0.75}.get(self.steps, 2.5 / self.steps)

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Labels,
        threat: ThreatModel,
        *,
        start: Tensor | None = None,
        state: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """Run the attack.

        Args:
            model: [0, 1] images to logits [B, K].
            x: float32 [B, ...] in [0, 1]; y: int64 [B], or mixed labels.
            start: the starting point, like `x`; default a uniform random point of the ball.
            state: int64 [2] random state (see `engine.rng`), read only.
        Returns:
            The adversaries, like `x`, and the logits at the start, [B, K], from the first step's
            forward pass (None without a step).
        """
        ball = threat.around(x)
        z = random_point(ball, state) if start is None else start
        if self.steps == 0:
            return z, None
        return climb(
            model,
            ball,
            z,
            towards_errors(y),
            steps=self.steps,
            alpha=self.step_size(threat.eps),
            batch_norm=self.batch_norm,
        )
