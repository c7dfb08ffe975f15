"""A watch over replayed graphs: it notices a replay that does not finish.

NCCL's watchdog follows the collectives that Python starts, and a replay starts its collectives
without Python. If a process is lost in the middle of a replay, the devices of the others wait for
ever, and so do their hosts once the queue of launches is full.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Protocol

import torch


class Event(Protocol):
    """Mark a place in a device's work, as `torch.cuda.Event` does."""

    def record(self) -> None: ...
    def query(self) -> bool: ...


def end_process(report: str) -> None:
    """Print `report` and end this process with status 2; torchrun then restarts all of them.

    Nothing else ends a process whose main thread waits for a device.
    """
    print(f"engine: {report}", file=sys.stderr, flush=True)
    os._exit(2)


class ReplayWatch:
    """Look at replays from a thread of its own, and give up on one that does not finish in time.

    Args:
        patience: seconds from a replay's launch to its end, the work before it included.
        interval: seconds between two looks.
        begin: runs first in the thread. A new thread has device 0 for its current device, and a
            look from there could make a second context on that device.
        event: makes an event of the current device.
        give_up: receives the report.
    """

    def __init__(
        self,
        patience: float,
        *,
        interval: float = 1.0,
        begin: Callable[[], object] = lambda: None,
        event: Callable[[], Event] = torch.cuda.Event,
        give_up: Callable[[str], None] = end_process,
    ) -> None:
        self.patience, self.interval = patience, interval
        self._begin, self._event, self._give_up = begin, event, give_up
        # One event is enough: a replay cannot finish before the one ahead of it.
        self._pending: tuple[Event, float] | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="replay watch", daemon=True)
        self._thread.start()

    def watched(self, replay: Callable[[], None]) -> Callable[[], None]:
        """Return `replay` under this watch."""

        def run() -> None:
            replay()
            if self._pending is None:
                event = self._event()
                event.record()
                self._pending = event, time.monotonic()

        return run

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join()

    def _look_on(self) -> None:
        self._begin()
        while not self._closed.wait(self.interval):
            if self._pending is None:
                continue
            event, began = self._pending
            try:
                finished = event.query()
            except RuntimeError:
                # The device has failed. The main thread meets the same error and reports it.
                return
            if finished:
                self._pending = None
            elif time.monotonic() - began > self.patience:
                self._give_up(
                    f"a replayed step has not finished after {self.patience:g} s: "
                    "another process of this run may be lost"
                )
                return
