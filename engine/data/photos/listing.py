"""The files of a folder in ImageNet's layout: train/CLASS and test/CLASS or val/CLASS.

A class folder may have folders of its own. No name leads out of the folder: a symbolic link that
does is a fault.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ...errors import EngineError
from ...progress import announce_once

log = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm")
_SUFFIX_RULE = f"images end in {', '.join(SUFFIXES)}"
# Labels and notes lie beside pictures, and file managers leave Thumbs.db and desktop.ini.
_COMPANIONS = (".txt", ".csv", ".json", ".xml", ".md", ".db", ".ini")


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
        EngineError: where a folder is missing, the two splits have different classes, or a class
            folder leads out of `folder` or has no picture.
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
        others: list[str] = []
        for label, name in enumerate(classes):
            if _leads_out(part / name, root):
                raise EngineError(
                    f"{folder / part.name / name}: a symbolic link that leads out of {folder}: "
                    "put the pictures there, or name the folder they are in"
                )
            others += _list_class(listing, part / name, label)
    except OSError as error:
        reason = error.strerror or error
        raise EngineError(f"{error.filename or folder}: cannot read it: {reason}") from None
    announce_others(folder / part.name, others)
    return listing


def is_image(name: str) -> bool:
    """Return whether a file's name has the suffix of a picture that is read."""
    return name.lower().endswith(SUFFIXES)


def no_images(folder: Path, others: Collection[str], hint: str = "") -> EngineError:
    """Return the error of a class folder that has no picture.

    Args:
        others: the names of the files in it.
        hint: a clause that the line ends with.
    """
    found = f", but {_by_suffix(others)}" if others else ""
    return EngineError(f"{folder}: holds no image{found}: {_SUFFIX_RULE}{hint}")


def announce_others(part: Path, others: Collection[str]) -> None:
    """Say once how many files in a split's class folders are not read.

    Args:
        others: the names of the files that are no pictures; labels and notes among them are usual,
            and are not counted.
    """
    if unread := [name for name in others if not name.lower().endswith(_COMPANIONS)]:
        announce_once(
            log,
            f"{part}: the engine does not read {_by_suffix(unread)} in its class folders: "
            f"{_SUFFIX_RULE}",
        )


def _by_suffix(names: Collection[str]) -> str:
    """Return "3 other files (2 .tiff, 1 .gif)", the most frequent suffixes first."""
    counts = Counter(Path(name).suffix.lower() or "without a suffix" for name in names)
    parts = [f"{count:,} {suffix}" for suffix, count in counts.most_common(5)]
    if len(counts) > len(parts):
        parts.append("...")
    total = counts.total()
    return f"{total:,} other file{'s' if total > 1 else ''} ({', '.join(parts)})"


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


def _list_class(listing: Listing, folder: Path, label: int) -> list[str]:
    """Add a class's pictures to the listing; return the names of the other files."""
    others = []
    before = len(listing.names) + len(listing.faults)
    for entry in _files(folder):
        name = os.path.relpath(entry.path, listing.folder)
        if not is_image(entry.name):
            others.append(entry.name)
            continue
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
    if len(listing.names) + len(listing.faults) == before:
        raise no_images(folder, others)
    return others


def _files(folder: Path) -> Iterator[os.DirEntry[str]]:
    """Give the files that are not hidden, from the folders below too, in order of names."""
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path))
        else:
            yield entry


def _leads_out(path: Path, root: Path) -> bool:
    return not path.resolve().is_relative_to(root)
