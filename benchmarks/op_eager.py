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


def _inside(x: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Return the pixels of a box of each image at a random place, bool [B, 1, H, W]."""
    b, _, h, w = x.shape
    rows = torch.arange(h, device=x.device)[None, :, None] - torch.randint(
        h, (b, 1, 1), device=x.device
    )
    columns = torch.arange(w, device=x.device)[None, None, :] - torch.randint(
        w, (b, 1, 1), device=x.device
    )
    return ((rows.abs() <= height / 2) & (columns.abs() <= width / 2))[:, None]


def cutmix(images: Tensor, index: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    x = augment(images, index, pad)
    side = torch.rand(len(x), 1, 1, device=x.device).sqrt()
    inside = _inside(x, side * x.shape[2], side * x.shape[3])
    return torch.where(inside, x.roll(-1, 0), x), 1.0 - inside.float().mean(dim=(1, 2, 3))


def erase(images: Tensor, index: Tensor, pad: int, share: float) -> Tensor:
    x = augment(images, index, pad)
    height, width, drawn = torch.rand(3, len(x), 1, 1, device=x.device)
    inside = _inside(x, height * x.shape[2] / 2, width * x.shape[3] / 2)
    return x.masked_fill(inside & (drawn < share)[:, None], 0.0)


def jitter(images: Tensor, index: Tensor, pad: int, most: float) -> Tensor:
    x = augment(images, index, pad)
    light, contrast, colour = 1.0 + most * (
        2.0 * torch.rand(3, len(x), 1, 1, 1, device=x.device) - 1.0
    )
    x = ((light * x).clamp(0.0, 1.0) - 0.5) * contrast + 0.5
    x = x.clamp(0.0, 1.0)
    red, green, blue = x.split(1, dim=1)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    return (grey + colour * (x - grey)).clamp(0.0, 1.0)


def restore_weights(params: list[Tensor], copies: list[Tensor]) -> None:
    for p, copy in zip(params, copies, strict=True):
        p.copy_(copy)
