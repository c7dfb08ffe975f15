"""FAB: steps along the linearised decision boundary that look for the nearest adversary.

Croce & Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack"
(arXiv 1907.02044), algorithm 1, targeted as in arXiv 2003.01690. Here an image is done when an
adversary inside the threat ball is found: a nearer one would not change the verdict.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...threat import ThreatModel
from .oracle import Attacked, Oracle, lengths, per_sample

# The paper's constants: the most that the clean image pulls, overshoot, and the way back.
_PULL, _OVERSHOOT, _BACK = 0.1, 1.05, 0.9
# Smaller slopes count as none: the point does not move along them.
_FLAT = {"Linf": 0.0, "L2": 1e-8}


@dataclass
class _State(Attacked):
    """Hold the images under attack: position in the batch, clean image, label, target, iterate."""

    image: Tensor
    clean: Tensor
    y: Tensor
    target: Tensor
    point: Tensor


def fab(
    oracle: Oracle, x: Tensor, y: Tensor, target: Tensor, threat: ThreatModel, *, steps: int
) -> tuple[Tensor, Tensor]:
    """Attack a batch towards one target class an image, from the clean images.

    Args:
        x: float32 [B, C, H, W] in [0, 1], classified rightly; y, target: int64 [B].
        steps: iterations, >= 1.
    Returns:
        Positions int64 [F] of the images that fell, and an adversary of each in its threat ball.
    """
    state = _State(torch.arange(len(x), device=x.device), x, y, target, x)
    fallen = [(state.image[:0], x[:0])]
    for _ in range(steps):
        if len(state.image) == 0:
            break
        state.point = _advance(oracle, state, threat)
        wrong = oracle.logits(state.point).argmax(1) != state.y
        broken = wrong & (lengths(state.point - state.clean, threat.norm) <= threat.eps)
        # An adversary too far away: the search goes on nearer to the clean image.
        back = state.clean + _BACK * (state.point - state.clean)
        if broken.any():
            fallen.append((state.image[broken], state.point[broken]))
        state.point = torch.where(per_sample(wrong, back), back, state.point)
        if broken.any():
            state.keep(~broken)
    images, adversaries = zip(*fallen, strict=True)
    return torch.cat(images), torch.cat(adversaries)


def _advance(oracle: Oracle, state: _State, threat: ThreatModel) -> Tensor:
    """Return the next iterate: past the linearised boundary, pulled towards the clean image."""
    labels = torch.stack([state.target, state.y], 1)

    def towards(logits: Tensor) -> Tensor:
        signs = torch.tensor([1.0, -1.0], dtype=logits.dtype, device=logits.device)
        return torch.zeros_like(logits).scatter_(1, labels, signs.expand(len(logits), 2))

    logits, normal = oracle.gradient(state.point, towards)
    at_target, at_label = logits.gather(1, labels).unbind(1)
    # On the boundary <normal, p - point> = -(z_target - z_label).
    gap = at_target - at_label
    between = (normal * (state.point - state.clean)).flatten(1).sum(1)
    both = project_onto_plane(
        torch.cat([state.point, state.clean]),
        torch.cat([normal, normal]),
        torch.cat([gap, gap - between]),
        threat.norm,
    )
    from_point, from_clean = both.chunk(2)
    near, far = lengths(both, threat.norm).clamp(min=1e-8).chunk(2)
    pull = per_sample((near / (near + far)).clamp(0.0, _PULL), state.point)
    ahead = state.point + _OVERSHOOT * from_point
    around = state.clean + _OVERSHOOT * from_clean
    return (ahead * (1 - pull) + around * pull).clamp(0.0, 1.0)


def project_onto_plane(x: Tensor, normal: Tensor, height: Tensor, norm: str) -> Tensor:
    """Return the shortest d with <normal, d> = -height and x + d in [0, 1] (section 2.2).

    Where the box does not reach the plane, x + d is the box's nearest point to it. Every coordinate
    moves by min(s b, room): b = 1 under Linf and |normal| under L2, room the way to the box's edge,
    and s solves sum |normal| min(s b, room) = |height|. The left side is concave and piecewise
    linear in s, so Newton's method from 0 reaches the solution from below, in finitely many steps
    and without the sort that the textbook solution needs.

    Args:
        x: [B, C, H, W] in [0, 1]; normal: like `x`; height: [B].
        norm: "Linf" or "L2".
    Returns:
        d, like `x`.
    """
    flat, slope = x.flatten(1), normal.flatten(1)
    direction = -slope * height.sign()[:, None]
    # A height of 0 has no direction: then d = 0.
    slope = slope.abs()
    slope = torch.where(slope > _FLAT[norm], slope, torch.zeros_like(slope))
    room = torch.where(direction > 0, 1 - flat, flat)
    speed = torch.ones_like(slope) if norm == "Linf" else slope
    goal = height.abs()
    reach = _newton(slope, speed, room, goal)
    moved = torch.minimum(reach[:, None] * speed, room)
    moved = torch.where(slope > 0, moved, torch.zeros_like(moved))
    return (direction.sign() * moved).view_as(x)


# Newton's steps; each leaves at least one more coordinate behind, and in practice halves the gap.
_MOST_STEPS = 50


def _newton(slope: Tensor, speed: Tensor, room: Tensor, goal: Tensor) -> Tensor:
    """Solve sum slope min(s speed, room) = goal for s >= 0 in each row; inf: no solution."""
    rate, reach = slope * speed, slope * room
    whole = reach.sum(1)
    s = goal / rate.sum(1)
    for _ in range(_MOST_STEPS):
        free = (s[:, None] * speed < room).to(slope.dtype)
        growth = torch.linalg.vecdot(rate, free)
        edge = whole - torch.linalg.vecdot(reach, free)
        # Rounding may turn the last step back; s never falls.
        following = torch.maximum((goal - edge) / growth, s)
        following = torch.where(growth > 0, following, torch.inf)
        if torch.equal(following, s):
            break
        s = following
    return s
