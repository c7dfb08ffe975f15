"""Access to the C++ module: the tensors that it serves, their layouts and addresses."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

# Import the module after torch: it then shares torch's OpenMP runtime, and `torch.set_num_threads`
# sets the threads of both.
try:
    from . import _native as native
except ImportError as error:
    built = find_spec("._native", __package__) is not None
    problem = f"do not load ({error})" if built else "are not built"
    raise ImportError(
        f"the C++ kernels {problem}; install a C++ compiler and reinstall the package"
    ) from error

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def keep_freed_memory() -> bool:
    """Ask the C library to keep freed memory in this process; return True if it does (glibc only).

    The setting applies to the whole process, so a program calls this function, not a library. On
    the CPU every activation is a large block that each step frees and allocates again. By default
    glibc returns the block to the system and pays a page fault for every 4 KiB of the next one.
    """
    return bool(native.keep_freed_memory())


def served(x: Tensor, *companions: Tensor) -> bool:
    """Tell whether `x` is float32, dense and on the CPU, and its companions have its strides."""
    if x.dtype is not torch.float32 or x.device.type != "cpu":
        return False
    if not (x.is_contiguous() or is_channels_last(x)):
        return False
    stride, shape = x.stride(), x.shape
    return all(t.stride() == stride and t.shape == shape for t in companions)


def is_channels_last(t: Tensor) -> bool:
    return t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)


def address(t: Tensor | None) -> tuple[int, int]:
    """Return the address of a tensor's elements and the number of their type in C++."""
    return (0, 0) if t is None else (t.data_ptr(), DTYPES[t.dtype])


def rows(x: Tensor) -> tuple[int, int]:
    """Return B and D of a batch: its samples and the elements of one sample."""
    b = x.shape[0]
    return b, x.numel() // b if b else 0
