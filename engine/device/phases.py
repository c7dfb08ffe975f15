"""Named phases of a training step, for whoever listens: a profiler's ranges, the audit's counts.

With nobody listening a phase costs a method call. Inside a captured CUDA graph Python runs once only,
so listeners hear a capture and no replay.
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

# What `engine profile`, nsys and ncu leave in the environment of the process that they watch.
WATCHED = "ENGINE_PROFILER"
_ATTACHED = (WATCHED, "NSYS_PROFILING_SESSION_ID", "NV_NSIGHT_INJECTION_PORT_BASE")


class Listener(Protocol):
    """Told of every phase's beginning and end; phases nest."""

    def enter(self, name: str) -> None: ...
    def exit(self, name: str) -> None: ...


_listeners: list[Listener] = []


class phase:
    """`with phase(LOSS): ...`"""

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
    """A range in NVIDIA's profilers for each phase."""

    def enter(self, name: str) -> None:
        torch.cuda.nvtx.range_push(name)

    def exit(self, name: str) -> None:
        torch.cuda.nvtx.range_pop()


@contextlib.contextmanager
def nvtx() -> Iterator[None]:
    """Within the block phases are NVTX ranges where a profiler of NVIDIA's is attached; else nothing changes."""
    attached = any(name in os.environ for name in _ATTACHED)
    if not (attached and torch.cuda.is_available()):
        yield
        return
    with listening(_Nvtx()):
        yield


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """`listener` hears every phase of this process within the block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
