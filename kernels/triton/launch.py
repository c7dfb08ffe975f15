"""The device and the tile sizes of a launch.

Fixed rules give the tiles from the problem's size. Nothing is tuned at run time, so a captured CUDA
graph and an eager call launch the same code.
"""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

# Triton reads this setting at its import: the decorators then build interpreted functions.
INTERPRETING = triton.knobs.runtime.interpret
# `audit` runs these launchers on CPU tensors with a driver that compiles and never launches.
recording = False

# The interpreter's cost grows with the programs, a GPU's with the registers. 1024 elements over 4
# warps are 8 a thread: two 128-bit accesses for each float32 operand.
_WIDEST = 65536 if INTERPRETING else 1024
_FLAT_WARPS = 4


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Make the device of `x` current for the launches inside.

    Raises:
        RuntimeError: `x` is not on a CUDA device and Triton does not interpret its kernels.
    """
    if x.is_cuda:
        return torch.cuda.device(x.device)
    if INTERPRETING or recording:
        return contextlib.nullcontext()
    raise RuntimeError(
        f"Triton kernels need a CUDA tensor, got one on {x.device}; "
        "set TRITON_INTERPRET=1 before the import to interpret them on the CPU"
    )


def flat_tile(n: int) -> dict[str, int]:
    """Return BLOCK and num_warps for one element a lane over `n` elements."""
    block = min(triton.next_power_of_2(max(n, 16)), _WIDEST) if INTERPRETING else _WIDEST
    return {"BLOCK": block, "num_warps": _FLAT_WARPS}


def row_tile(
    rows: int, columns: int, elements: int, widest: int | None = None, a_thread: int = 8
) -> dict[str, int]:
    """Return ROWS, BLOCK and num_warps for a [ROWS, BLOCK] tile over a [rows, columns] problem.

    Args:
        elements: desired tile size; a program packs rows up to this size.
        widest: columns that a program holds at once; None for all of them.
        a_thread: elements of a full tile that one thread holds, up to 16 warps.
    """
    if INTERPRETING:
        elements, widest = _WIDEST, widest and _WIDEST
    block = triton.next_power_of_2(max(columns, 1))
    block = min(block, widest or block)
    packed = min(max(elements // block, 1), triton.next_power_of_2(max(rows, 1)))
    warps = min(max(packed * block // (32 * a_thread), 1), 16)
    return {"ROWS": packed, "BLOCK": block, "num_warps": warps}
