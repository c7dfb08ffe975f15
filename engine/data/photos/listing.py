"""The files of a folder in ImageNet's layout: train/CLASS and test/CLASS or val/CLASS.

A class folder may have folders of its own. No name leads out of the folder: a symbolic link that
does is a fault.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ...errors import EngineError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm")


@dataclass
class Listing:
    """Hold the files of one split, in the order of their classes and names.

    Attributes:
        folder: the folder of all splits, without symbolic links.
        names: of the files, relative to `folder`.
        labels: a class for each file; sizes [bytes] and times [ns since 1970] likewise.
        faults: (name, reason) of every file that must not be opened.
    """

    folder: Path
    classes: tuple[str, ...]
    names: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)


def list_files(folder: Path, split: str) -> Listing:
    """List the files of "train" or "test"; without a folder `test` of classes, `val` is read.

    Raises:
        EngineError: where a folder is missing, the two splits have different classes, a class
            folder leads out of `folder`, or there is no file at all.
    """
    try:
        root = folder.resolve()
        classes = _classes(root / "train")
        test = _test_folder(root)
        if other := sorted(set(_classes(test)) ^ set(classes)):
            has, lacks = ("train", test.name) if other[0] in classes else (test.name, "train")
            raise EngineError(
                f"{folder}: {has} has the class folder {other[0]} and {lacks} has not "
                f"({len(other)} such in all): both need the same classes"
            )
        listing = Listing(root, tuple(classes))
        part = root / "train" if split == "train" else test
        for label, name in enumerate(classes):
            if _leads_out(part / name, root):
                raise EngineError(
                    f"{folder / part.name / name}: a symbolic link that leads out of {folder}: "
                    "put the pictures there, or name the folder they are in"
                )
            _list_class(listing, part / name, label)
    except OSError as error:
        reason = error.strerror or error
        raise EngineError(f"{error.filename or folder}: cannot read it: {reason}") from None
    if not listing.names and not listing.faults:
        raise EngineError(
            f"{folder / part.name}: no pictures in class folders ({', '.join(SUFFIXES)})"
        )
    return listing


def fixed_order(count: int) -> Tensor:
    """Return the one shuffled order of `count` images, int64 [count].

    Files often lie by class; in this order the first N images stand for all classes.
    """
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def _test_folder(root: Path) -> Path:
    test = root / "test"
    # ImageNet's own test folder has no classes, because its labels are not published.
    return test if test.is_dir() and _subfolders(test) else root / "val"


def _classes(part: Path) -> list[str]:
    if not part.is_dir():
        raise EngineError(
            f"{part}: missing: a folder of pictures has train/CLASS/*.jpg, and test/CLASS or "
            "val/CLASS"
        )
    classes = _subfolders(part)
    if len(classes) < 2:
        raise EngineError(f"{part}: {len(classes)} class folders: at least two are needed")
    return classes


def _subfolders(part: Path) -> list[str]:
    with os.scandir(part) as entries:
        return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())


def _list_class(listing: Listing, folder: Path, label: int) -> None:
    for entry in _files(folder):
        name = os.path.relpath(entry.path, listing.folder)
        if entry.is_symlink() and _leads_out(Path(entry.path), listing.folder):
            listing.faults.append((name, "a symbolic link that leads out of the folder"))
        elif not entry.is_file():
            # Opening a FIFO waits for a writer; a link to a folder may lead in a circle.
            listing.faults.append((name, "not a regular file"))
        else:
            status = entry.stat()
            listing.names.append(name)
            listing.labels.append(label)
            listing.sizes.append(status.st_size)
            listing.times.append(status.st_mtime_ns)


def _files(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Give the entries with a picture's suffix, from the folders below too, in order of names."""
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path))
        elif entry.name.lower().endswith(SUFFIXES):
            yield entry


def _leads_out(path: Path, root: Path) -> bool:
    return not path.resolve().is_relative_to(root)
