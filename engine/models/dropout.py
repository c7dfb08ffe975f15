"""Dropout and drop-path with masks from the training step's random state, on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..rng import DROPOUT


class _Followed(nn.Module):
    """Hold the random state that masks are drawn from, once `follow` has given it."""

    state: Tensor | None = None
    stream = DROPOUT

    def kept(self, h: Tensor, shape: tuple[int, ...], p: float) -> Tensor:
        """Return a mask of `shape` in the type of `h`, 0 with probability `p`, else 1."""
        assert self.state is not None
        # A random point of the Linf ball of radius 0.5 around 0.5 is uniform on [0, 1].
        half = torch.full(shape, 0.5, device=h.device)
        uniform = kernels.uniform_start(half, 0.5, self.state, norm="Linf", stream=self.stream)
        return (uniform >= p).to(h.dtype)


class Dropout(_Followed, nn.Dropout):
    """Set units to zero with probability `p` while training, as `nn.Dropout` does.

    After `follow`, the mask is a pure function of the training step's (seed, step). So a captured
    graph draws a new mask in every replay, and a resumed run draws the masks of the uninterrupted
    run. All passes of a step have the same mask, so the loss compares one subnetwork with itself.
    """

    def forward(self, h: Tensor) -> Tensor:
        """Map [B, ...] float to the same shape and type."""
        if self.state is None or not self.training or self.p == 0.0:
            return super().forward(h)
        return h * (self.kept(h, tuple(h.shape), self.p) / (1.0 - self.p))


class Dropout2d(_Followed, nn.Dropout2d):
    """Set whole channels of [B, C, H, W] to zero; else as `Dropout`."""

    def forward(self, h: Tensor) -> Tensor:
        if self.state is None or not self.training or self.p == 0.0:
            return super().forward(h)
        shape = (*h.shape[:2], *(1 for _ in h.shape[2:]))
        return h * (self.kept(h, shape, self.p) / (1.0 - self.p))


class DropPath(_Followed):
    """Set whole images of a residual branch [B, ...] to zero (stochastic depth, arXiv 1603.09382).

    Args:
        p: the probability.
        scale: divide what is kept by 1 - p.
    """

    def __init__(self, p: float, scale: bool = True) -> None:
        super().__init__()
        self.p, self.scale = p, scale

    def forward(self, h: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return h
        shape = (len(h), *(1 for _ in h.shape[1:]))
        if self.state is None:
            kept = (torch.rand(shape, device=h.device) >= self.p).to(h.dtype)
        else:
            kept = self.kept(h, shape, self.p)
        return h * (kept / (1.0 - self.p) if self.scale and self.p < 1.0 else kept)


def follow(model: nn.Module, state: Tensor | None) -> None:
    """Make every mask of `model` come from `state` int64 [2], each from a separate stream.

    With None, masks come from torch's generator again.
    """
    followed = [m for m in model.modules() if isinstance(m, _Followed)]
    for number, module in enumerate(followed):
        module.state, module.stream = state, DROPOUT + number


def adopt(net: nn.Module) -> None:
    """Put this module's classes in the place of torch's, timm's and torchvision's, in place."""
    for parent in list(net.modules()):
        for name, child in list(parent.named_children()):
            if (ours := _ours(child)) is not None:
                ours.training = child.training
                setattr(parent, name, ours)


def _ours(module: Any) -> nn.Module | None:
    kind = type(module)
    if kind is nn.Dropout:
        return Dropout(module.p, module.inplace)
    if kind is nn.Dropout2d:
        return Dropout2d(module.p, module.inplace)
    # By name: neither package need be installed.
    if (kind.__name__, kind.__module__.split(".")[0]) == ("DropPath", "timm"):
        return DropPath(float(module.drop_prob or 0.0), bool(module.scale_by_keep))
    if (kind.__name__, kind.__module__.split(".")[0]) == ("StochasticDepth", "torchvision"):
        return DropPath(float(module.p)) if module.mode == "row" else None
    return None
