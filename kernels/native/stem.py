"""The stem ops on the CPU, in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .binding import DTYPES, address, is_channels_last, native, served


def input_grad_step(
    x: Tensor,
    z: Tensor,
    stem_grad: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    eps: Tensor,
    alpha: Tensor,
    norm: str,
) -> Tensor:
    if (
        not served(x, z)
        or z.dtype is not x.dtype
        or stem_grad.dtype not in DTYPES
        or weight.dtype not in DTYPES
    ):
        return reference.input_grad_step(x, z, stem_grad, weight, stride, padding, eps, alpha, norm)
    if not (stem_grad.is_contiguous() or is_channels_last(stem_grad)):
        stem_grad = stem_grad.contiguous()
    weight = weight.float().contiguous()
    out = torch.empty_like(x)
    native.input_grad_step(
        x.data_ptr(),
        z.data_ptr(),
        *address(stem_grad),
        not stem_grad.is_contiguous(),
        weight.data_ptr(),
        [*x.shape[1:], *stem_grad.shape[1:], *weight.shape[2:], stride, padding],
        out.data_ptr(),
        x.shape[0],
        not x.is_contiguous(),
        eps.item(),
        alpha.item(),
        norm == "L2",
    )
    return out


def stem_input_grad(
    stem_grad: Tensor, weight: Tensor, h: int, w: int, stride: int, padding: int
) -> Tensor:
    if (
        stem_grad.dtype not in DTYPES
        or weight.dtype is not torch.float32
        or stem_grad.shape[0] == 0
    ):
        return reference.stem_input_grad(stem_grad, weight, h, w, stride, padding)
    if not (stem_grad.is_contiguous() or is_channels_last(stem_grad)):
        stem_grad = stem_grad.contiguous()
    weight = weight.contiguous()
    out = weight.new_empty(stem_grad.shape[0], weight.shape[1], h, w)
    native.stem_input_grad(
        *address(stem_grad),
        not stem_grad.is_contiguous(),
        weight.data_ptr(),
        [*out.shape[1:], *stem_grad.shape[1:], *weight.shape[2:], stride, padding],
        out.shape[0],
        out.data_ptr(),
    )
    return out


def stem_weight_grad(
    x: Tensor, stem_grad: Tensor, kh: int, kw: int, stride: int, padding: int
) -> tuple[Tensor, Tensor]:
    if x.dtype is not torch.float32 or stem_grad.dtype is not torch.float32 or x.shape[0] == 0:
        return reference.stem_weight_grad(x, stem_grad, kh, kw, stride, padding)
    if not (stem_grad.is_contiguous() or is_channels_last(stem_grad)):
        stem_grad = stem_grad.contiguous()
    x = x.contiguous()
    weight_grad = x.new_empty(stem_grad.shape[1], x.shape[1], kh, kw)
    bias_grad = x.new_empty(stem_grad.shape[1])
    native.stem_weight_grad(
        x.data_ptr(),
        stem_grad.data_ptr(),
        not stem_grad.is_contiguous(),
        [*x.shape[1:], *stem_grad.shape[1:], kh, kw, stride, padding],
        x.shape[0],
        weight_grad.data_ptr(),
        bias_grad.data_ptr(),
    )
    return weight_grad, bias_grad
