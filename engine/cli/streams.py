"""Standard output and error that outlive their reader."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any, TextIO

from ..errors import EngineError

# The reader of a pipe has gone, or the terminal has.
_GONE = (errno.EPIPE, errno.EIO)


class Stream:
    """Wrap a text stream: once nobody reads it any more, write to nowhere and go on.

    Other faults (a full disk) raise EngineError for stdout; for stderr there is nobody to tell.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write `text`; return its length."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._lose(error)
            return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        # What is still buffered goes to nowhere as well, or it would fail again at exit.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        if error.errno not in _GONE and self._stream is sys.__stdout__:
            raise EngineError(f"cannot write standard output: {error.strerror}")


def install() -> None:
    """Put both streams of this process behind a `Stream`; escape what they cannot encode."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        # Closed at the start, as `>&-` does it.
        if stream is None:
            continue
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Stream(stream))
