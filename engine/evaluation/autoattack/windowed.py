"""Logits of images that differ from known ones in one window each.

A convolution's output changes only where its kernel meets a changed input. So in a chain of
convolutions, a small window changes a small part of each map. `Windowed` computes that part alone
and takes the rest from the maps of the known image.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...models import Chain
from ...models.foreign import one_line
from ...models.network import is_plain
from ...progress import announce_once
from .forms import same_logits

log = logging.getLogger(__name__)

# A pass by windows gathers and writes parts of maps. Measured on fast-at-mnist (one core of an AMD
# EPYC, AVX-512, 450 images): with 0.38 of the multiplications it takes 0.70 of the whole pass's
# time, with 0.48 of them 0.85 to 0.93.
_WORTHWHILE = 0.5


@dataclass(frozen=True)
class _Level:
    """Hold a convolution, or a max-pooling (then `weight` is None), and whether ReLU follows."""

    weight: Tensor | None
    bias: Tensor | None
    kernel: int
    stride: int
    padding: int
    relu: bool = False

    def __call__(self, maps: Tensor) -> Tensor:
        """Apply the level to padded maps [N, H, W, C]; return maps [N, H', W', C']."""
        maps = maps.permute(0, 3, 1, 2)
        if self.weight is None:
            out = F.max_pool2d(maps, self.kernel, self.stride)
        else:
            out = F.conv2d(maps, self.weight, self.bias, self.stride)
        return (out.relu_() if self.relu else out).permute(0, 2, 3, 1).contiguous()

    def padded(self, maps: Tensor) -> Tensor:
        """Return maps [N, H, W, C] with the level's zero padding."""
        side = self.padding
        return F.pad(maps, (0, 0, side, side, side, side)) if side else maps

    def size(self, size: int) -> int:
        """Return the output's side for an input's side."""
        return (size + 2 * self.padding - self.kernel) // self.stride + 1

    def even(self, size: int) -> bool:
        """Tell whether every input of a side of `size` reaches an output."""
        rest = (size + 2 * self.padding - self.kernel) % self.stride
        return rest == 0 and self.kernel >= self.stride

    def reached(self, changed: int, size: int) -> int:
        """Return how many outputs a side `changed` neighbouring inputs of `size` reach."""
        return min((changed + self.kernel - 2) // self.stride + 1, self.size(size))

    def start(self, start: Tensor, reached: int, size: int) -> Tensor:
        """Return the first of `reached` outputs that hold all that changes from `start` on."""
        first = start + self.padding - self.kernel + self.stride  # ceil of a division by the stride
        return first.div(self.stride, rounding_mode="floor").clamp(0, self.size(size) - reached)

    def multiplications(self, outputs: int) -> int:
        return 0 if self.weight is None else outputs * self.weight.numel()


class Windowed:
    """Compute a chain of convolutions only where a window of the image reaches.

    Args:
        model: a chain in evaluation mode, on the CPU.
        example: some images [B, C, H, W].
    """

    def __init__(self, model: Chain, example: Tensor) -> None:
        self._model = model
        self._levels, rest = _levels(model, tuple(example.shape[2:]))
        self._sizes = [tuple(example.shape[2:])]
        for level in self._levels:
            height, width = self._sizes[-1]
            self._sizes.append((level.size(height), level.size(width)))
        head = nn.Sequential(*rest).eval()
        maps = self.maps(example[:2])[-1].permute(0, 3, 1, 2)
        self._head_multiplications = _multiplications(head, maps)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(head, maps, check_trace=False)
            self._head: Any = torch.jit.optimize_for_inference(torch.jit.freeze(traced))

    def worthwhile(self, side: int) -> bool:
        """Tell whether a window of `side` pixels makes a pass faster."""
        whole = part = self._head_multiplications
        changed = (side, side)
        for level, (height, width) in zip(self._levels, self._sizes, strict=False):
            changed = (level.reached(changed[0], height), level.reached(changed[1], width))
            whole += level.multiplications(level.size(height) * level.size(width))
            part += level.multiplications(changed[0] * changed[1])
        return part <= _WORTHWHILE * whole

    @torch.no_grad()
    def maps(self, x: Tensor) -> list[Tensor]:
        """Return the padded input of each level, and the input of the head, [B, H, W, C] each."""
        maps, inputs = self._scaled(_channels_last(x)), []
        for level in self._levels:
            inputs.append(level.padded(maps))
            maps = level(inputs[-1])
        return [*inputs, maps]

    @torch.no_grad()
    def logits(
        self,
        points: Tensor,
        known: Sequence[Tensor],
        row: Tensor,
        corner: Sequence[Tensor],
        side: int,
    ) -> Tensor:
        """Return the logits [N, K] at points that differ from known images in one window each.

        Args:
            points: [N, C, H, W].
            known: `maps` of the known images; row: int64 [N], the known image of each point.
            corner: top and left of each window, int64 [N]; side: of all windows [pixels], at most
                the image's. Pixels of a window may lie outside the image.
        """
        size = self._sizes[0]
        start = [first.clamp(max=n - side) for first, n in zip(corner, size, strict=True)]
        own = torch.arange(len(points), device=points.device)
        values = self._scaled(_read(_channels_last(points), own, start, (side, side)))
        for level, size, base in zip(self._levels, self._sizes, known, strict=False):
            reached = [level.reached(n, s) for n, s in zip(values.shape[1:3], size, strict=True)]
            begin = [level.start(*each) for each in zip(start, reached, size, strict=True)]
            origin = [level.stride * first for first in begin]
            patch = _read(
                base, row, origin, [level.stride * (n - 1) + level.kernel for n in reached]
            )
            _write(
                patch, [s + level.padding - o for s, o in zip(start, origin, strict=True)], values
            )
            values, start = level(patch), begin
        maps = known[-1].index_select(0, row)
        _write(maps, start, values)
        return self._head(maps.permute(0, 3, 1, 2))

    def _scaled(self, maps: Tensor) -> Tensor:
        """Return normalised images [N, H, W, C]."""
        return self._model.scaled(maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def windowed(model: nn.Module, example: Tensor) -> Windowed | None:
    """Return the form of a network for windows, or None where it would save little.

    It would in networks that are no chains: their maps change everywhere. A line says so once
    where the form cannot be made, or gives other logits than rounding explains.

    Args:
        model: in evaluation mode; example: some images [B, C, H, W].
    """
    if example.device.type != "cpu" or len(example) < 2 or not isinstance(model, Chain):
        return None
    try:
        form = Windowed(model, example)
        if not form.worthwhile(1):
            return None
        if _agrees(form, model, example[:2]):
            return form
        reason = "the windows give other logits"
    except Exception as error:
        reason = one_line(error)
    announce_once(log, f"Square passes whole images, not windows of them: {reason}")
    return None


@torch.no_grad()
def _agrees(form: Windowed, model: nn.Module, x: Tensor) -> bool:
    """Compare both on the images [B, C, H, W] with another value in their middle pixel."""
    top, left = (n // 2 for n in x.shape[2:])
    points = x.clone()
    points[:, :, top, left] = 1 - points[:, :, top, left]
    row = torch.arange(len(x), device=x.device)
    corner = [torch.full_like(row, start) for start in (top, left)]
    return same_logits(model(points), form.logits(points, form.maps(x), row, corner, 1))


@torch.no_grad()
def _multiplications(layers: nn.Module, x: Tensor) -> int:
    """Return the multiplications an image of all convolutions and linear layers [count]."""
    counts: list[int] = []

    def count(layer: nn.Module, _: object, out: Tensor) -> None:
        counts.append(out[0].numel() * cast(Tensor, layer.weight)[0].numel())

    counted = [m for m in layers.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in counted]
    layers(x)
    for hook in hooks:
        hook.remove()
    return sum(counts)


def _channels_last(x: Tensor) -> Tensor:
    """Return images [N, C, H, W] as [N, H, W, C]."""
    return x.permute(0, 2, 3, 1).contiguous()


def _cells(
    start: Sequence[Tensor], extent: Sequence[int], row: Tensor, size: Sequence[int]
) -> Tensor:
    """Return the positions of windows in rows of maps, all cells in one list: int64 [N * cells]."""
    height, width = size
    down, across = (
        s[:, None] + torch.arange(n, device=s.device) for s, n in zip(start, extent, strict=True)
    )
    cells = (row[:, None] * height + down)[:, :, None] * width + across[:, None, :]
    return cells.flatten()


def _read(maps: Tensor, row: Tensor, start: Sequence[Tensor], extent: Sequence[int]) -> Tensor:
    """Return windows of maps [B, H, W, C], [N, *extent, C]."""
    channels = maps.shape[3]
    cells = _cells(start, extent, row, maps.shape[1:3])
    return maps.view(-1, channels).index_select(0, cells).view(len(row), *extent, channels)


def _write(maps: Tensor, start: Sequence[Tensor], values: Tensor) -> None:
    """Write values [N, h, w, C] into windows of maps [N, H, W, C]."""
    channels = maps.shape[3]
    row = torch.arange(len(maps), device=maps.device)
    cells = _cells(start, values.shape[1:3], row, maps.shape[1:3])
    maps.view(-1, channels).index_copy_(0, cells, values.view(-1, channels))


def _levels(model: Chain, size: Sequence[int]) -> tuple[list[_Level], list[nn.Module]]:
    """Return the convolutions and poolings at the chain's start, and the layers after them."""
    rest = [*([] if model.stem_conv is None else [model.stem_conv]), *model.layers]
    levels: list[_Level] = []
    while rest:
        level = _level(rest[0])
        if level is not None and all(level.even(side) for side in size):
            levels.append(level)
            size = [level.size(side) for side in size]
        elif isinstance(rest[0], nn.ReLU) and levels:
            levels[-1] = replace(levels[-1], relu=True)
        elif not isinstance(rest[0], nn.Identity):
            break
        del rest[0]
    return levels, rest


def _level(layer: nn.Module) -> _Level | None:
    """Return the level of a convolution or a max-pooling with one number for both directions."""
    if isinstance(layer, nn.Conv2d) and is_plain(layer) and len(set(layer.kernel_size)) == 1:
        weight = layer.weight.detach().contiguous(memory_format=torch.channels_last)
        padding = cast(int, layer.padding[0])
        return _Level(weight, layer.bias, layer.kernel_size[0], layer.stride[0], padding)
    if isinstance(layer, nn.MaxPool2d) and isinstance(layer.kernel_size, int):
        plain = layer.padding == 0 and layer.dilation == 1 and not layer.ceil_mode
        if plain and isinstance(layer.stride, int):
            return _Level(None, None, layer.kernel_size, layer.stride, 0)
    return None
