"""The stem ops in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .attack import attack_step


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
    grad = stem_input_grad(stem_grad, weight, x.shape[2], x.shape[3], stride, padding)
    if not x.is_contiguous():
        grad = grad.contiguous(memory_format=torch.channels_last)
    return attack_step(x, z, grad, eps, alpha, norm)


def stem_input_grad(
    stem_grad: Tensor, weight: Tensor, h: int, w: int, stride: int, padding: int
) -> Tensor:
    out_channels, _, kh, kw = weight.shape
    flat_grad = stem_grad.to(weight.dtype).flatten(2)
    # Compute the transposed convolution as matrix product and col2im. On CPUs, for images of 1 or 3
    # channels, this is several times faster than the library's convolution backward.
    columns = weight.reshape(out_channels, -1).t() @ flat_grad
    return torch.nn.functional.fold(columns, (h, w), (kh, kw), padding=padding, stride=stride)


def stem_weight_grad(
    x: Tensor, stem_grad: Tensor, kh: int, kw: int, stride: int, padding: int
) -> tuple[Tensor, Tensor]:
    out_channels = stem_grad.shape[1]
    weight = x.new_empty(out_channels, x.shape[1], kh, kw, dtype=stem_grad.dtype)
    _, weight_grad, bias_grad = torch.ops.aten.convolution_backward(
        stem_grad,
        x.to(stem_grad.dtype),
        weight,
        [out_channels],
        [stride, stride],
        [padding, padding],
        [1, 1],
        False,
        [0, 0],
        1,
        [False, True, True],
    )
    return weight_grad.contiguous(), bias_grad
