"""The threat model: the perturbations that the network has to withstand."""

from __future__ import annotations

import copy
import dataclasses
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from .errors import EngineError

Norm = Literal["Linf", "L2"]
_ROUNDING = 1e-5
_ALIASES = {"linf": "Linf", "l_inf": "Linf", "l2": "L2", "l_2": "L2"}


def parse_number(value: object) -> object:
    """Return the number that a text such as `8/255` writes; return any other value unchanged.

    Raises:
        ValueError: for a text with one slash that is not a fraction of two numbers.
    """
    if isinstance(value, str) and value.count("/") == 1:
        over, under = value.split("/")
        try:
            return float(over) / float(under)
        except (ValueError, ZeroDivisionError) as error:
            raise ValueError(f"{value!r} is not a number") from error
    return value


def as_written(eps: float) -> str:
    """Write a radius or step size: 8/255 for whole grey levels, else a decimal number."""
    levels = eps * 255
    # Multiples of 51 grey levels are multiples of 0.2: write 0.2, not 51/255.
    if eps > 0 and abs(levels - round(levels)) < 1e-6 and round(levels) % 51:
        return f"{round(levels)}/255"
    return f"{eps:g}"


Number = Annotated[float, BeforeValidator(parse_number), Field(allow_inf_nan=False)]


@dataclasses.dataclass(frozen=True, eq=False)
class Ball:
    """Hold the points within `eps` of each image of a batch, intersected with the pixel box [0, 1].

    Attributes:
        centre: float32 [B, ...] in [0, 1].
        eps: radius in pixel units, >= 0; a 0-d float32 tensor on the device while it grows.
        norm: "Linf" or "L2".
    """

    centre: Tensor
    eps: float | Tensor
    norm: Norm


@dataclass(frozen=True)
class ThreatModel:
    """Describe the ball around each image, intersected with the pixel box [0, 1].

    Args:
        norm: "Linf" or "L2" (also "linf", "l_inf", "l2", "l_2").
        eps: radius in pixel units, >= 0; a number or text such as "8/255".
    Raises:
        pydantic.ValidationError (a ValueError): for an unknown norm or a negative radius.
        EngineError: for an Linf radius of more than a pixel's whole range.
    """

    norm: Annotated[
        Norm,
        BeforeValidator(lambda v: _ALIASES.get(str(v).lower(), v)),
        Field(description="Linf or L2"),
    ] = "Linf"
    eps: Annotated[
        Number, Field(ge=0, description="radius of the threat ball [pixel units, 0..1]")
    ] = 8 / 255

    def __post_init__(self) -> None:
        if self.norm == "Linf" and self.eps > 1:
            raise EngineError(
                f"threat.eps = {self.eps:g} is more than a pixel's whole range [0, 1]: "
                f'{self.eps:g}/255 is written "{self.eps:g}/255"'
            )

    def around(self, x: Tensor) -> Ball:
        """Return the ball around the images `x`, float32 [B, ...] in [0, 1]."""
        return Ball(x, self.eps, self.norm)

    def growing(self, radius: Tensor) -> ThreatModel:
        """Return the same threat with a 0-d float32 tensor as eps, which training may change."""
        grown = copy.copy(self)
        object.__setattr__(grown, "eps", radius)
        return grown

    def at_most(self, radius: float) -> float | Tensor:
        """Return the smaller of `radius` [pixel units] and eps."""
        eps: float | Tensor = self.eps
        # Do not read a tensor's value: the host would wait for the device.
        return eps.clamp(max=radius) if isinstance(eps, Tensor) else min(radius, eps)


def check_pixels(x: Tensor) -> None:
    """Refuse images outside the pixel box [0, 1], in which every threat ball lies.

    Waits for the device, once: for the first batch, not for every one.

    Args:
        x: images, any shape; float. Whole numbers, and the meta device, are not looked at.
    Raises:
        EngineError: for a value outside [0, 1], an infinite one or NaN.
    """
    if not x.is_floating_point() or x.is_meta or x.numel() == 0:
        return
    low, high = (float(t) for t in x.detach().float().aminmax())
    # NaN compares as false. A resized image may exceed the box by rounding.
    if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
        raise EngineError(
            f"images must be finite and in [0, 1], got values from {low:.4g} to {high:.4g}: divide "
            "bytes by 255, and put the normalisation inside the model"
        )


def check_threat(threat: object) -> None:
    """Raise an EngineError for anything but a threat model."""
    if not isinstance(threat, ThreatModel):
        raise EngineError(
            f"the threat must be engine.Linf(eps) or engine.L2(eps), got {type(threat).__name__}"
        )


def Linf(eps: float | str) -> ThreatModel:
    """Return the Linf threat of radius `eps` >= 0 [pixel units]; errors as for `ThreatModel`."""
    return ThreatModel(norm="Linf", eps=eps)  # type: ignore[arg-type]


def L2(eps: float | str) -> ThreatModel:
    """Return the L2 threat of radius `eps` >= 0 [pixel units]; errors as for `ThreatModel`."""
    return ThreatModel(norm="L2", eps=eps)  # type: ignore[arg-type]
