"""The attack ops on the CPU, in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .binding import DTYPES, address, native, rows, served


def uniform_start(x: Tensor, eps: Tensor, rng: Tensor, norm: str, stream: int) -> Tensor:
    if not served(x):
        return reference.uniform_start(x, eps, rng, norm, stream)
    out = torch.empty_like(x)
    seed, step = rng.tolist()
    native.uniform_start(
        x.data_ptr(), out.data_ptr(), *rows(x), seed, step, stream, eps.item(), norm == "L2"
    )
    return out


def attack_step(
    x: Tensor, z: Tensor, grad: Tensor, eps: Tensor, alpha: Tensor, norm: str
) -> Tensor:
    if not _step_served(x, z, grad):
        return reference.attack_step(x, z, grad, eps, alpha, norm)
    out = torch.empty_like(x)
    _step(x, z, grad, out, eps, alpha, norm)
    return out


def attack_step_(x: Tensor, z: Tensor, grad: Tensor, eps: Tensor, alpha: Tensor, norm: str) -> None:
    if _step_served(x, z, grad):
        _step(x, z, grad, z, eps, alpha, norm)
    else:
        reference.attack_step_(x, z, grad, eps, alpha, norm)


def _step_served(x: Tensor, z: Tensor, grad: Tensor) -> bool:
    return served(x, z, grad) and z.dtype is x.dtype and grad.dtype in DTYPES


def _step(
    x: Tensor, z: Tensor, grad: Tensor, out: Tensor, eps: Tensor, alpha: Tensor, norm: str
) -> None:
    native.attack_step(
        x.data_ptr(), z.data_ptr(), *address(grad), out.data_ptr(), *rows(x),
        eps.item(), alpha.item(), norm == "L2",
    )  # fmt: skip
