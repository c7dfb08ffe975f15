"""The steps of APGD and FAB in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .philox import as_batch, as_rows

# FAB's constants: the most that the clean image pulls, and the overshoot.
_PULL, _OVERSHOOT = 0.1, 1.05
# Smaller slopes count as none: the point does not move along them.
FLAT = {"Linf": 0.0, "L2": 1e-8}
# Newton's steps; each leaves at least one more coordinate behind, and in practice halves the gap.
NEWTON_STEPS = 50


def apgd_step(
    x: Tensor,
    z: Tensor,
    last: Tensor,
    grad: Tensor,
    step: Tensor,
    eps: Tensor,
    momentum: float,
    norm: str,
) -> Tensor:
    xr, zr, before, gr = as_rows(x), as_rows(z), as_rows(last), as_rows(grad)
    eps, length = eps.to(x.dtype), step[:, None]
    if norm == "Linf":
        low, high = (xr - eps).clamp(min=0.0), (xr + eps).clamp(max=1.0)
        ahead = (zr + length * gr.sign().nan_to_num(0.0)).clamp(low, high)
    else:
        size = gr.norm(dim=1, keepdim=True) + 1e-12
        usable = torch.isfinite(size)
        unit = torch.where(usable, gr, 0.0) / torch.where(usable, size, 1.0)
        ahead = _into_l2_ball(xr, zr + length * unit, eps)
    ahead = zr + momentum * (ahead - zr) + (1 - momentum) * (zr - before)
    ahead = ahead.clamp(low, high) if norm == "Linf" else _into_l2_ball(xr, ahead, eps)
    return as_batch(ahead, x)


def _into_l2_ball(x: Tensor, point: Tensor, eps: Tensor) -> Tensor:
    delta = point - x
    size = delta.norm(dim=1, keepdim=True)
    return (x + size.clamp(max=eps) / (size + 1e-12) * delta).clamp(0.0, 1.0)


def fab_step(x: Tensor, z: Tensor, normal: Tensor, gap: Tensor, norm: str) -> Tensor:
    xr, zr, slopes = as_rows(x), as_rows(z), as_rows(normal)
    between = (slopes.nan_to_num(0.0, 0.0, 0.0) * (zr - xr)).sum(1)
    from_point = project_onto_plane(zr, slopes, gap, norm)
    from_clean = project_onto_plane(xr, slopes, gap - between, norm)
    near, far = (_size(d, norm).clamp(min=1e-8) for d in (from_point, from_clean))
    pull = (near / (near + far)).clamp(0.0, _PULL)
    ahead, around = zr + _OVERSHOOT * from_point, xr + _OVERSHOOT * from_clean
    return as_batch((ahead * (1 - pull) + around * pull).clamp(0.0, 1.0), x)


def _size(delta: Tensor, norm: str) -> Tensor:
    return delta.abs().amax(1, keepdim=True) if norm == "Linf" else delta.norm(dim=1, keepdim=True)


def project_onto_plane(x: Tensor, normal: Tensor, height: Tensor, norm: str) -> Tensor:
    """Return the shortest d with <normal, d> = -height and x + d in [0, 1] (section 2.2 of FAB).

    Where the box does not reach the plane, x + d is the box's nearest point to it. Every coordinate
    moves by min(s b, room): b = 1 under Linf and |normal| under L2, room the way to the box's edge,
    and s solves sum |normal| min(s b, room) = |height|. The left side is concave and piecewise
    linear in s, so Newton's method from 0 reaches the solution from below, in finitely many steps
    and without the sort that the textbook solution needs.

    Args:
        x: [B, D] in [0, 1]; normal: like `x`; height: [B].
    Returns:
        d, like `x`.
    """
    # A height of 0 has no direction: then d = 0.
    direction = -normal * height.sign()[:, None]
    slope = normal.abs()
    slope = torch.where((slope > FLAT[norm]) & torch.isfinite(slope), slope, 0.0)
    room = torch.where(direction > 0, 1 - x, x)
    speed = torch.ones_like(slope) if norm == "Linf" else slope
    reach = _newton(slope, speed, room, height.abs())
    moved = torch.minimum(reach[:, None] * speed, room)
    return torch.where(slope > 0, direction.sign() * moved, 0.0)


def _newton(slope: Tensor, speed: Tensor, room: Tensor, goal: Tensor) -> Tensor:
    """Solve sum slope min(s speed, room) = goal for s >= 0 in each row; inf: no solution."""
    rate, reach = slope * speed, slope * room
    whole = reach.sum(1)
    s = goal / rate.sum(1)
    for _ in range(NEWTON_STEPS):
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
