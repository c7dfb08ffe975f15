"""A way around an error of oneDNN in the weight gradient of narrow 1x1 convolutions."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

# Channels of a block in oneDNN: 16 with AVX-512, 8 with AVX2.
_BLOCK = 16


class _Sliced(nn.Conv2d):
    """A 1x1 convolution with a stride, computed on every stride-th pixel, with stride 1.

    For fewer input channels than a block, channels last, oneDNN writes past its workspace in the
    weight gradient of the strided form (https://github.com/uxlfoundation/oneDNN/issues/6035): a
    segmentation fault, or wrong gradients. Both forms compute the same function.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.device.type != "cpu":
            return super().forward(input)
        down, across = self.stride
        return F.conv2d(input[..., ::down, ::across], self.weight, self.bias)


def avoid_strides(model: nn.Module, stem: nn.Module | None) -> None:
    """Replace the class of every convolution with the error, in place; state dicts do not change.

    Args:
        stem: a convolution to leave: the engine has its own weight gradient for it.
    """
    for module in model.modules():
        if type(module) is nn.Conv2d and module is not stem and _hit(module):
            module.__class__ = _Sliced


def _hit(conv: nn.Conv2d) -> bool:
    return (
        conv.kernel_size == (1, 1)
        and max(conv.stride) > 1
        and conv.padding in ((0, 0), "valid")
        and conv.groups == 1
        and conv.in_channels < _BLOCK
    )
