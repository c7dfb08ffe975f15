"""Comparison of the memory layouts of two dense tensors of one shape."""

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
