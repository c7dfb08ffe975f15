"""The attack ops on the CPU, in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..layout import transposed_rows
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
    if not served(x, z, grad) or z.dtype is not x.dtype or grad.dtype not in DTYPES:
        return reference.attack_step(x, z, grad, eps, alpha, norm)
    out = torch.empty_like(x)
    native.attack_step(
        x.data_ptr(),
        z.data_ptr(),
        *address(grad),
        out.data_ptr(),
        *rows(x),
        eps.item(),
        alpha.item(),
        norm == "L2",
        0,
        0,
        1,
    )
    return out


def attack_step_(
    x: Tensor,
    z: Tensor,
    grad: Tensor,
    eps: Tensor,
    alpha: Tensor,
    norm: str,
    network_input: Tensor | None,
) -> None:
    if (
        not served(x, z, grad)
        or z.dtype is not x.dtype
        or grad.dtype not in DTYPES
        or (network_input is not None and network_input.dtype not in DTYPES)
    ):
        return reference.attack_step_(x, z, grad, eps, alpha, norm, network_input)
    native.attack_step(
        x.data_ptr(),
        z.data_ptr(),
        *address(grad),
        z.data_ptr(),
        *rows(x),
        eps.item(),
        alpha.item(),
        norm == "L2",
        *address(network_input),
        1 if network_input is None else transposed_rows(z, network_input),
    )
    return None
