"""The answer of a judge of AutoAttack, whoever it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..work import Work

# One attack on one batch: from positions of images, int64 [B], to the members that fall, int64 [F],
# and an adversary of each.
Attack = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Verdict:
    """Hold what AutoAttack found.

    Attributes:
        robust: bool [N], True where the network withstood all attacks.
        adversaries: float32 [N, C, H, W], an adversary where this process found one, else the
            image.
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


def in_turn(
    attacks: Mapping[str, Attack], x: Tensor, right: Tensor, batch_size: int, work: Work
) -> Verdict:
    """Run one attack after the other, each on the images that are left.

    Args:
        x: float32 [N, C, H, W]; right: bool [N], the images that the network classifies rightly.
        batch_size: images in a batch.
    Returns:
        A verdict without notes.
    """
    robust, adversaries = right.clone(), x.clone()
    after: dict[str, float] = {}
    for name, attack in attacks.items():

        def judge(number: int, rows: Tensor, attack: Attack = attack) -> Tensor:
            fallen, found = attack(rows)
            adversaries[fallen] = found
            return fallen

        batches = robust.nonzero().flatten().split(batch_size)
        robust[work.fallen(name, batches, judge)] = False
        after[name] = float(robust.double().mean())
    return Verdict(robust, adversaries, after, [])
