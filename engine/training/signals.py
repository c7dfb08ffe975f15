"""Signals while training: finish the step and checkpoint, rather than die in the middle of one."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType


class Stopped(KeyboardInterrupt):
    """Training ended on a signal; `signum` says which."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def status(self) -> int:
        """The exit status that says so: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signum


class Watch:
    """Within the block SIGINT and SIGTERM only set `stop`, and SIGUSR1 sets `save`; the trainer looks after each step.

    A second SIGINT or SIGTERM raises `Stopped` on the spot. Outside the main thread, where Python gives
    no signals, it watches nothing.

    Attributes:
        stop: the signal that asks for the end, or None; save: a checkpoint is asked for.
    """

    def __init__(self) -> None:
        self.stop: int | None = None
        self.save = False
        self._process = os.getpid()
        self._before: dict[int, object] = {}

    def __enter__(self) -> Watch:
        if threading.current_thread() is threading.main_thread():
            wanted = [signal.SIGINT, signal.SIGTERM]
            wanted += [signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []
            for signum in wanted:
                self._before[signum] = signal.signal(signum, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
        self._before.clear()

    def _hear(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A loader's worker inherits the handler. Ctrl-C is for its parent, the rest is for it.
            if signum == signal.SIGTERM:
                os._exit(128 + signum)
            return
        if signum not in (signal.SIGINT, signal.SIGTERM):
            self.save = True
        elif self.stop is not None:
            raise Stopped(signum)
        else:
            self.stop = signum


def terminate(signum: int, frame: FrameType | None) -> None:
    """A handler that turns SIGTERM into an exception, so that what is being written is tidied up."""
    raise Stopped(signum)
