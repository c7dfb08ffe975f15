"""Run the ops' own launch code on CPU tensors and execute what it launches."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import audit
from ..stand_in import Launched, standing_in
from .lanes import Grid
from .machine import execute
from .memory import WARP, GlobalMemory


@contextlib.contextmanager
def executing(arch: str, seed: int = 0) -> Iterator[list[str]]:
    """Execute every Triton kernel launched in the block as compiled for `arch`; list their names.

    A kernel may touch the storages of its arguments and of the op's: the optimisers' kernels read
    addresses from a table. Fresh tensors are NaN, so that an element nobody writes shows.

    Args:
        arch: one of `audit.ARCHS`.
        seed: of the order of blocks and warps, and of the poison in registers and shared memory.
    Raises:
        Fault: see `machine.execute`.
    """
    launches: list[str] = []
    operands = _Operands()

    def run(launched: Launched) -> None:
        launches.append(launched.kernel.name)
        storages, values = list(operands.storages), []
        for i, (kind, value) in enumerate(launched.arguments):
            if isinstance(value, Tensor):
                storages.append(_storage(f"argument {i}", value))
            if kind != "constexpr":
                values.append(_bits(kind, value))
        grid = Grid(*launched.grid, launched.warps * WARP, launched.shared)
        execute(launched.kernel.asm["ptx"], values, grid, GlobalMemory(storages), seed)

    with _fresh_tensors_poisoned(), operands, standing_in(arch, audit.most_shared(arch), run):
        yield launches


class _Operands(TorchDispatchMode):
    """Note the storages that the op at work was given."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "engine":
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            self.storages = [_storage(f"tensor {i} of the op", t) for i, t in enumerate(tensors)]
        return func(*args, **(kwargs or {}))


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
    before = torch.are_deterministic_algorithms_enabled()
    warns, fills = (
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = fills  # type: ignore[attr-defined]
