"""Hand tensors to the C++ module: what it serves, layouts, addresses."""

from __future__ import annotations

import torch
from torch import Tensor

# After torch: the module then shares torch's OpenMP runtime, and `torch.set_num_threads`
# governs both.
try:
    from . import _native as native
except ImportError as error:
    raise ImportError(
        f"the C++ kernels are not built ({error}); install a C++ compiler and reinstall the package"
    ) from error

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def keep_freed_memory() -> bool:
    """Ask the C library to keep freed memory in this process; True if it does (glibc only).

    It applies to all of the process, so a program calls it and a library does not. On the CPU every
    activation is a large block that is freed and allocated again at each step; left alone, glibc
    returns it to the system and pays a page fault for every 4 KiB of the next one.
    """
    return bool(native.keep_freed_memory())


def served(x: Tensor, *companions: Tensor) -> bool:
    """`x` is float32, on the CPU and dense, and its companions have its shape and strides."""
    if x.dtype is not torch.float32 or x.device.type != "cpu":
        return False
    if not (x.is_contiguous() or is_channels_last(x)):
        return False
    stride, shape = x.stride(), x.shape
    return all(t.stride() == stride and t.shape == shape for t in companions)


def is_channels_last(t: Tensor) -> bool:
    return t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)


def address(t: Tensor | None) -> tuple[int, int]:
    """Where a tensor's elements start, and their type's number."""
    return (0, 0) if t is None else (t.data_ptr(), DTYPES[t.dtype])


def rows(x: Tensor) -> tuple[int, int]:
    """B and D of a batch."""
    b = x.shape[0]
    return b, x.numel() // b if b else 0
