"""Download a file over HTTP: go on after a broken connection, bound the size, show progress."""

from __future__ import annotations

import fcntl
import os
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from ..errors import EngineError
from ..progress import stderr

_ANSWER_SECONDS = 4
_STALL_SECONDS = 30
# The most bytes that a broken connection loses.
_CHUNK = 1 << 14


def await_answer(url: str) -> None:
    """Refuse a server that gives no answer in time; any answer will do.

    A connection's own timeout starts again for each address, and does not cover the name's look-up.
    """
    import requests

    outcome: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            requests.head(url, timeout=_ANSWER_SECONDS, allow_redirects=True).raise_for_status()
            outcome.put(None)
        except Exception as e:
            outcome.put(e)

    threading.Thread(target=ask, daemon=True).start()
    try:
        error = outcome.get(timeout=_ANSWER_SECONDS)
    except queue.Empty:
        error = requests.Timeout()
    if isinstance(error, requests.Timeout):  # of either clock
        raise EngineError(f"{url}: no answer within {_ANSWER_SECONDS} s")
    if error is not None:
        raise EngineError(f"{url}: {_reason(error)}")


@contextmanager
def locked(part: Path) -> Iterator[BinaryIO]:
    """Open `part` for appending, once no other process holds it."""
    while True:
        with part.open("a+b") as out:
            fcntl.flock(out, fcntl.LOCK_EX)
            # The file may have been renamed or removed during the wait: then open the new one.
            if part.exists() and os.path.samestat(part.stat(), os.fstat(out.fileno())):
                yield out
                return


class ConnectionCut(EngineError):
    """Report a broken connection; the bytes so far are kept."""


def append(url: str, out: BinaryIO, file: str, limit: int, progress: bool) -> None:
    """Append to `out` the bytes of the file at `url` that it lacks."""
    import requests

    begun = out.seek(0, os.SEEK_END)
    # Without it some servers unpack .gz files on the way.
    headers = {"Accept-Encoding": "identity"}
    if begun:
        headers["Range"] = f"bytes={begun}-"
    try:
        with requests.get(url, headers=headers, stream=True, timeout=_STALL_SECONDS) as answer:
            if answer.status_code == 416:  # the server has no further bytes
                return
            answer.raise_for_status()
            if answer.status_code != 206:
                begun = out.truncate(0)
            with Sink(out, file, limit, progress, begun) as sink:
                rest = answer.headers.get("Content-Length", "")
                sink.expect(begun + int(rest) if rest.isdigit() else None)
                for chunk in answer.iter_content(_CHUNK):
                    sink.write(chunk)
                if rest.isdigit() and sink.done != begun + int(rest):
                    raise requests.exceptions.ChunkedEncodingError
    except (
        requests.exceptions.ChunkedEncodingError,
        requests.exceptions.ConnectionError,
        requests.exceptions.Timeout,
    ) as e:
        out.flush()
        kept = out.seek(0, os.SEEK_END)
        hint = f"; {kept:,} bytes are kept, fetch again to go on" if kept else ""
        raise ConnectionCut(f"{url}: {_reason(e)}{hint}") from None
    except (requests.RequestException, ValueError) as e:
        raise EngineError(f"{url}: {_reason(e)}") from None
    finally:
        out.flush()


def _reason(error: Exception) -> str:
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"{error.response.status_code} {error.response.reason}"
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection broke"
    if isinstance(error, requests.ConnectionError):
        return "cannot connect"
    return " ".join(f"{type(error).__name__}: {error}".split())


class Sink:
    """Write a download: show its progress and end it beyond `limit` bytes.

    `done`: bytes so far, with those of an earlier download.
    """

    def __init__(self, file: BinaryIO, name: str, limit: int, show: bool, begun: int = 0) -> None:
        self._file, self._name, self._limit, self.done = file, name, limit, begun
        self._bar = _progress_bar() if show else None

    def __enter__(self) -> Sink:
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task(self._name, total=None)
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar:
            self._bar.stop()

    def expect(self, size: int | None) -> None:
        """Show `size` bytes as the total."""
        if self._bar:
            self._bar.update(self._task, total=size, completed=self.done)

    def write(self, chunk: bytes) -> int:
        self.done += len(chunk)
        if self.done > self._limit:
            raise EngineError(f"{self._name}: more than {self._limit:,} bytes, all it may have")
        if self._bar:
            self._bar.update(self._task, completed=self.done)
        try:
            return self._file.write(chunk)
        except OSError as e:  # caught here, or it would look like a fault of the source
            raise EngineError(f"cannot write {self._name}: {e.strerror}") from None


def _progress_bar() -> Progress:
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn())
    return Progress(*columns, TransferSpeedColumn(), console=stderr, transient=True)
