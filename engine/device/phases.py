"""Named phases of a training step, for listeners: a profiler's ranges, the audit's counts.

Without a listener a phase costs one method call. Python does not run when a CUDA graph is replayed,
so listeners hear the capture and no replay.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Protocol

import torch

ATTACK_FORWARD, ATTACK_BACKWARD = "attack forward", "attack backward"
ATTACK_START, ATTACK_STEP = "attack start", "attack step"
TRAIN_FORWARD, TRAIN_BACKWARD = "train forward", "train backward"
LOSS, OPTIMISER, BOOKKEEPING = "loss", "optimiser", "bookkeeping"
DATA = "data"

# Environment variables that `engine profile`, nsys and ncu set for the process that they watch.
WATCHED = "ENGINE_PROFILER"
_ATTACHED = (WATCHED, "NSYS_PROFILING_SESSION_ID", "NV_NSIGHT_INJECTION_PORT_BASE")


class Listener(Protocol):
    """Hear the beginning and the end of every phase; phases nest."""

    def enter(self, name: str) -> None: ...
    def exit(self, name: str) -> None: ...


_listeners: list[Listener] = []


class phase:
    """Name a part of a step: `with phase(LOSS): ...`."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        for listener in _listeners:
            listener.enter(self.name)

    def __exit__(self, *_: object) -> None:
        for listener in reversed(_listeners):
            listener.exit(self.name)


class _Nvtx:
    """Make each phase a range in NVIDIA's profilers."""

    def enter(self, name: str) -> None:
        torch.cuda.nvtx.range_push(name)

    def exit(self, name: str) -> None:
        torch.cuda.nvtx.range_pop()


@contextlib.contextmanager
def nvtx() -> Iterator[None]:
    """Make phases in the block NVTX ranges, where a profiler of NVIDIA's is attached."""
    attached = any(name in os.environ for name in _ATTACHED)
    if not (attached and torch.cuda.is_available()):
        yield
        return
    with listening(_Nvtx()):
        yield


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let `listener` hear every phase of this process within the block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
