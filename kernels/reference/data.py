"""The data ops in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .attack import attack_step
from .philox import philox, random_words

# The first block of the second draw of each sample.
CHANGES = 1 << 31


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
    cutmix: bool = False,
    erase: int = 0,
    jitter: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_range(index, images)
    b, (h, w) = index.shape[0], images.shape[2:]
    drawn = draw_crops(rng, b, pad, flip, stream, h, w)
    crops = drawn[:, :3].contiguous()
    middle_y, middle_x = drawn[:, 3].long(), drawn[:, 4].long()
    x = crop(images, index, crops).to(torch.float32) / 255.0
    blocks = torch.arange(b, device=rng.device) + CHANGES
    words = torch.stack(philox(rng, stream, blocks), dim=1)
    share = x.new_empty(0)
    if jitter:
        # Pixels outside the image stay 0.
        _, inside = source_pixels(crops, h, w)
        x = torch.where(inside.view(b, 1, h, w), _jittered(x, words, jitter), 0.0)
    if cutmix:
        box = _mixed_box(words, h, w)
        x = torch.where(box[:, None], x.roll(-1, 0), x)
        share = (h * w - box.sum((1, 2))).to(x.dtype) / (h * w)
    if cutout:
        x = x.masked_fill(_box(middle_y, middle_x, cutout, cutout, h, w)[:, None], 0.0)
    if erase:
        bits = random_words(rng, stream, 4 * b).view(b, 4)[:, 2]
        tall = 1 + (((bits & 0xFF) * (h // 2)) >> 8)
        wide = 1 + ((((bits >> 8) & 0xFF) * (w // 2)) >> 8)
        chosen = ((words[:, 3] >> 16) < erase)[:, None, None]
        x = x.masked_fill((_box(middle_y, middle_x, tall, wide, h, w) & chosen)[:, None], 0.0)
    if memory is None or eps is None:
        return x, crops, x.new_empty(0), share
    return x, crops, recall(memory, index, crops, x, eps, norm), share


def _box(y: Tensor, x: Tensor, tall: Tensor | int, wide: Tensor | int, h: int, w: int) -> Tensor:
    """Return a mask bool [B, h, w] of the boxes of `tall` x `wide` pixels around (y, x), [B]."""

    def within(centre: Tensor, side: Tensor | int, pixels: int) -> Tensor:
        first = centre - side // 2
        last = first + side
        at = torch.arange(pixels, device=centre.device)
        return (at >= first[:, None]) & (at < last[:, None])

    return within(y, tall, h)[:, :, None] & within(x, wide, w)[:, None, :]


def _mixed_box(words: Tensor, h: int, w: int) -> Tensor:
    """Return the mask bool [B, h, w] of the pixels that come from the next sample.

    The larger of two uniform numbers has a uniform square: so is the box's share of the area.
    """
    part = torch.maximum(words[:, 0] & 0xFFFF, words[:, 0] >> 16)
    tall, wide = (part * h + 0x8000) >> 16, (part * w + 0x8000) >> 16
    y, x = ((words[:, 1] & 0xFFFF) * h) >> 16, ((words[:, 1] >> 16) * w) >> 16
    return _box(y, x, tall, wide, h, w)


def _jittered(x: Tensor, words: Tensor, jitter: float) -> Tensor:
    """Change brightness, contrast and saturation of images [B, 3, H, W], each by a factor."""
    halves = torch.stack([words[:, 2] & 0xFFFF, words[:, 2] >> 16, words[:, 3] & 0xFFFF])
    most = torch.full((), jitter, dtype=x.dtype, device=x.device)
    factors = 1.0 + most * ((halves - 0x8000).to(x.dtype) * 2.0**-15)
    brightness, contrast, saturation = factors[:, :, None, None, None]
    x = 0.5 + contrast * (brightness * x - 0.5)
    red, green, blue = x.split(1, dim=1)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    return (grey + saturation * (x - grey)).clamp(0.0, 1.0)


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
