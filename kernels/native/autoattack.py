"""The steps of APGD and FAB on the CPU, in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .binding import native, rows, served


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
    if not served(x, z, last, grad):
        return reference.apgd_step(x, z, last, grad, step, eps, momentum, norm)
    out = torch.empty_like(x)
    native.apgd_step(
        *(t.data_ptr() for t in (x, z, last, grad, step, out)),
        *rows(x), eps.item(), momentum, norm == "L2",
    )  # fmt: skip
    return out


def fab_step(x: Tensor, z: Tensor, normal: Tensor, gap: Tensor, norm: str) -> Tensor:
    if not served(x, z, normal):
        return reference.fab_step(x, z, normal, gap, norm)
    out = torch.empty_like(x)
    native.fab_step(*(t.data_ptr() for t in (x, z, normal, gap, out)), *rows(x), norm == "L2")
    return out
