"""FAB: steps along the linearised decision boundary that look for the nearest adversary.

Croce & Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack"
(arXiv 1907.02044), algorithm 1, targeted as in arXiv 2003.01690. Here an image is done when an
adversary inside the threat ball is found: a nearer one would not change the verdict.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ... import kernels
from ...threat import ThreatModel
from .oracle import Attacked, Oracle, lengths, per_sample

# The paper's constant: the way back to the clean image from an adversary too far away.
_BACK = 0.9


@dataclass
class _State(Attacked):
    """Hold the walks: the image's position in the batch, clean image, label, target, iterate."""

    image: Tensor
    clean: Tensor
    y: Tensor
    target: Tensor
    point: Tensor


def fab(
    oracle: Oracle, x: Tensor, y: Tensor, targets: Tensor, threat: ThreatModel, *, steps: int
) -> tuple[Tensor, Tensor]:
    """Attack a batch from the clean images, each image towards T target classes at once.

    No walk depends on another, and the attack draws no random numbers. So the walks towards all
    targets share their passes. When one of them ends in an adversary, the image is done.

    Args:
        x: float32 [B, C, H, W] in [0, 1], classified rightly; y: int64 [B].
        targets: int64 [B, T], T >= 1.
        steps: iterations, >= 1.
    Returns:
        Positions int64 [F] of the images that fell, and an adversary of each in its threat ball.
    """
    image = torch.arange(len(x), device=x.device).repeat_interleave(targets.shape[1])
    state = _State(image, x[image], y[image], targets.flatten(), x[image])
    fallen = [(image[:0], x[:0])]
    for _ in range(steps):
        if len(state.image) == 0:
            break
        state.point = _advance(oracle, state, threat)
        wrong = oracle.logits(state.point).argmax(1) != state.y
        broken = wrong & (lengths(state.point - state.clean, threat.norm) <= threat.eps)
        # An adversary too far away: the search goes on nearer to the clean image.
        back = state.clean + _BACK * (state.point - state.clean)
        if broken.any():
            fallen.append(_one_each(state.image[broken], state.point[broken]))
        state.point = torch.where(per_sample(wrong, back), back, state.point)
        if broken.any():
            state.keep(~torch.isin(state.image, fallen[-1][0]))
    images, adversaries = zip(*fallen, strict=True)
    return torch.cat(images), torch.cat(adversaries)


def _one_each(images: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
    """Return each image once, with the first of its points; `images` [N] is sorted."""
    once, counts = images.unique_consecutive(return_counts=True)
    return once, points[counts.cumsum(0) - counts]


def _advance(oracle: Oracle, state: _State, threat: ThreatModel) -> Tensor:
    """Return the next iterate: past the linearised boundary, pulled towards the clean image."""
    labels = torch.stack([state.target, state.y], 1)

    def towards(logits: Tensor) -> Tensor:
        signs = torch.tensor([1.0, -1.0], dtype=logits.dtype, device=logits.device)
        return torch.zeros_like(logits).scatter_(1, labels, signs.expand(len(logits), 2))

    logits, normal = oracle.gradient(state.point, towards)
    at_target, at_label = logits.gather(1, labels).unbind(1)
    gap = at_target - at_label
    return kernels.fab_step(state.clean, state.point, normal, gap, norm=threat.norm)
