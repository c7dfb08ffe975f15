"""The cache of parsed data sets: a memory-mapped file of pixels and labels for each split.

A file is ROOT/cache/NAME-SPLIT-KEY.safetensors. KEY stands for the version of this format and for
the names, sizes and times of the source files: where one of them changes, another file is made and
the old one is removed. The file is written beside its place and renamed, so two processes may write
it at once. Every read checks the content's SHA-256; a damaged file is announced and made again. A
full disk, or a folder that cannot be written, costs the cache and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import EngineError
from ..files import atomic

VERSION = 1
log = logging.getLogger(__name__)

Parsed = tuple[Tensor, Tensor, tuple[str, ...]]  # uint8 [N, C, H, W], int64 [N], classes


def cached(folder: Path, name: str, sources: Iterable[Path], parse: Callable[[], Parsed]) -> Parsed:
    """Return the result of `parse`, from the cache in `folder` if its `sources` have not changed.

    EngineError: as `parse` raises it.
    """
    path = folder / f"{name}-{_key(sources)}.safetensors"
    if path.exists():
        try:
            return _read(path)
        except (SafetensorError, OSError, KeyError, ValueError) as e:
            log.warning("%s is damaged (%s): parsing the data set again", path, _line(e))
    parsed = parse()
    try:
        _write(path, parsed)
    except EngineError as e:
        log.warning("no parsed copy is kept: %s", e)
        return parsed
    for old in folder.glob(f"{name}-????????????.safetensors"):
        if old != path:
            old.unlink(missing_ok=True)
    return parsed


def _key(sources: Iterable[Path]) -> str:
    found = hashlib.sha256(f"version {VERSION}".encode())
    for path in sources:
        status = path.stat()
        found.update(f"\n{path} {status.st_size} {status.st_mtime_ns}".encode())
    return found.hexdigest()[:12]


def _write(path: Path, parsed: Parsed) -> None:
    images, labels, classes = parsed
    about = {"sha256": _sum(images, labels, classes), "classes": json.dumps(classes)}
    try:
        with atomic(path) as draft:
            save_file({"images": images.contiguous(), "labels": labels.contiguous()}, draft, about)
    except SafetensorError as e:  # a full disk, for one
        raise EngineError(f"cannot write {path}: {_line(e)}") from None


def _read(path: Path) -> Parsed:
    if not path.is_file():
        raise ValueError("not a regular file")
    with safe_open(str(path), framework="pt") as file:
        about = file.metadata() or {}
        # The file is mapped: its pages are read when they are touched, and shared by all processes.
        images, labels = file.get_tensor("images"), file.get_tensor("labels")
    if images.dtype != torch.uint8 or images.dim() != 4 or labels.dtype != torch.int64:
        raise ValueError("it holds something else")
    classes = tuple(json.loads(about["classes"]))
    if about["sha256"] != _sum(images, labels, classes):
        raise ValueError("its content is not what it was")
    return images, labels, classes


def _sum(images: Tensor, labels: Tensor, classes: tuple[str, ...]) -> str:
    found = hashlib.sha256(repr((tuple(images.shape), tuple(labels.shape), classes)).encode())
    for t in (images, labels):
        found.update(t.contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
