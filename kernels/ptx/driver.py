"""Run the ops' own launch code on CPU tensors and execute what it launches."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import audit
from ..stand_in import Launched, standing_in
from .lanes import Grid
from .machine import execute
from .memory import WARP, GlobalMemory


@contextlib.contextmanager
def executing(arch: str, seed: int = 0, tensors: Iterable[Tensor] = ()) -> Iterator[list[str]]:
    """Execute every Triton kernel launched in the block as compiled for `arch`; list their names.

    A kernel may touch the storages of its arguments and of `tensors`. Fresh tensors are NaN: an
    element that nobody writes shows.

    Args:
        arch: one of `audit.ARCHS`.
        seed: of the order of blocks and warps, and of the poison in registers and shared memory.
        tensors: what kernels reach by other ways; the optimisers' read addresses from a table.
    Raises:
        Fault: see `machine.execute`.
    """
    launches: list[str] = []
    besides = [_storage(f"tensor {i}", t) for i, t in enumerate(tensors)]

    def run(launched: Launched) -> None:
        launches.append(launched.kernel.name)
        storages, values = list(besides), []
        for i, (kind, value) in enumerate(launched.arguments):
            if isinstance(value, Tensor):
                storages.append(_storage(f"argument {i}", value))
            if kind != "constexpr":
                values.append(_bits(kind, value))
        grid = Grid(*launched.grid, launched.warps * WARP, launched.shared)
        execute(launched.kernel.asm["ptx"], values, grid, GlobalMemory(storages), seed)

    with _fresh_tensors_poisoned(), standing_in(arch, audit.most_shared(arch), run):
        yield launches


def _storage(name: str, t: Tensor) -> tuple[str, int, int]:
    storage = t.untyped_storage()
    return name, storage.data_ptr(), storage.nbytes()


def _bits(kind: str, value: Any) -> int:
    """Return a launch's argument as the bits of the kernel's parameter."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if kind in ("fp64", "fp32"):
        format, width = ("<d", 8) if kind == "fp64" else ("<f", 4)
        return (
            int.from_bytes(struct.pack(format, value), "little", signed=False)
            & (1 << 8 * width) - 1
        )
    return int(value)


@contextlib.contextmanager
def _fresh_tensors_poisoned() -> Iterator[None]:
    # The debug mode's setter, unlike use_deterministic_algorithms, imports no compiler.
    settings: Any = torch.utils.deterministic
    mode, fills = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        settings.fill_uninitialized_memory = fills
