"""Simulate power cuts: what was not synced is gone, by the strictest reading of POSIX.

A file keeps the content of its last fsync; a folder keeps the names of its last fsync. The cut
comes before the n-th write: every call of `os` that changes a file or a folder counts as one.
Nothing here
needs root or a device: the functions of `os` are replaced within this process.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_COUNTED = ("write", "fsync", "replace", "rename", "unlink", "mkdir", "ftruncate", "truncate")


class PowerCut(BaseException):
    """The power fails: no handler of the engine's may go on."""


class Disk:
    """Follow a folder's durable state within the block; cut the power before one of the writes.

    Args:
        cut: the number of the write that does not happen, from 1; None: no cut.
    Attributes:
        writes: calls so far that change the folder.
    """

    def __init__(self, root: Path, cut: int | None = None) -> None:
        self.root, self.cut = root.absolute(), cut
        self.writes = 0
        self._contents: dict[int, bytes] = {}
        self._names: dict[int, dict[str, int]] = {}
        self._real: dict[str, Callable[..., Any]] = {}

    def __enter__(self) -> Disk:
        self._real = {name: getattr(os, name) for name in _COUNTED}
        # Names that point to a file keep its number from being given to another file.
        self._pins = Path(tempfile.mkdtemp(dir=self.root.parent))
        # What an earlier process left has been on the disk for long.
        for path in (self.root, *self.root.rglob("*")):
            self._synced(path)
        for name in _COUNTED:
            setattr(os, name, self._counting(name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self._real.items():
            setattr(os, name, function)
        shutil.rmtree(self._pins)

    def restore(self) -> None:
        """Put the folder into the state that the cut left; after the block."""
        top = self.root.stat().st_ino
        shutil.rmtree(self.root)
        self._rebuild(self.root, top)

    def _rebuild(self, folder: Path, number: int) -> None:
        folder.mkdir()
        for name, inner in self._names.get(number, {}).items():
            if inner in self._names or inner not in self._contents:
                self._rebuild(folder / name, inner)
            else:
                (folder / name).write_bytes(self._contents[inner])

    def _counting(self, name: str) -> Callable[..., Any]:
        def call(target: Any, *args: Any, **options: Any) -> Any:
            path = Path(os.readlink(f"/proc/self/fd/{target}")) if type(target) is int else target
            path = Path(path).absolute()
            if path != self.root and self.root not in path.parents:
                return self._real[name](target, *args, **options)
            self.writes += 1
            if self.cut is not None and self.writes >= self.cut:
                raise PowerCut
            result = self._real[name](target, *args, **options)
            if name == "fsync":
                self._synced(path)
            return result

        return call

    def _synced(self, path: Path) -> None:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            inside = {entry.name: entry.stat().st_ino for entry in path.iterdir()}
            self._names[status.st_ino] = inside
            for entry in path.iterdir():
                if entry.is_file():
                    self._pin(entry)
                    # A name without content: the file is empty until it is synced itself.
                    self._contents.setdefault(entry.stat().st_ino, b"")
        else:
            self._pin(path)
            self._contents[status.st_ino] = path.read_bytes()

    def _pin(self, path: Path) -> None:
        pin = self._pins / str(path.stat().st_ino)
        if not pin.exists():
            os.link(path, pin)
