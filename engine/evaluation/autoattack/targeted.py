"""APGD towards one target class after the other, with passes that several targets share."""

from __future__ import annotations

import torch
from torch import Tensor

from ...threat import ThreatModel
from .apgd import apgd, random_start
from .losses import TargetedDLR
from .oracle import Oracle


def apgd_targeted(
    oracle: Oracle,
    x: Tensor,
    y: Tensor,
    targets: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    rows: int,
    draw: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Attack a batch towards T target classes in turn; an image leaves the batch when it falls.

    The random starts depend on how many images are left, so the turns have an order. While no image
    falls, each round takes twice as many turns as the round before, in the same passes. Once an
    image falls, the later turns of that round are taken again, from the starts that they then have.
    So the points are those of one turn after the other, up to rounding.

    Args:
        x: float32 [B, C, H, W] in [0, 1], classified rightly; y: int64 [B]; targets: int64 [B, T].
        steps: gradient steps of a turn, >= 1; rows: images in a pass, at most about this many.
        draw: a CPU generator.
    Returns:
        Positions int64 [F] of the images that fell, and an adversary of each, [F, C, H, W].
    """
    left = torch.arange(len(x), device=x.device)
    fallen = [(left[:0], x[:0])]
    turn, width = 0, 1
    while turn < targets.shape[1] and len(left) > 0:
        width = max(1, min(width, targets.shape[1] - turn, rows // len(left)))
        starts, states = [], []
        for _ in range(width):
            starts.append(random_start(x[left], threat, draw))
            states.append(draw.get_state())
        images = left.repeat(width)
        loss = TargetedDLR(y[images], targets[left, turn : turn + width].T.flatten())
        places, found = apgd(oracle, x[images], torch.cat(starts), loss, threat, steps=steps)
        if len(places) == 0:
            turn, width = turn + width, 2 * width
            continue
        turns = places // len(left)
        first = int(turns.min())
        fell = images[places[turns == first]]
        fallen.append((fell, found[turns == first]))
        draw.set_state(states[first])
        left = left[~torch.isin(left, fell)]
        turn, width = turn + first + 1, 1
    positions, adversaries = zip(*fallen, strict=True)
    return torch.cat(positions), torch.cat(adversaries)
