"""The index of a folder of pictures: names, labels, sizes, and the files that are damaged.

The headers are read once. The index is kept as a safetensors file under a key of all names, sizes
and times, so a changed folder is read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...errors import EngineError
from ...files import atomic
from ...progress import bar
from . import decode
from .listing import Listing, list_files

log = logging.getLogger(__name__)

VERSION = 1
# A larger file is no picture of `decode.PIXELS_LIMIT` pixels.
_FILE_LIMIT = 1 << 30
# Reading waits for the disk: more threads than cores.
_THREADS = 8
_CHUNK = 256
# So many headers take more than a second or two.
_LONG = 5000


@dataclass(frozen=True, eq=False)
class Index:
    """Hold the whole pictures of one split, and the faults of the others.

    Attributes:
        folder: all names are relative to it.
        labels: int64 [N], positions in `classes`.
        sizes: int32 [N, 2], (height, width) of the upright pictures [pixels].
        bytes: int64 [N], the files' lengths.
        plain: bool [N], whether DALI decodes the file to the same pixels as Pillow.
        grey: whether all pictures have one channel.
        faults: (name, reason) of the damaged files.
    """

    folder: Path
    classes: tuple[str, ...]
    names: list[str]
    labels: Tensor
    sizes: Tensor
    bytes: Tensor
    plain: Tensor
    grey: bool
    faults: list[tuple[str, str]]

    def path(self, row: int) -> Path:
        return self.folder / self.names[row]


def index_of(folder: Path, split: str, cache: Path) -> Index:
    """Return the index of "train" or "test", from the folder `cache` if nothing has changed.

    Raises:
        EngineError: as `list_files` does; where no file is a whole picture.
    """
    listing = list_files(folder, split)
    place = hashlib.sha256(str(listing.folder).encode(errors="surrogateescape")).hexdigest()[:8]
    path = cache / f"pictures-{place}-{split}-{_key(listing)}.safetensors"
    index = _read(path, listing) if path.exists() else None
    if index is None:
        index = _build(listing, f"{folder.name}, {split}")
        _keep(path, index)
        for old in cache.glob(f"pictures-{place}-{split}-*.safetensors"):
            if old != path:
                old.unlink(missing_ok=True)
    if not index.names:
        name, reason = index.faults[0]
        raise EngineError(f"{index.folder / name}: {reason}; no other file is a whole picture")
    return index


def read_file(path: Path, size: int) -> bytes:
    """Return a file of `size` bytes. EngineError: the reason, where it is another file by now."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb") as file:
            data = file.read(size + 1)
    except OSError as error:
        raise EngineError(f"cannot read it: {error.strerror or error}") from None
    if len(data) != size:
        raise EngineError("its length is not what it was when it was indexed")
    return data


def each_file(
    listing: Listing, title: str, *, thorough: bool = False
) -> Iterator[tuple[int, decode.Header | str]]:
    """Give (position, header or fault) of every file, in order, with progress on stderr.

    Args:
        thorough: decode every picture, not its header alone.
    """

    def one(position: int) -> decode.Header | str:
        size = listing.sizes[position]
        if size > _FILE_LIMIT:
            return f"{size:,} bytes: too large"
        try:
            data = read_file(listing.folder / listing.names[position], size)
            return decode.header(data, thorough=thorough)
        except EngineError as error:
            return str(error)

    total = len(listing.names)
    with ThreadPoolExecutor(_THREADS) as pool, contextlib.ExitStack() as shown:
        update: Callable[..., object] | None = None
        if thorough or total >= _LONG:
            progress = shown.enter_context(bar())
            update = partial(progress.update, progress.add_task(title, total=total, note=""))
        for first in range(0, total, _CHUNK):
            chunk = range(first, min(first + _CHUNK, total))
            yield from zip(chunk, pool.map(one, chunk), strict=True)
            if update is not None:
                update(completed=chunk[-1] + 1)


def _build(listing: Listing, title: str) -> Index:
    faults, kept = list(listing.faults), []
    heads: list[decode.Header] = []
    for position, found in each_file(listing, f"indexing {title}"):
        if isinstance(found, str):
            faults.append((listing.names[position], found))
        else:
            kept.append(position)
            heads.append(found)
    return Index(
        folder=listing.folder,
        classes=listing.classes,
        names=[listing.names[k] for k in kept],
        labels=torch.tensor([listing.labels[k] for k in kept], dtype=torch.int64),
        sizes=torch.tensor([h[:2] for h in heads], dtype=torch.int32).view(-1, 2),
        bytes=torch.tensor([listing.sizes[k] for k in kept], dtype=torch.int64),
        plain=torch.tensor([h.plain for h in heads], dtype=torch.bool),
        grey=all(h.grey for h in heads),
        faults=sorted(faults),
    )


def _key(listing: Listing) -> str:
    found = hashlib.sha256(f"version {VERSION} {listing.classes}".encode())
    for name, size, time in zip(listing.names, listing.sizes, listing.times, strict=True):
        found.update(f"\n{name} {size} {time}".encode(errors="surrogateescape"))
    found.update(repr(listing.faults).encode())
    return found.hexdigest()[:12]


def _keep(path: Path, index: Index) -> None:
    tensors = {
        "names": _packed(index.names),
        "labels": index.labels,
        "sizes": index.sizes,
        "bytes": index.bytes,
        "plain": index.plain,
    }
    about = {
        "sha256": _sum(tensors),
        "grey": json.dumps(index.grey),
        "faults": json.dumps(index.faults),
    }
    try:
        with atomic(path) as draft:
            save_file(tensors, draft, about)
    except (EngineError, SafetensorError) as error:
        log.warning("no index is kept: %s", " ".join(str(error).split()))


def _read(path: Path, listing: Listing) -> Index | None:
    """Return the kept index, or None where the file is damaged."""
    try:
        with safe_open(str(path), framework="pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if about["sha256"] != _sum(tensors):
            raise ValueError("its content is not what it was")
        names = bytes(tensors.pop("names").numpy()).decode(errors="surrogateescape")
        return Index(
            folder=listing.folder,
            classes=listing.classes,
            names=names.split("\n") if names else [],
            grey=json.loads(about["grey"]),
            faults=[(name, reason) for name, reason in json.loads(about["faults"])],
            **tensors,
        )
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        log.warning("%s is damaged (%s): indexing again", path, " ".join(str(error).split()))
        return None


def _packed(names: list[str]) -> Tensor:
    data = "\n".join(names).encode(errors="surrogateescape")
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def _sum(tensors: dict[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(f"{name} {tuple(tensors[name].shape)}".encode())
        found.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()
