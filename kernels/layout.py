"""How two dense tensors of one shape lie in memory, one against the other."""

from __future__ import annotations

import torch
from torch import Tensor


def same_order(a: Tensor, b: Tensor) -> bool:
    """Both dense, and element i in memory is the same element of both (strides may differ by name only)."""
    return (a.is_contiguous() and b.is_contiguous()) or (
        a.dim() == 4
        and a.is_contiguous(memory_format=torch.channels_last)
        and b.is_contiguous(memory_format=torch.channels_last)
    )


def transposed_rows(a: Tensor, b: Tensor) -> int:
    """R such that every sample of `b`, in memory order, is the transpose of `a`'s [R, D / R]; 1: the same order.

    Both are contiguous or channels_last; of the two, [C, H * W] is the first and [H * W, C] the second.
    """
    if same_order(a, b):
        return 1
    return a.shape[1] if a.is_contiguous() else a.shape[2] * a.shape[3]
