"""Named phases of a training step, for whoever listens: a profiler's ranges, the audit's counts.

With nobody listening a phase costs a method call. Inside a captured CUDA graph Python runs once only,
so listeners hear a capture and no replay.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

ATTACK_FORWARD, ATTACK_BACKWARD = "attack forward", "attack backward"
ATTACK_START, ATTACK_STEP = "attack start", "attack step"
TRAIN_FORWARD, TRAIN_BACKWARD = "train forward", "train backward"
LOSS, OPTIMISER, BOOKKEEPING = "loss", "optimiser", "bookkeeping"
DATA = "data"


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


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """`listener` hears every phase of this process within the block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)
