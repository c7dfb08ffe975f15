"""The data ops in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .attack import attack_step
from .philox import random_words


def augment(
    images: Tensor,
    index: Tensor,
    rng: Tensor,
    pad: int,
    flip: bool,
    cutout: int,
    stream: int,
    memory: Tensor | None,
    eps: Tensor | None,
    norm: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_range(index, images)
    h, w = images.shape[2:]
    drawn = draw_crops(rng, index.shape[0], pad, flip, stream, h, w)
    crops = drawn[:, :3].contiguous()
    x = crop(images, index, crops).to(torch.float32) / 255.0
    if cutout:
        rows = torch.arange(h, device=x.device) - (drawn[:, 3, None] - cutout // 2)
        columns = torch.arange(w, device=x.device) - (drawn[:, 4, None] - cutout // 2)
        inside_y, inside_x = (rows >= 0) & (rows < cutout), (columns >= 0) & (columns < cutout)
        x = x.masked_fill((inside_y[:, :, None] & inside_x[:, None, :])[:, None], 0.0)
    if memory is None or eps is None:
        return x, crops, x.new_empty(0)
    return x, crops, recall(memory, index, crops, x, eps, norm)


def draw_crops(rng: Tensor, b: int, pad: int, flip: bool, stream: int, h: int, w: int) -> Tensor:
    """Draw int32 [B, 5]: (dy, dx, mirrored) of every crop, and the centre (y, x) of its cutout."""
    words = random_words(rng, stream, 4 * b).view(b, 4)
    side = 2 * pad + 1
    # word * side / 2^32 by a multiply and a shift: the same integer in every backend.
    dy = ((words[:, 0] * side) >> 32) - pad
    dx = ((words[:, 1] * side) >> 32) - pad
    mirrored = (words[:, 2] >> 31) if flip else torch.zeros_like(dy)
    y, x = ((words[:, 3] & 0xFFFF) * h) >> 16, ((words[:, 3] >> 16) * w) >> 16
    return torch.stack([dy, dx, mirrored, y, x], dim=1).to(torch.int32)


def _check_range(index: Tensor, of: Tensor) -> None:
    """Check a CPU index only: the host would wait for an index on a device."""
    if (
        index.device.type == "cpu"
        and index.numel()
        and not 0 <= index.min() <= index.max() < len(of)
    ):
        raise IndexError(f"index must lie in [0, {len(of)})")


def crop(images: Tensor, index: Tensor, crops: Tensor) -> Tensor:
    """Return images[index] shifted by (dy, dx) with zeros outside the image, then mirrored.

    Without the mirror, out[y, x] = in[y + dy, x + dx].
    """
    _, channels, h, w = images.shape
    source, inside = source_pixels(crops, h, w)
    picked = images[index].flatten(2)
    picked = picked.gather(2, source[:, None].expand(-1, channels, -1))
    return torch.where(inside[:, None], picked, 0).view(-1, channels, h, w)


def source_pixels(crops: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
    """Return every output pixel's flat source pixel int64 [B, H*W], and a mask of those inside."""
    crops = crops.long()
    dy, dx, mirrored = crops[:, 0, None, None], crops[:, 1, None, None], crops[:, 2, None, None]
    y = torch.arange(h, device=crops.device)[None, :, None] + dy
    column = torch.arange(w, device=crops.device)[None, None, :]
    x = torch.where(mirrored > 0, w - 1 - column, column) + dx
    inside = (y >= 0) & (y < h) & (x >= 0) & (x < w)
    source = y.clamp(0, h - 1) * w + x.clamp(0, w - 1)
    return source.flatten(1), inside.flatten(1)


def recall(
    memory: Tensor, index: Tensor, crops: Tensor, x: Tensor, eps: Tensor, norm: str
) -> Tensor:
    quantum = eps.to(x.dtype) / 127.0
    _check_range(index, memory)
    delta = crop(memory, index, crops).to(x.dtype) * quantum
    start = x + delta
    # Rounding to int8 steps can leave the L2 ball; a zero step projects back.
    return attack_step(x, start, torch.zeros_like(x), eps, eps, norm)


def remember(
    memory: Tensor, index: Tensor, crops: Tensor, x: Tensor, z: Tensor, eps: Tensor
) -> None:
    # With eps = 0 the perturbation is 0, and so is the stored one.
    steps = (z - x) * (127.0 / eps.to(x.dtype).clamp_min(1e-12))
    steps = steps.round().clamp(-127, 127).to(torch.int8)
    dy, dx, mirrored = crops.unbind(1)
    back = torch.stack([-dy, torch.where(mirrored > 0, dx, -dx), mirrored], dim=1)
    _, inside = source_pixels(back, *memory.shape[2:])
    _check_range(index, memory)
    everything = torch.arange(len(index), device=index.device)
    moved_back = crop(steps, everything, back)
    inside = inside.view(-1, 1, *memory.shape[2:])
    # Pixels outside the crop keep their stored values.
    memory[index] = torch.where(inside, moved_back, memory[index])
