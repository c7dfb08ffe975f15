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


def transposed_rows(a: Tensor, b: Tensor) -> int:
    """Return the number of rows R that relates the memory orders of `a` and `b`.

    Each sample of `b`, in memory order, is the transpose of the [R, D / R] sample of `a`; R = 1 for
    the same order. Both are contiguous ([C, H * W]) or channels_last ([H * W, C]).
    """
    if same_order(a, b):
        return 1
    return a.shape[1] if a.is_contiguous() else a.shape[2] * a.shape[3]
