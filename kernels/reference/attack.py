"""The attack ops in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .philox import RADIUS_STREAM, as_batch, as_rows, random_words, to_normal, to_uniform


def uniform_start(x: Tensor, eps: Tensor, rng: Tensor, norm: str, stream: int) -> Tensor:
    xr, eps = as_rows(x), eps.to(x.dtype)
    b, d = xr.shape
    words = random_words(rng, stream, b * d)
    if norm == "Linf":
        delta = (2.0 * to_uniform(words, x.dtype).view(b, d) - 1.0) * eps
    else:
        normal = to_normal(words, x.dtype).view(b, d)
        direction = normal / normal.norm(dim=1, keepdim=True).clamp_min(1e-12)
        radius = to_uniform(random_words(rng, stream + RADIUS_STREAM, b), x.dtype)
        # u^(1/D) makes the point uniform in the ball's volume, not in its radius.
        delta = direction * (radius ** (1.0 / max(d, 1)) * eps).view(b, 1)
    # Clipping moves every pixel towards x, so the point stays in the ball.
    return as_batch((xr + delta).clamp(0.0, 1.0), x)


def attack_step(
    x: Tensor, z: Tensor, grad: Tensor, eps: Tensor, alpha: Tensor, norm: str
) -> Tensor:
    xr, zr, gr = as_rows(x), as_rows(z), as_rows(grad).to(x.dtype)
    eps, alpha = eps.to(x.dtype), alpha.to(x.dtype)
    if norm == "Linf":
        # sign(NaN) counts as 0: one bad gradient value must not spread into the image.
        moved = zr + alpha * torch.sign(gr).nan_to_num(0.0)
        moved = torch.minimum(torch.maximum(moved, xr - eps), xr + eps)
    else:
        length = gr.norm(dim=1, keepdim=True)
        # A sample without a usable direction (zero, overflowed or NaN gradient) does not move.
        usable = (length > 0) & torch.isfinite(length)
        unit = torch.where(usable, gr, 0.0) / torch.where(usable, length, 1.0)
        delta = zr + alpha * unit - xr
        size = delta.norm(dim=1, keepdim=True)
        moved = xr + delta * torch.where(size > eps, eps / size.clamp_min(1e-30), 1.0)
    return as_batch(moved.clamp(0.0, 1.0), x)


def attack_step_(x: Tensor, z: Tensor, grad: Tensor, eps: Tensor, alpha: Tensor, norm: str) -> None:
    z.copy_(attack_step(x, z, grad, eps, alpha, norm))
