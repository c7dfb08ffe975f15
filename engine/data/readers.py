"""Strict readers of the IDX and CIFAR binary formats, from files that may be anything.

Formats: IDX as on the MNIST page (big-endian magic 00 00 08 rank, one uint32 a dimension, then the
bytes), plain or as one gzip member; CIFAR records as on the CIFAR page (one label byte, or coarse
and fine label, then 3 x 32 x 32 bytes, channels first), plain or as members of a tar.gz.

Nothing is written to disk, nothing is unpickled, and no more is ever decompressed than the caller's
`limit`. `title` is the file's name as the user should read it; every fault is an `EngineError` that
begins with that name.
"""

from __future__ import annotations

import stat
import struct
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

from ..errors import EngineError

_CHUNK = 1 << 20
CIFAR_PIXELS = 3 * 32 * 32


@contextmanager
def open_file(path: Path, title: str, limit: int) -> Iterator[BufferedReader]:
    """Open a non-empty regular file of at most `limit` bytes for reading."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise EngineError(f"{title}: not a regular file")
        if status.st_size == 0:
            raise EngineError(f"{title}: the file is empty")
        if status.st_size > limit:
            raise EngineError(
                f"{title}: {status.st_size:,} bytes, where at most {limit:,} are possible"
            )
        with path.open("rb") as file:
            yield file
    except OSError as e:
        raise EngineError(f"{title}: cannot read it: {e.strerror or e}") from None


class _Gunzip:
    """Decompress a gzip file of one member, at most `limit` bytes; check CRC, length and end."""

    def __init__(self, file: BinaryIO, title: str, limit: int) -> None:
        self._file, self._title, self._limit, self._left = file, title, limit, limit
        self._zlib = zlib.decompressobj(wbits=31)
        self._pending = b""

    def read(self, size: int) -> bytes:
        """Return between 1 and `size` bytes, or none at the end."""
        out = b""
        while not out and not self._zlib.eof:
            self._pending = self._pending or self._file.read(_CHUNK)
            at_end = not self._pending
            try:
                out = self._zlib.decompress(self._pending, min(size, self._left + 1))
            except zlib.error as e:
                reason = str(e).rpartition(": ")[2]
                raise EngineError(f"{self._title}: damaged gzip data ({reason})") from None
            if at_end and not out and not self._zlib.eof:
                raise EngineError(f"{self._title}: truncated: the gzip data end too early")
            self._pending = self._zlib.unconsumed_tail
        if self._zlib.eof and (self._zlib.unused_data or self._file.read(1)):
            raise EngineError(f"{self._title}: more bytes after the end of the gzip data")
        self._left -= len(out)
        if self._left < 0:
            raise EngineError(
                f"{self._title}: decompresses to more than {self._limit:,} bytes, all it may hold"
            )
        return out

    def read_all(self) -> bytes:
        return b"".join(iter(lambda: self.read(max(_CHUNK, self._left + 1)), b""))


def packed_limit(limit: int) -> int:
    """Return the most bytes of a gzip file of `limit` bytes: compression adds under 0.1 %."""
    return limit + limit // 1000 + (1 << 16)


def read_file(path: Path, title: str, limit: int) -> bytes:
    """Return all bytes, at most `limit`, of a plain or gzip file (the first two bytes tell)."""
    with open_file(path, title, packed_limit(limit)) as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if packed:
            return _Gunzip(file, title, limit).read_all()
        data = file.read(limit + 1)
    if len(data) > limit:
        raise EngineError(f"{title}: more than {limit:,} bytes, all it may hold")
    return data


def read_tar_gz(path: Path, title: str, members: Mapping[str, int], limit: int) -> dict[str, bytes]:
    """Return the named members of a tar.gz, each of at most the given size.

    `limit` bounds the whole tar [bytes].
    """
    with open_file(path, title, packed_limit(limit)) as file:
        return read_tar(_Gunzip(file, title, limit), title, members)


def read_tar(
    stream: _Gunzip | BinaryIO, title: str, members: Mapping[str, int]
) -> dict[str, bytes]:
    """Return the named members of a tar stream that the caller has bounded."""
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(
            fileobj=cast(BinaryIO, stream), mode="r|", bufsize=_CHUNK, errorlevel=2
        ) as tar:
            for entry in tar:
                name = entry.name.removeprefix("./")
                if name.startswith("/") or ".." in name.split("/"):
                    raise EngineError(f"{title}: member {entry.name!r} points out of the archive")
                if name not in members:
                    continue
                if name in found:
                    raise EngineError(f"{title}: member {name} is there twice")
                if not entry.isreg() or entry.issparse():
                    raise EngineError(f"{title}: member {name} is not a plain file")
                if entry.size > members[name]:
                    raise EngineError(
                        f"{title}: member {name} has {entry.size:,} bytes,"
                        f" where at most {members[name]:,} are possible"
                    )
                source = tar.extractfile(entry)
                found[name] = b"" if source is None else source.read()
        while stream.read(_CHUNK):  # the checksum stands at the end
            pass
    # A nonsensical header makes tarfile raise ValueError and others.
    except (tarfile.TarError, EOFError, ValueError, OverflowError, IndexError, KeyError) as e:
        raise EngineError(f"{title}: damaged tar data ({' '.join(str(e).split())})") from None
    if missing := [name for name in members if name not in found]:
        raise EngineError(f"{title}: member {missing[0]} is missing")
    return found


def parse_idx(data: bytes, title: str, item: tuple[int, ...], most: int) -> np.ndarray:
    """Return the uint8 [N, *item], read-only, of an IDX file with 1 <= N <= `most`."""
    header = 4 * (2 + len(item))
    magic = bytes((0, 0, 8, 1 + len(item)))
    if data[:4] != magic:
        raise EngineError(
            f"{title}: not the IDX file it should be: it begins with {data[:4].hex() or 'nothing'},"
            f" not with {magic.hex()}"
        )
    if len(data) < header:
        raise EngineError(f"{title}: truncated: {len(data)} bytes are less than the IDX header")
    count, *dims = struct.unpack(f">{1 + len(item)}I", data[4:header])
    if tuple(dims) != item:
        raise EngineError(
            f"{title}: items of {' x '.join(map(str, dims))}, not {' x '.join(map(str, item))}"
        )
    if not 1 <= count <= most:
        raise EngineError(f"{title}: says it holds {count:,} items; 1 to {most:,} are possible")
    _need_length(data, title, header + count * prod(item), f"{count:,} items")
    return np.frombuffer(data, np.uint8, offset=header).reshape(count, *item)


def parse_cifar(
    data: bytes, title: str, label_ranges: tuple[int, ...], most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 [N, 3, 32, 32] and labels uint8 [N], 1 <= N <= `most`, of CIFAR records.

    `label_ranges` has the number of classes for each label byte of a record; the last label is
    returned.
    """
    record = len(label_ranges) + CIFAR_PIXELS
    count = max(1, -(-len(data) // record))
    if count > most:
        raise EngineError(f"{title}: {count:,} records; at most {most:,} are possible")
    _need_length(data, title, count * record, f"{count:,} records of {record} bytes")
    records = np.frombuffer(data, np.uint8).reshape(count, record)
    for i, classes in enumerate(label_ranges):
        check_labels(records[:, i], title, classes)
    images = records[:, len(label_ranges) :].reshape(count, 3, 32, 32)
    return images, records[:, len(label_ranges) - 1]


def check_labels(labels: np.ndarray, title: str, classes: int) -> None:
    """Refuse a label outside 0 .. `classes` - 1."""
    bad = np.flatnonzero(labels >= classes)
    if bad.size:
        raise EngineError(
            f"{title}: label {labels[bad[0]]} of sample {bad[0]:,} is not in 0..{classes - 1}"
        )


def _need_length(data: bytes, title: str, length: int, what: str) -> None:
    if len(data) != length:
        fault = "truncated" if len(data) < length else "bytes left over at the end"
        raise EngineError(f"{title}: {fault}: {what} take {length:,} bytes, it has {len(data):,}")
