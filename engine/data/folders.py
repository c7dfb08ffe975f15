"""Folders of pictures as data sets: the known ones, their facts, and whether they are whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import EngineError
from .photos import Damaged, Framing, Index, Photos, index_of, of_index
from .photos.index import each_file
from .photos.listing import list_files

SPLITS = ("train", "test")


@dataclass(frozen=True)
class Known:
    """Hold the facts of a published folder of pictures.

    Attributes:
        counts: pictures by split; classes: their number.
    """

    name: str
    counts: dict[str, int]
    classes: int
    homepage: str


KNOWN = {
    known.name: known
    for known in (
        Known("imagenet", {"train": 1_281_167, "test": 50_000}, 1000, "https://image-net.org"),
        Known(
            "imagenette",
            {"train": 9_469, "test": 3_925},
            10,
            "https://github.com/fastai/imagenette",
        ),
        Known(
            "tiny-imagenet",
            {"train": 100_000, "test": 10_000},
            200,
            "http://cs231n.stanford.edu",
        ),
    )
}


def load(
    folder: Path,
    split: str,
    cache: Path,
    *,
    size: tuple[int, int],
    resize: int,
    damaged: Damaged = "refuse",
    threads: int = 2,
) -> Photos:
    """Return the pictures of a split, test pictures in one fixed shuffled order.

    Args:
        size, resize: of the centre crop, as in `Framing`.
    Raises:
        EngineError: as `index_of` does; for damaged files, where they are refused.
    """
    index = index_of(folder, split, cache)
    return of_index(index, Framing(size, resize), damaged, threads, order=split == "test")


def facts(folder: Path, cache: Path) -> dict[str, Any]:
    """Return the one shape of all pictures (else None), counts, classes, and sizes by split.

    Raises:
        EngineError: as `index_of` does.
    """
    indices = {split: index_of(folder, split, cache) for split in SPLITS}
    sides = {tuple(i.sizes.amin(0).tolist()) for i in indices.values()}
    sides |= {tuple(i.sizes.amax(0).tolist()) for i in indices.values()}
    channels = 1 if all(index.grey for index in indices.values()) else 3
    return {
        "shape": (channels, *sides.pop()) if len(sides) == 1 else None,
        **{split: len(index.names) for split, index in indices.items()},
        "classes": indices["train"].classes,
        "pictures": {split: _sizes(index) for split, index in indices.items()},
    }


def _sizes(index: Index) -> dict[str, Any]:
    """Return the least, median and largest height and width [pixels], and the damaged files."""

    def spread(values: Tensor) -> dict[str, int]:
        return {
            "min": int(values.amin()),
            "median": int(values.median()),
            "max": int(values.amax()),
        }

    height, width = index.sizes.unbind(1)
    return {
        "count": len(index.names),
        "height": spread(height),
        "width": spread(width),
        "megabytes": round(int(index.bytes.sum()) / 1e6, 1),
        "damaged": len(index.faults),
        "first_damaged": [f"{name}: {reason}" for name, reason in index.faults[:5]],
    }


def faults(folder: Path) -> Iterator[tuple[str, bool, str]]:
    """Decode every picture; give (file or split, whether it is whole, what was found)."""
    for split in SPLITS:
        try:
            listing = list_files(folder, split)
            found = [(listing.folder / name, reason) for name, reason in listing.faults]
            for position, head in each_file(listing, f"verifying {split}", thorough=True):
                if isinstance(head, str):
                    found.append((listing.folder / listing.names[position], head))
        except EngineError as error:
            yield f"{folder}: {split}", False, str(error)
            continue
        yield from ((str(file), False, reason) for file, reason in found)
        if not found:
            whole = f"{len(listing.names):,} pictures of {len(listing.classes)} classes are whole"
            yield f"{folder}: {split}", True, whole
