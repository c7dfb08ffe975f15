"""Learning rates and radii over a run."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

Fraction = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Schedule:
    """Give the learning rate and the radius of every step of a run.

    The rate is one-cycle (linear warm-up, then a cosine to 0) or piecewise constant. The radius may
    grow at first.
    """

    name: Annotated[
        Literal["one-cycle", "piecewise"],
        Field(description="shape of the learning rate over a run"),
    ] = "one-cycle"
    warmup: Annotated[
        float, Field(ge=0, lt=1, description="one-cycle: share of the run spent warming up [0..1)")
    ] = 0.2
    milestones: Annotated[
        tuple[Fraction, ...],
        Field(
            description="piecewise: points of the run where the rate drops [fractions of the run]"
        ),
    ] = (0.5, 0.75)
    factor: Annotated[
        float, Field(gt=0, le=1, description="piecewise: what a drop multiplies the rate by")
    ] = 0.1
    eps_warmup: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="share of the run over which training's eps grows, linearly, to threat.eps "
            "[0..1)",
        ),
    ] = 0.0

    def at(self, step: int, total: int) -> float:
        """Return the share of the peak learning rate at `step` (from 0) of `total`."""
        progress = step / max(total, 1)
        if self.name == "piecewise":
            return self.factor ** sum(progress >= m for m in self.milestones)
        if progress < self.warmup:
            # With (step + 1) the first step has a rate above zero.
            return min((step + 1) / (self.warmup * total), 1.0)
        return 0.5 * (1.0 + math.cos(math.pi * (progress - self.warmup) / (1.0 - self.warmup)))

    def rates(self, peak: float, total: int) -> list[float]:
        """Return the learning rate of each of `total` steps."""
        return [peak * self.at(step, total) for step in range(total)]

    def radii(self, eps: float, total: int) -> list[float] | None:
        """Return the radius [pixel units] of each of `total` steps; None: `eps` for all of them."""
        growing = self.eps_warmup * total
        # As in `at`, the first step has a radius above zero.
        return [eps * min((step + 1) / growing, 1.0) for step in range(total)] if growing else None
