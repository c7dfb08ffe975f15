"""Signals while training: the step ends and a checkpoint is written before the process does."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """Report that training ended on the signal `signum`."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum

    @property
    def status(self) -> int:
        """Return the exit status: 129 for SIGHUP, 130 for SIGINT, 143 for SIGTERM."""
        return 128 + self.signum


class Watch:
    """Note signals within the block; the trainer looks after each step.

    SIGINT, SIGTERM and SIGHUP (the terminal has gone) set `stop`; SIGUSR1 sets `save`. A second
    signal of the first kind raises `Stopped` at once. An ignored SIGHUP (`nohup`) stays ignored.
    Outside the main thread, where Python delivers no signals, nothing is watched.

    Attributes:
        stop: the signal that asks for the end, or None; save: a checkpoint is asked for.
    """

    def __init__(self) -> None:
        self.stop: int | None = None
        self.save = False
        self._process = os.getpid()
        self._before: dict[int, object] = {}
        self._told = contextlib.ExitStack()

    def __enter__(self) -> Watch:
        if threading.current_thread() is threading.main_thread():
            self._told.enter_context(_announced())
            for signum in (*_STOPPING, signal.SIGUSR1):
                if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:
                    continue
                self._before[signum] = signal.signal(signum, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)  # type: ignore[arg-type]
        self._before.clear()
        self._told.close()

    def _hear(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A loader's worker inherits the handler. Ctrl-C and a hang-up are for its parent.
            if signum == signal.SIGTERM:
                os._exit(128 + signum)
            return
        if signum not in _STOPPING:
            self.save = True
        elif self.stop is not None:
            raise Stopped(signum)
        else:
            self.stop = signum


@contextlib.contextmanager
def _announced() -> Iterator[None]:
    """Say at once, in the block, that the first stopping signal was heard.

    Python runs a signal's handler between two of its own instructions, and a backward pass is one
    instruction that may take half a minute. The C handler writes the signal's number into a socket
    at once, and a thread that waits there prints the line.
    """
    near, far = socket.socketpair()
    near.setblocking(False)
    before = signal.set_wakeup_fd(near.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_announce, args=(far,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        near.close()
        thread.join(1.0)
        far.close()


def _announce(far: socket.socket) -> None:
    while numbers := far.recv(64):
        if any(number in _STOPPING for number in numbers):
            if os.environ.get("RANK", "0") == "0":
                print(
                    "\nengine: stopping after this step and a checkpoint; again: stop at once",
                    file=sys.stderr,
                    flush=True,
                )
            return


def _forget() -> None:
    """Keep a forked worker's signals out of its parent's socket."""
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget)


def terminate(signum: int, frame: FrameType | None) -> None:
    """Turn a signal into an exception, so that unfinished files are removed."""
    raise Stopped(signum)


def end_tidily() -> None:
    """Let SIGTERM and SIGHUP end this process by an exception; an ignored SIGHUP stays ignored."""
    signal.signal(signal.SIGTERM, terminate)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:
        signal.signal(signal.SIGHUP, terminate)
