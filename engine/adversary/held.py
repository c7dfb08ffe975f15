"""Points that a second computation of a loss takes over from the first, without their passes.

Adversarial weight perturbation computes one loss at two sets of weights, and at the same points.
The first computation records what its attacks find; the second replays it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

Found = TypeVar("Found")


class Points:
    """Hold what the attacks of one computation have found, in order."""

    def __init__(self) -> None:
        self._found: list[Any] = []
        self._replayed: int | None = None

    @contextlib.contextmanager
    def record(self) -> Iterator[None]:
        """Record in the block what `once` finds."""
        self._found, self._replayed = [], None
        with _use(self):
            yield

    @contextlib.contextmanager
    def replay(self) -> Iterator[None]:
        """Hand out in the block what was recorded, in the same order."""
        self._replayed = 0
        with _use(self):
            yield

    def next(self, find: Callable[[], Found]) -> Found:
        if self._replayed is None:
            self._found.append(find())
            return self._found[-1]
        self._replayed += 1
        return self._found[self._replayed - 1]


_in_use: list[Points] = []


@contextlib.contextmanager
def _use(points: Points) -> Iterator[None]:
    _in_use.append(points)
    try:
        yield
    finally:
        _in_use.pop()


def once(find: Callable[[], Found]) -> Found:
    """Return `find()`; in a replay, return what the same call found in the recording."""
    return _in_use[-1].next(find) if _in_use else find()
