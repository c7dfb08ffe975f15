"""Write the ops in plain PyTorch by hand: the op benchmark's opponents."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.kernels import reference

EPS, ALPHA = 0.1, 0.05


def start(x: Tensor, eps: float) -> Tensor:
    return (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0.0, 1.0)


def step(x: Tensor, z: Tensor, grad: Tensor, eps: float, alpha: float) -> Tensor:
    z = z + alpha * grad.sign()
    return torch.minimum(torch.maximum(z, x - eps), x + eps).clamp(0.0, 1.0)


def input_grad(x: Tensor, gy: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    return torch.ops.aten.convolution_backward(
        gy,
        x,
        weight,
        None,
        [stride, stride],
        [padding, padding],
        [1, 1],
        False,
        [0, 0],
        1,
        [True, False, False],
    )[0]


def input_grad_step(
    x: Tensor, z: Tensor, gy: Tensor, weight: Tensor, stride: int, padding: int
) -> Tensor:
    return step(x, z, input_grad(z, gy, weight, stride, padding), eps=EPS, alpha=ALPHA)


def augment(images: Tensor, index: Tensor, pad: int) -> Tensor:
    b, (_, c, h, w), device = len(index), images.shape, index.device
    padded = torch.nn.functional.pad(images[index], [pad] * 4)
    dy = torch.randint(0, 2 * pad + 1, (b, 1, 1), device=device)
    dx = torch.randint(0, 2 * pad + 1, (b, 1, 1), device=device)
    flip = torch.rand(b, 1, 1, device=device) < 0.5
    rows = torch.arange(h, device=device)[None, :, None] + dy
    columns = torch.arange(w, device=device)[None, None, :]
    columns = torch.where(flip, w - 1 - columns, columns) + dx
    sample = torch.arange(b, device=device)[:, None, None, None]
    channel = torch.arange(c, device=device)[None, :, None, None]
    return padded[sample, channel, rows[:, None], columns[:, None]].float() / 255.0


def augment_with_start(
    images: Tensor,
    index: Tensor,
    pad: int,
    memory: Tensor,
    crops: Tensor,
    x: Tensor,
    eps: Tensor,
) -> tuple[Tensor, Tensor]:
    made = augment(images, index, pad)
    return made, reference.recall(memory, index, crops, x, eps, "Linf")


def restore_weights(params: list[Tensor], copies: list[Tensor]) -> None:
    for p, copy in zip(params, copies, strict=True):
        p.copy_(copy)
