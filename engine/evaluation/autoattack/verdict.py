"""The answer of a judge of AutoAttack, whoever it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

# Called with (attack, batches done, batches).
Progress = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """Show no progress."""


@dataclass(frozen=True)
class Verdict:
    """Hold what AutoAttack found.

    Attributes:
        robust: bool [N], True where the network withstood all attacks.
        adversaries: float32 [N, C, H, W], an adversary where one was found, else the image.
        after: robust accuracy [0..1] after each attack, by the attack's name.
        notes: warnings of the judge's own checks.
        forward_images, gradient_images: images of all passes [count]; None where the judge does not
            count.
    """

    robust: Tensor
    adversaries: Tensor
    after: dict[str, float]
    notes: list[str]
    forward_images: int | None = None
    gradient_images: int | None = None
