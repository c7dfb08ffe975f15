"""Dropout whose masks come from the step's own random state, on the device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import kernels
from ..rng import DROPOUT


class Dropout(nn.Dropout):
    """Drops with probability `p` while training, as `nn.Dropout` does.

    Once a training step has adopted it (`follow`), the mask is a pure function of that step's (seed,
    step): a captured graph draws a new one at every replay and a resumed run the one it would have
    drawn. All passes of a step see one mask, so its loss terms compare one subnetwork with itself.
    """

    state: Tensor | None = None
    stream = DROPOUT

    def forward(self, h: Tensor) -> Tensor:
        """[B, ...] float, to the same."""
        if self.state is None or not self.training or self.p == 0.0:
            return super().forward(h)
        # A random point of the ball of radius a half around a half: uniform on [0, 1].
        half = torch.full(h.shape, 0.5, device=h.device)
        uniform = kernels.uniform_start(half, 0.5, self.state, norm="Linf", stream=self.stream)
        return h * ((uniform >= self.p).to(h.dtype) / (1.0 - self.p))


def follow(model: nn.Module, state: Tensor) -> None:
    """Every `Dropout` of `model` draws from `state` int64 [2] from now on, each from its own stream."""
    dropouts = [m for m in model.modules() if isinstance(m, Dropout)]
    for number, module in enumerate(dropouts):
        module.state, module.stream = state, DROPOUT + number
