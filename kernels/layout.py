"""The memory layouts of dense tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def same_order(a: Tensor, b: Tensor) -> bool:
    """Tell whether both are dense and hold the same element at each position in memory.

    The strides may still differ along a dimension of size 1.
    """
    return (a.is_contiguous() and b.is_contiguous()) or (
        a.dim() == 4
        and a.is_contiguous(memory_format=torch.channels_last)
        and b.is_contiguous(memory_format=torch.channels_last)
    )


def outputs_innermost(weight: Tensor) -> Tensor:
    """Return a convolution's weight [O, C, kh, kw] with adjacent output channels in memory.

    `input_grad_step` reads a stem's weight in this order on a GPU. A weight that lies so already is
    returned as it is, so arrange the weight once before several steps.
    """
    last = weight.permute(2, 3, 1, 0)
    return weight if last.is_contiguous() else last.contiguous().permute(3, 2, 0, 1)
