"""AutoAttack: APGD on two losses, FAB and Square, one after the other on the images that are left.

Croce & Hein (arXiv 2003.01690), the standard version. From one seed it draws the random numbers
that the authors' package draws on the CPU, so both attack along the same iterates up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ...threat import ThreatModel
from .apgd import apgd
from .fab import fab
from .losses import CrossEntropy, LogitDifference, Loss, TargetedDLR
from .oracle import Oracle
from .square import square
from .square_l2 import square_l2
from .verdict import Progress, Verdict, silent

STEPS, TARGETS, QUERIES = 100, 9, 5000
# One attack on one batch: from images and labels to the positions that fell, and adversaries.
_Attack = Callable[[Tensor, Tensor, torch.Generator], tuple[Tensor, Tensor]]


def run(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    version: str = "standard",
    seed: int = 0,
    batch_size: int = 500,
    progress: Progress = silent,
) -> Verdict:
    """Attack images with all attacks of a version.

    Args:
        model: in evaluation mode, [0, 1] images to logits [B, K], K >= 2. With two or three classes
            APGD climbs the logit difference in place of the targeted DLR loss, which needs four.
        x: float32 [N, C, H, W] in [0, 1]; y: int64 [N].
        version: "standard" (four attacks), or "apgd" for the first two, APGD on the cross-entropy
            with five restarts.
        seed: of every batch of every attack.
        batch_size: images in memory at once.
        progress: called with (attack, batches done, batches).
    """
    oracle = Oracle(model, x[:batch_size])
    batched = zip(x.split(batch_size), y.split(batch_size), strict=True)
    robust = ~torch.cat([oracle.is_wrong(*batch) for batch in batched])
    adversaries = x.clone()
    classes = oracle.logits(x[:1]).shape[1]
    after: dict[str, float] = {}
    for name, attack in _attacks(oracle, threat, classes, version, batch_size).items():
        batches = robust.nonzero().flatten().split(batch_size)
        for number, rows in enumerate(batches):
            progress(name, number, len(batches))
            if len(rows) == 0:
                continue
            draw = torch.Generator().manual_seed(seed)
            fallen, found = attack(x[rows], y[rows], draw)
            # The verdict is the network's own, on the adversary as it would be published.
            wrong = oracle.is_wrong(found, y[rows[fallen]])
            robust[rows[fallen[wrong]]] = False
            adversaries[rows[fallen[wrong]]] = found[wrong]
        progress(name, len(batches), len(batches))
        after[name] = float(robust.double().mean())
    return Verdict(
        robust,
        adversaries,
        after,
        _notes(after),
        oracle.forward_images,
        oracle.gradient_images,
    )


def _notes(after: dict[str, float]) -> list[str]:
    """Warn as the authors' package does: where Square alone takes more than 0.2 points."""
    *by_gradient, last = after
    taken = after[by_gradient[-1]] - after[last]
    if last != "square" or taken <= 0.002:
        return []
    return [
        f"Square lowered the robust accuracy by {taken:.2%}: gradients may be masked, and "
        "AutoAttack may overstate the robust accuracy"
    ]


def _attacks(
    oracle: Oracle, threat: ThreatModel, classes: int, version: str, batch_size: int
) -> dict[str, _Attack]:
    """Return the attacks of a version by name, in their order."""
    targets = min(TARGETS, classes - 1)
    restarts = 5 if version == "apgd" else 1

    def apgd_ce(x: Tensor, y: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        return _repeat(x, y, range(restarts), lambda x, y, _: climb(x, CrossEntropy(y), draw))

    def apgd_difference(x: Tensor, y: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        return climb(x, LogitDifference(y), draw)

    def apgd_t(x: Tensor, y: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        def once(x: Tensor, y: Tensor, rank: int) -> tuple[Tensor, Tensor]:
            return climb(x, TargetedDLR(y, _ranked(oracle, x, rank)), draw)

        return _repeat(x, y, range(2, targets + 2), once)

    def fab_t(x: Tensor, y: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        def once(x: Tensor, y: Tensor, rank: int) -> tuple[Tensor, Tensor]:
            return fab(oracle, x, y, _ranked(oracle, x, rank), threat, steps=STEPS)

        return _repeat(x, y, range(2, targets + 2), once)

    def random_search(x: Tensor, y: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        if threat.norm == "L2":
            return square_l2(oracle, x, y, threat, queries=QUERIES, draw=draw)
        return square(oracle, x, y, threat, queries=QUERIES, rows=batch_size, draw=draw)

    def climb(x: Tensor, loss: Loss, draw: torch.Generator) -> tuple[Tensor, Tensor]:
        return apgd(oracle, x, loss, threat, steps=STEPS, draw=draw)

    found: dict[str, _Attack] = {"apgd-ce": apgd_ce}
    found |= {"apgd-t": apgd_t} if classes >= 4 else {"apgd-difference": apgd_difference}
    if version == "standard":
        found |= {"fab-t": fab_t, "square": random_search}
    return found


def _ranked(oracle: Oracle, x: Tensor, rank: int) -> Tensor:
    """Return the class with the `rank`-th largest logit of each image, int64 [B]."""
    return oracle.logits(x).sort(dim=1)[1][:, -rank]


def _repeat(
    x: Tensor,
    y: Tensor,
    tries: range,
    once: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Try an attack several times, each time on the images that are left."""
    left = torch.arange(len(x), device=x.device)
    fallen = [(left[:0], x[:0])]
    for number in tries:
        if len(left) == 0:
            break
        rows, found = once(x[left], y[left], number)
        fallen.append((left[rows], found))
        stays = torch.ones(len(left), dtype=torch.bool, device=x.device)
        stays[rows] = False
        left = left[stays]
    images, adversaries = zip(*fallen, strict=True)
    return torch.cat(images), torch.cat(adversaries)
