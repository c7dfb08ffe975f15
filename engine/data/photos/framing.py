"""The part of a picture that the network sees: a window, its shift and mirror, its colours.

All draws are Philox numbers of (seed, epoch, position in the training set). So they depend on
neither batches nor processes nor the loader.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ... import rng
from ...kernels.reference.philox import philox, to_uniform

# Random resized crops as in Inception (Szegedy et al., arXiv 1409.4842) and torchvision: up to ten
# tries at an area and an aspect ratio that fit the picture.
_TRIES, _RATIO = 10, 4 / 3
# Words of a draw: two for each try, two places, one mirror, three colours; four in each block.
_PLACE, _MIRROR, _COLOURS = 2 * _TRIES, 2 * _TRIES + 2, 2 * _TRIES + 3
_BLOCKS = -(-(_COLOURS + 3) // 4)
# The weights of red, green and blue in luma (ITU-R BT.601).
_LUMA = (0.299, 0.587, 0.114)


class Frames(NamedTuple):
    """Hold the frames of some pictures.

    Attributes:
        windows: int32 [n, 4], (top, left, height, width) in the upright picture [pixels].
        crops: int32 [n, 3], (dy, dx, mirrored): the shift and mirror of the scaled window.
    """

    windows: Tensor
    crops: Tensor


@dataclass(frozen=True)
class Framing:
    """Frame pictures.

    Attributes:
        size: (H, W) that the network sees [pixels].
        resize: the shorter side of the scaled picture before the centre crop [pixels].
        seed: of all draws.
        scale: (least, most) share of the picture's area in a random resized crop; None: the centre.
        pad: without `scale`: a random shift by up to this, zeros outside [pixels].
        flip: mirror half of the pictures.
        jitter: brightness, contrast and saturation change by factors in [1 - jitter, 1 + jitter].
    """

    size: tuple[int, int]
    resize: int
    seed: int = 0
    scale: tuple[float, float] | None = None
    pad: int = 0
    flip: bool = False
    jitter: float = 0.0

    def centre(self, sizes: Tensor) -> Tensor:
        """Return the centre windows, int32 [n, 4], of pictures of `sizes` int32 [n, 2].

        The result is the same part of the picture as scaling its shorter side to `resize` and
        cropping the centre gives, up to the rounding of a window's edges to whole pixels.
        """
        height, width = self.size
        share = min(height, width) / self.resize
        h, w = sizes.double().unbind(1)
        unit = torch.minimum(h / height, w / width) * share
        window = torch.stack([unit * height, unit * width], 1).round().clamp(min=1)
        corner = ((sizes.double() - window) / 2).round()
        return torch.cat([corner, window], 1).to(torch.int32)

    def draw(self, epoch: int, positions: Tensor, sizes: Tensor) -> Frames:
        """Return the frames of pictures in an epoch.

        Args:
            positions: int64 [n], in the training set; sizes: int32 [n, 2], of these pictures.
        """
        words = self._words(epoch, positions)
        mirrored = words[:, _MIRROR] >> 31 if self.flip else torch.zeros_like(positions)
        if self.scale is not None:
            shift = torch.zeros_like(positions)
            windows = self._random(words, sizes)
            return Frames(windows, torch.stack([shift, shift, mirrored], 1).to(torch.int32))
        side = 2 * self.pad + 1
        shifts = [((words[:, _PLACE + k] * side) >> 32) - self.pad for k in (0, 1)]
        return Frames(self.centre(sizes), torch.stack([*shifts, mirrored], 1).to(torch.int32))

    def colours(self, epoch: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the linear map of every picture's colours: float32 [n, 3, 3] and [n, 3, 1].

        Brightness, contrast about mid-grey and saturation are applied in this order; together they
        are one matrix and one offset.
        """
        uniform = to_uniform(self._words(epoch, positions)[:, _COLOURS : _COLOURS + 3], torch.float)
        bright, contrast, saturation = (1 + self.jitter * (2 * uniform - 1)).unbind(1)
        grey = torch.tensor(_LUMA).expand(3, 3)
        kept = saturation[:, None, None]
        matrix = kept * torch.eye(3) + (1 - kept) * grey
        offset = (0.5 * (1 - contrast))[:, None, None].expand(-1, 3, 1)
        return (bright * contrast)[:, None, None] * matrix, offset.contiguous()

    def _words(self, epoch: int, positions: Tensor) -> Tensor:
        """Return 32-bit words, int64 [n, 4 * _BLOCKS]."""
        blocks = positions[:, None] * _BLOCKS + torch.arange(_BLOCKS)
        drawn = philox(rng.state(self.seed, step=epoch), rng.FRAME, blocks.flatten())
        return torch.stack(drawn, 1).view(len(positions), 4 * _BLOCKS)

    def _random(self, words: Tensor, sizes: Tensor) -> Tensor:
        """Return the windows of random resized crops, int32 [n, 4]."""
        assert self.scale is not None
        # NumPy: at these sizes torch's exp costs a wake-up of all its threads.
        uniform = to_uniform(words, torch.float64).numpy()
        tries = uniform[:, : 2 * _TRIES].reshape(-1, _TRIES, 2)
        least, most = self.scale
        h, w = np.hsplit(sizes.numpy().astype(np.float64), 2)
        area = h * w * (least + (most - least) * tries[:, :, 0])
        aspect = self.size[1] / self.size[0]
        ratio = aspect * np.exp(math.log(_RATIO) * (2 * tries[:, :, 1] - 1))
        across, down = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
        fits = (across >= 1) & (across <= w) & (down >= 1) & (down <= h)
        # Where no try fits: the largest centre window of an aspect ratio in the range.
        first, found = fits.argmax(1)[:, None], fits.any(1, keepdims=True)
        wide = np.minimum(w, np.maximum(1, np.rint(h * aspect * _RATIO)))
        high = np.minimum(h, np.maximum(1, np.rint(w * _RATIO / aspect)))
        across = np.where(found, np.take_along_axis(across, first, 1), wide)
        down = np.where(found, np.take_along_axis(down, first, 1), high)
        rest = np.concatenate([h - down, w - across], 1)
        drawn = np.floor(uniform[:, _PLACE : _PLACE + 2] * (rest + 1))
        corner = np.where(found, drawn, np.rint(rest / 2))
        return torch.from_numpy(np.concatenate([corner, down, across], 1).astype(np.int32))
