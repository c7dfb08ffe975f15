"""Reading a data set: where it lies, whether it is whole, its images and labels.

A data set lies in the folder ROOT/NAME, where ROOT is `$ENGINE_DATA`, else `robust-engine` in the
user's cache folder. Its files may be compressed as published or not: every SHA-256 here is of the
decompressed bytes, so the publisher's file, Debian's repacking of it and an unpacked copy are held
to one and the same sum. A folder with a `SHA256SUMS` of its own (as `sha256sum * > SHA256SUMS`
writes it) holds the user's data in the same format: it is checked against that list instead, and
may have fewer samples.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from ..errors import EngineError
from . import folders, own, pickles, readers
from .cache import Parsed, cached
from .catalogue import DIGITS, SPECS, Part, Spec, find_spec
from .photos import Damaged, Photos

Split = Literal["train", "test"]
SUMS = "SHA256SUMS"


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Hold one split of a data set, in memory or as a folder of pictures."""

    name: str
    split: str
    images: torch.Tensor | Photos = field(repr=False)  # uint8 [N, C, H, W], contiguous
    labels: torch.Tensor = field(repr=False)  # int64 [N], 0 .. len(classes) - 1
    classes: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True)
class Info:
    """Hold the facts that `engine data info` shows of a data set."""

    name: str
    shape: tuple[int, int, int] | None  # C, H, W; None: pictures of several sizes
    train: int  # samples
    test: int
    classes: tuple[str, ...]
    files: tuple[str, ...]  # as published; empty for a data set without files
    homepage: str
    folder: Path | None  # the folder that `load` reads; None: the files are absent
    own_sums: bool  # the folder has its own SHA256SUMS: not the published data
    pictures: dict[str, Any] | None = None  # of a folder of pictures: sizes by split


@dataclass(frozen=True)
class FileCheck:
    """Hold the outcome of `verify` for one file."""

    file: str
    ok: bool
    detail: str


def names() -> tuple[str, ...]:
    """Return the names of the known data sets."""
    return (*SPECS, *folders.KNOWN)


def folder_of(name: str, root: Path | str | None = None) -> Path | None:
    """Return the folder of a set of pictures, which may be absent; None for any other data set."""
    if name in folders.KNOWN:
        return data_root(root) / name
    path = Path(own.absolute(name)) if own.is_path(name) else None
    return path if path is not None and path.is_dir() else None


def photos(
    name: str, split: Split, *, size: tuple[int, int], resize: int, damaged: Damaged, threads: int
) -> ImageSet:
    """Return one split of a folder of pictures, which are streamed (see `folders.load`).

    EngineError: a data set that is no folder of pictures, or is absent, or as `folders.load`.
    """
    folder = folder_of(name)
    if folder is None:
        if own.is_path(name):
            own.check_exists(Path(own.absolute(name)))
        raise EngineError(
            f"data.size streams folders of pictures, and {name} is none: drop data.size"
        )
    if not folder.is_dir():
        raise EngineError(
            f"{name}: not found: put it into {folder} as train/CLASS and val/CLASS (docs/data.md)"
        )
    held = folders.load(
        folder,
        split,
        data_root() / "cache",
        size=size,
        resize=resize,
        damaged=damaged,
        threads=threads,
    )
    return ImageSet(name, split, held, held.labels, held.index.classes)


def info(name: str, root: Path | str | None = None, *, read: bool = True) -> Info:
    """Return the facts of a data set and its folder on this machine. EngineError: unknown name.

    Args:
        read: of a known folder of pictures, read the pictures' sizes where it is present; False:
            give its published facts.
    """
    folder = folder_of(name, root)
    if folder is not None:
        return _folder_info(name, folder, data_root(root) / "cache", read)
    if own.is_path(name):
        train, test = (load(name, split, root) for split in get_args(Split))
        assert isinstance(train.images, torch.Tensor)
        return Info(
            name=name,
            shape=(train.images.shape[1], train.images.shape[2], train.images.shape[3]),
            train=len(train.images),
            test=len(test.images),
            classes=train.classes,
            files=(),
            homepage="",
            folder=Path(own.absolute(name)),
            own_sums=False,
        )
    spec = find_spec(name)
    folder = home_of(spec, root)
    if folder and _incomplete(spec, folder):
        folder = None
    return Info(
        name=spec.name,
        shape=spec.shape,
        train=spec.counts["train"],
        test=spec.counts["test"],
        classes=spec.classes,
        files=tuple(spec.files),
        homepage=spec.homepage,
        folder=folder,
        own_sums=folder is not None and (folder / SUMS).exists(),
    )


def _folder_info(name: str, folder: Path, cache: Path, read: bool) -> Info:
    known, present = folders.KNOWN.get(name), folder.is_dir()
    if known is not None and not (read and present):
        found: dict[str, Any] = {
            "shape": None,
            "classes": tuple(map(str, range(known.classes))),
            **known.counts,
        }
    else:
        found = folders.facts(folder, cache)
    homepage = known.homepage if known else ""
    place = folder if present else None
    return Info(name, files=(), homepage=homepage, folder=place, own_sums=False, **found)


def load(name: str, split: Split, root: Path | str | None = None) -> ImageSet:
    """Return one split of a data set: a known one by name, a user's own by path (see `own`).

    The files are read once, with their checksums verified; later calls read the `cache`. No network
    is used. EngineError: unknown name or split; a file that is absent, unreadable, damaged or of
    another kind, named in one line.
    """
    if split not in get_args(Split):
        raise EngineError(f"split {split!r} is not known: it is train or test")
    folder = data_root(root) / "cache"
    if name in folders.KNOWN:
        raise EngineError(f"{name}: a folder of pictures, which is streamed: set data.size = 224")
    if own.is_path(name):
        path = Path(own.absolute(name))
        key = f"own-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}-{split}"
        images, labels, classes = cached(folder, key, own.files(path), lambda: _own(path, split))
        return ImageSet(name, split, images, labels, classes)
    spec = find_spec(name)
    if spec is DIGITS:
        images, labels, classes = _tensors(spec, *_digits(split))
    else:
        sources = _sources(spec, split, root)
        images, labels, classes = cached(
            folder,
            f"{spec.name}-{split}",
            sources,
            lambda: _tensors(spec, *_read_split(spec, split, root)),
        )
    return ImageSet(spec.name, split, images, labels, classes)


def load_extra(name: str, like: ImageSet, root: Path | str | None = None) -> ImageSet:
    """Return extra training images for a data set, mapped from the `cache`.

    Args:
        name: an .npz or .safetensors file with `image` and `label` (`own.read_extra`), or any data
            set by name or path, of which the training images are taken.
        like: the set that is trained on.
    Raises:
        EngineError: as `load` does; for images of another size, or labels that `like` has not.
    """
    path, classes = Path(own.absolute(name)), len(like.classes)
    if own.is_path(name) and path.suffix in own.FILES and not own.has_splits(path):
        key = f"extra-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}-{classes}"

        def parse() -> Parsed:
            images, labels = own.read_extra(path, classes)
            return torch.from_numpy(images), torch.from_numpy(labels), like.classes

        images, labels, _ = cached(data_root(root) / "cache", key, own.files(path), parse)
        found = ImageSet(name, "train", images, labels, like.classes)
    else:
        found = load(name, "train", root)
    if found.images.shape[1:] != like.images.shape[1:]:
        raise EngineError(
            f"{name}: extra images of {'x'.join(map(str, found.images.shape[1:]))}, where "
            f"{like.name} has {'x'.join(map(str, like.images.shape[1:]))}: bring them to one shape"
        )
    if len(found.classes) > classes:
        raise EngineError(
            f"{name}: {len(found.classes)} classes, where {like.name} has {classes}: every label "
            f"must lie in 0..{classes - 1}"
        )
    return found


def _tensors(spec: Spec, images: np.ndarray, labels: np.ndarray) -> Parsed:
    return (
        # The readers' arrays are views of read-only bytes.
        torch.from_numpy(images.reshape(-1, *spec.shape).copy()),
        torch.from_numpy(labels.astype(np.int64)),
        spec.classes,
    )


def _own(path: Path, split: str) -> Parsed:
    (images, labels), classes = own.read(path, split)
    return torch.from_numpy(images), torch.from_numpy(labels), classes


def _sources(spec: Spec, split: str, root: Path | str | None) -> list[Path]:
    """Return the files of a split, and the list of their sums."""
    folder = home_of(spec, root)
    if folder is None:
        return []  # reading the split names the missing file
    held = present(edition_in(spec, folder), folder, edition_in(spec, folder).parts[split])
    sums = folder / SUMS
    return [*filter(Path.is_file, held), *([sums] if sums.is_file() else [])]


def verify(name: str, root: Path | str | None = None) -> list[FileCheck]:
    """Read and check every file of a data set; report damaged and missing ones too.

    EngineError: an unknown name, or a path where nothing lies.
    """
    if (pictures := folder_of(name, root)) is not None:
        return [FileCheck(*found) for found in folders.faults(pictures)]
    if own.is_path(name):
        path = Path(own.absolute(name))
        own.check_exists(path)
        return [
            FileCheck(f"{path}: {split}", *_outcome(partial(own.read, path, split)))
            for split in get_args(Split)
        ]
    spec = find_spec(name)
    if spec is DIGITS:
        return [FileCheck("scikit-learn's embedded digits", *_outcome(partial(_digits, "train")))]
    folder = home_of(spec, root) or data_root(root) / spec.name
    spec = edition_in(spec, folder)
    result = []
    for file, parts in spec.files.items():
        for path, held in present(spec, folder, parts).items():
            ok, detail = _outcome(partial(read_parts, spec, path, held))
            if ok and (folder / SUMS).exists():
                detail = f"whole, by the folder's own {SUMS}"
            result.append(FileCheck(str(path), ok, detail))
        if _missing(spec, folder, parts):
            result.append(FileCheck(str(folder / file), False, "missing"))
    return result


def _outcome(read: Callable[[], object]) -> tuple[bool, str]:
    try:
        read()
    except EngineError as e:
        return False, str(e)
    return True, "whole"


def data_root(root: Path | str | None = None) -> Path:
    """Return `root`, `$ENGINE_DATA`, or `robust-engine` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if root is None:
        root = os.environ.get("ENGINE_DATA") or None
    try:
        if root is not None:
            return Path(root).expanduser().absolute()
        cache = os.environ.get("XDG_CACHE_HOME", "")
        # The XDG Base Directory Specification declares a relative path void.
        base = Path(cache) if Path(cache).is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        raise EngineError("no home folder is known: set ENGINE_DATA to a folder for data") from None
    return base / "robust-engine"


def system_folders(spec: Spec) -> list[Path]:
    """Return the folders in which a package of the system puts the files, present or not."""
    if not spec.debian:
        return []
    shares = [str(Path(sys.prefix) / "share")]
    shares += (os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share").split(":")
    return [Path(s) / "datasets" / spec.name for s in dict.fromkeys(shares) if os.path.isabs(s)]


def home_of(spec: Spec, root: Path | str | None = None) -> Path | None:
    """Return the folder to read: the first one that has any file of the data set."""
    if spec is DIGITS:
        import sklearn

        return Path(sklearn.__file__).parent / "datasets" / "data"
    for folder in (data_root(root) / spec.name, *system_folders(spec)):
        edition = edition_in(spec, folder)
        if present(edition, folder, edition.all_parts):
            return folder
    return None


def edition_in(spec: Spec, folder: Path) -> Spec:
    """Return the edition of `spec` in `folder`: the Python edition if only that is there."""
    other = spec.python
    if other is None or present(spec, folder, spec.all_parts):
        return spec
    return other if present(other, folder, other.all_parts) else spec


def present(spec: Spec, folder: Path, parts: Iterable[Part]) -> dict[Path, tuple[Part, ...]]:
    """Return the files of `folder` that hold `parts`, with their parts."""
    found: dict[Path, tuple[Part, ...]] = {}
    for part in parts:
        candidates: tuple[str, ...]
        if spec.archive:
            candidates = (spec.archive, f"{spec.folder}/{part.name}", part.name)
        else:
            candidates = (f"{part.name}.gz", part.name)
        for path in map(folder.joinpath, candidates):
            if os.path.lexists(path):
                found[path] = (*found.get(path, ()), part)
                break
    return found


def _incomplete(spec: Spec, folder: Path) -> bool:
    spec = edition_in(spec, folder)
    return bool(_missing(spec, folder, spec.all_parts))


def _missing(spec: Spec, folder: Path, parts: Iterable[Part]) -> list[str]:
    parts = tuple(parts)
    held = [part for some in present(spec, folder, parts).values() for part in some]
    return [part.name for part in parts if part not in held]


def read_parts(
    spec: Spec, path: Path, parts: tuple[Part, ...], title: str | None = None
) -> dict[str, tuple[np.ndarray, ...]]:
    """Return the arrays of `parts`, by name, from the one file that holds them; verify all of them.

    IDX: one uint8 array, [N, 28, 28] or [N]. CIFAR: images uint8 [N, 3, 32, 32] and labels uint8
    [N]. `title` is the name to show, if not `path`. EngineError: for any fault of the file.
    """
    title = title or str(path)
    own = _check_own_sum(spec, path)
    if spec.archive and spec.archive in path.name:  # a draft has a longer name
        members = {f"{spec.folder}/{part.name}": part.size for part in parts}
        contents = readers.read_tar_gz(path, title, members, size_limit(spec.all_parts))
        data = {part.name: contents[f"{spec.folder}/{part.name}"] for part in parts}
    else:
        data = {part.name: readers.read_file(path, title, part.size) for part in parts}
    arrays: dict[str, tuple[np.ndarray, ...]] = {}
    for part in parts:
        shown = f"{title}: {part.name}" if len(data) > 1 else title
        arrays[part.name] = _parse(spec, part, data[part.name], shown)
        if not own and (difference := part.differs(data[part.name])):
            raise EngineError(
                f"{shown}: its content has {difference}: damaged, or not the published file"
            )
    return arrays


def size_limit(parts: Iterable[Part]) -> int:
    """Return the most bytes that a file of `parts` may decompress to, with an archive's page."""
    return sum(part.size for part in parts) + (1 << 20)


def _parse(spec: Spec, part: Part, data: bytes, title: str) -> tuple[np.ndarray, ...]:
    most = part.size // (len(spec.label_ranges) + readers.CIFAR_PIXELS)
    if spec.pickles:
        return pickles.parse(data, title, spec.pickles, most)
    if spec.archive:
        return readers.parse_cifar(data, title, spec.label_ranges, most)
    if "-labels-" in part.name:
        labels = readers.parse_idx(data, title, (), part.size - 8)
        readers.check_labels(labels, title, len(spec.classes))
        return (labels,)
    item = spec.shape[1:]
    return (readers.parse_idx(data, title, item, (part.size - 16) // prod(item)),)


def _read_split(spec: Spec, split: str, root: Path | str | None) -> tuple[np.ndarray, np.ndarray]:
    folder = home_of(spec, root)
    if folder is None:
        title = data_root(root) / spec.name
        raise EngineError(f"{spec.name}: not found in {title}: run `engine data fetch {spec.name}`")
    spec = edition_in(spec, folder)
    if missing := _missing(spec, folder, spec.parts[split]):
        raise EngineError(f"{folder / missing[0]}: missing: run `engine data fetch {spec.name}`")
    arrays: dict[str, tuple[np.ndarray, ...]] = {}
    try:
        for path, held in present(spec, folder, spec.parts[split]).items():
            arrays |= read_parts(spec, path, held)
    except EngineError as e:
        if os.path.lexists(folder / SUMS):
            raise
        raise EngineError(f"{e}: `engine data fetch {spec.name}` replaces it") from None
    ordered = [arrays[part.name] for part in spec.parts[split]]
    if spec.archive:
        images, labels = (np.concatenate(column) for column in zip(*ordered, strict=True))
        return images, labels
    (images,), (labels,) = ordered
    if len(images) != len(labels):
        raise EngineError(
            f"{folder}: {len(images):,} {split} images, but {len(labels):,} {split} labels"
        )
    return images, labels


def _check_own_sum(spec: Spec, path: Path) -> bool:
    """Return whether the folder's own SHA256SUMS covers `path`; EngineError if the sums differ."""
    folder = path.parent.parent if path.parent.name == (spec.folder or None) else path.parent
    sums = folder / SUMS
    if not os.path.lexists(sums):
        return False
    lines = readers.read_file(sums, str(sums), 1 << 20).decode(errors="replace").splitlines()
    listed = {line[66:].strip(): line[:64].lower() for line in lines}
    name = path.relative_to(folder).as_posix()
    if name not in listed:
        raise EngineError(f"{path}: not listed in the folder's own {SUMS}")
    limit = readers.packed_limit(size_limit(spec.all_parts))
    with readers.open_file(path, str(path), limit) as file:
        got = hashlib.file_digest(file, "sha256").hexdigest()
    if got != listed[name]:
        raise EngineError(f"{path}: its SHA-256 is not the one in the folder's own {SUMS}")
    return True


def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's 8x8 digits, 0..16 scaled to 0..255, split by a fixed permutation."""
    try:
        from sklearn.datasets import load_digits

        bunch = load_digits()
    except (ImportError, OSError, ValueError) as e:
        raise EngineError(f"digits: scikit-learn cannot give them: {e}") from None
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    # NumPy promises a fixed stream for RandomState, and not for Generator.
    order = np.random.RandomState(0).permutation(len(images))
    train = DIGITS.counts["train"]
    chosen = order[:train] if split == "train" else order[train:]
    return images[chosen], bunch.target[chosen]
