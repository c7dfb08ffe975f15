"""Dropout with masks from the training step's random state, on the device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import kernels
from ..rng import DROPOUT


class Dropout(nn.Dropout):
    """Set units to zero with probability `p` while training, as `nn.Dropout` does.

    After `follow`, the mask is a pure function of the training step's (seed, step). So a captured
    graph draws a new mask in every replay, and a resumed run draws the masks of the uninterrupted
    run. All passes of a step have the same mask, so the loss compares one subnetwork with itself.
    """

    state: Tensor | None = None
    stream = DROPOUT

    def forward(self, h: Tensor) -> Tensor:
        """Map [B, ...] float to the same shape and type."""
        if self.state is None or not self.training or self.p == 0.0:
            return super().forward(h)
        # A random point of the Linf ball of radius 0.5 around 0.5 is uniform on [0, 1].
        half = torch.full(h.shape, 0.5, device=h.device)
        uniform = kernels.uniform_start(half, 0.5, self.state, norm="Linf", stream=self.stream)
        return h * ((uniform >= self.p).to(h.dtype) / (1.0 - self.p))


def follow(model: nn.Module, state: Tensor) -> None:
    """Make every `Dropout` of `model` draw from `state` int64 [2], each from a separate stream."""
    dropouts = [m for m in model.modules() if isinstance(m, Dropout)]
    for number, module in enumerate(dropouts):
        module.state, module.stream = state, DROPOUT + number
