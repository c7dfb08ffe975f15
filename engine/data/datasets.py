"""The data sets that the engine knows: what they are, where they lie, whether they are whole.

A data set lies in the folder ROOT/NAME, where ROOT is `$ENGINE_DATA`, else `robust-engine` in the
user's cache folder. Its files may be compressed as published or not: every SHA-256 here is of the
decompressed bytes, so the publisher's file, Debian's repacking of it and an unpacked copy are held to
one and the same sum. A folder with a `SHA256SUMS` of its own (as `sha256sum * > SHA256SUMS` writes it)
holds the user's data in the same format: it is checked against that list instead, and may have fewer
samples.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch

from engine.data import pickles, readers
from engine.errors import EngineError

Split = Literal["train", "test"]
SUMS = "SHA256SUMS"


@dataclass(frozen=True, eq=False)
class ImageSet:
    """One split of a data set, in memory."""

    name: str
    split: str
    images: torch.Tensor = field(repr=False)  # uint8 [N, C, H, W], contiguous
    labels: torch.Tensor = field(repr=False)  # int64 [N], 0 .. len(classes) - 1
    classes: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True)
class Part:
    """One file of records under its publisher's name, `.gz` left off."""

    name: str
    sha256: str  # or MD5: what its publisher or others have published, told apart by its length
    size: int  # bytes, decompressed; of a pickle at most

    def differs(self, data: bytes) -> str | None:
        """How the sum of `data` differs from the known one, None where it does not."""
        kind = "SHA-256" if len(self.sha256) == 64 else "MD5"
        got = hashlib.new(kind.replace("-", ""), data, usedforsecurity=False).hexdigest()
        return None if got == self.sha256 else f"{kind} {got[:16]}..., not {self.sha256[:16]}..."


@dataclass(frozen=True)
class Spec:
    """What is known of a data set beforehand."""

    name: str
    shape: tuple[int, int, int]  # C, H, W
    counts: Mapping[str, int]
    classes: tuple[str, ...]
    parts: Mapping[str, tuple[Part, ...]]  # by split; IDX: images, labels; CIFAR: the batches
    homepage: str
    url: str = ""  # the folder that its files are downloaded from
    archive: str | None = None  # the tar.gz that holds all parts, in `folder`
    folder: str = ""
    label_ranges: tuple[int, ...] = ()  # CIFAR: the number of classes of each label byte
    debian: str | None = None  # a Debian package that holds the files
    pickles: tuple[tuple[str, int], ...] = ()  # a Python edition: name and range of its label lists
    python: Spec | None = None  # the publisher's other edition, read where this one is absent

    @property
    def all_parts(self) -> tuple[Part, ...]:
        return tuple(part for parts in self.parts.values() for part in parts)

    @property
    def files(self) -> dict[str, tuple[Part, ...]]:
        """The files as they are downloaded, and the parts that each holds."""
        if self.archive:
            return {self.archive: self.all_parts}
        return {f"{part.name}.gz": (part,) for part in self.all_parts}


@dataclass(frozen=True)
class Info:
    """What `engine data info` shows of a data set."""

    name: str
    shape: tuple[int, int, int]  # C, H, W
    train: int  # samples
    test: int
    classes: tuple[str, ...]
    files: tuple[str, ...]  # as published; none where it needs no file
    homepage: str
    folder: Path | None  # where `load` would read it; None where it is absent
    own_sums: bool  # that folder has a SHA256SUMS of its own: not the published data


@dataclass(frozen=True)
class FileCheck:
    """What `verify` says of one file."""

    file: str
    ok: bool
    detail: str


def _idx(images: str, labels: str, prefix: str, count: int) -> tuple[Part, Part]:
    return (
        Part(f"{prefix}-images-idx3-ubyte", images, 16 + count * 28 * 28),
        Part(f"{prefix}-labels-idx1-ubyte", labels, 8 + count),
    )


_DIGIT_NAMES = tuple("0123456789")
_MNIST_COUNTS = {"train": 60_000, "test": 10_000}
_CIFAR_COUNTS = {"train": 50_000, "test": 10_000}
_CIFAR_HOME = "https://www.cs.toronto.edu/~kriz/"

_DIGITS = Spec(
    name="digits",
    shape=(1, 8, 8),
    counts={"train": 1_437, "test": 360},
    classes=_DIGIT_NAMES,
    parts={"train": (), "test": ()},
    homepage="https://scikit-learn.org/stable/modules/generated/sklearn.datasets.load_digits.html",
)

# Taken from Debian's files; the publisher's own gzip headers put round the same deflate streams
# give files with the publisher's MD5 sums, so the contents are the published ones.
_FASHION_MNIST = Spec(
    name="fashion-mnist",
    shape=(1, 28, 28),
    counts=_MNIST_COUNTS,
    classes=(
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    parts={
        "train": _idx(
            "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "train",
            60_000,
        ),
        "test": _idx(
            "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
            "t10k",
            10_000,
        ),
    },
    homepage="https://github.com/zalandoresearch/fashion-mnist",
    url="http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    debian="dataset-fashion-mnist",
)

# The sums of MNIST and CIFAR are as others have published them; they have not been held against a
# download of our own yet. MNIST's and CIFAR-10's agree between independent projects.
_MNIST = Spec(
    name="mnist",
    shape=(1, 28, 28),
    counts=_MNIST_COUNTS,
    classes=_DIGIT_NAMES,
    parts={
        "train": _idx(
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "train",
            60_000,
        ),
        "test": _idx(
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
            "t10k",
            10_000,
        ),
    },
    homepage="http://yann.lecun.com/exdb/mnist/",
    url="https://ossci-datasets.s3.amazonaws.com/mnist/",
)

_CIFAR10 = Spec(
    name="cifar10",
    shape=(3, 32, 32),
    counts=_CIFAR_COUNTS,
    classes=(
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    ),
    parts={
        "train": tuple(
            Part(f"data_batch_{i}.bin", sha256, 30_730_000)
            for i, sha256 in enumerate(
                (
                    "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
                    "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
                    "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
                    "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
                    "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
                ),
                start=1,
            )
        ),
        "test": (
            Part(
                "test_batch.bin",
                "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
                30_730_000,
            ),
        ),
    },
    homepage=_CIFAR_HOME + "cifar.html",
    url=_CIFAR_HOME,
    archive="cifar-10-binary.tar.gz",
    folder="cifar-10-batches-bin",
    label_ranges=(10,),
)
# MD5 of the members as torchvision publishes them, found alike in independent projects.
_CIFAR10 = replace(
    _CIFAR10,
    python=replace(
        _CIFAR10,
        archive="cifar-10-python.tar.gz",
        folder="cifar-10-batches-py",
        pickles=(("labels", 10),),
        parts={
            "train": tuple(
                Part(f"data_batch_{i}", md5, 32_000_000)
                for i, md5 in enumerate(
                    (
                        "c99cafc152244af753f735de768cd75f",
                        "d4bba439e000b95fd0a9bffe97cbabec",
                        "54ebc095f3ab1f0389bbae665268c751",
                        "634d18415352ddfa80567beed471001a",
                        "482c414d41f54cd18b22e5b47cb7c3cb",
                    ),
                    start=1,
                )
            ),
            "test": (Part("test_batch", "40351d587109b95175f43aff81a1287e", 32_000_000),),
        },
    ),
)

_CIFAR100_NAMES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile
cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp
lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom
oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake
spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor
train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""

_CIFAR100 = Spec(
    name="cifar100",
    shape=(3, 32, 32),
    counts=_CIFAR_COUNTS,
    classes=tuple(_CIFAR100_NAMES.split()),
    parts={
        "train": (
            Part(
                "train.bin",
                "f31298fc616915fa142368359df1c4ca2ae984d6915ca468b998a5ec6aeebf29",
                153_700_000,
            ),
        ),
        "test": (
            Part(
                "test.bin",
                "d8b1e6b7b3bee4020055f0699b111f60b1af1e262aeb93a0b659061746f8224a",
                30_740_000,
            ),
        ),
    },
    homepage=_CIFAR_HOME + "cifar.html",
    url=_CIFAR_HOME,
    archive="cifar-100-binary.tar.gz",
    folder="cifar-100-binary",
    label_ranges=(20, 100),
)
_CIFAR100 = replace(
    _CIFAR100,
    python=replace(
        _CIFAR100,
        archive="cifar-100-python.tar.gz",
        folder="cifar-100-python",
        pickles=(("coarse_labels", 20), ("fine_labels", 100)),
        parts={
            "train": (Part("train", "16019d7e3df5f24257cddd939b257f8d", 160_000_000),),
            "test": (Part("test", "f0ef6b0ae62326f3e7ffdfab6717acfc", 32_000_000),),
        },
    ),
)

_SPECS = {s.name: s for s in (_DIGITS, _FASHION_MNIST, _MNIST, _CIFAR10, _CIFAR100)}


# ---- the face --------------------------------------------------------------------------------


def names() -> tuple[str, ...]:
    """The names of the known data sets."""
    return tuple(_SPECS)


def info(name: str, root: Path | str | None = None) -> Info:
    """The facts of a data set, and where it lies on this machine. EngineError: unknown name."""
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


def load(name: str, split: Split, root: Path | str | None = None) -> ImageSet:
    """Read one split of a data set into memory, its checksums verified. Uses no network.

    EngineError: unknown name or split; a file that is absent, unreadable, damaged or not what it
    should be, named in one line.
    """
    spec = find_spec(name)
    if split not in get_args(Split):
        raise EngineError(f"split {split!r} is not known: it is train or test")
    if spec is _DIGITS:
        images, labels = _digits(split)
    else:
        images, labels = _read_split(spec, split, root)
    return ImageSet(
        name=spec.name,
        split=split,
        # the readers' arrays are views of read-only bytes
        images=torch.from_numpy(images.reshape(-1, *spec.shape).copy()),
        labels=torch.from_numpy(labels.astype(np.int64)),
        classes=spec.classes,
    )


def verify(name: str, root: Path | str | None = None) -> list[FileCheck]:
    """Read and check every file of a data set, the damaged and the missing ones reported too.

    EngineError: unknown name only.
    """
    spec = find_spec(name)
    if spec is _DIGITS:
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


# ---- folders and files -----------------------------------------------------------------------


def find_spec(name: str) -> Spec:
    """EngineError, with the nearest name, where there is no such data set."""
    if name in _SPECS:
        return _SPECS[name]
    near = difflib.get_close_matches(str(name).lower(), _SPECS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(_SPECS)}"
    raise EngineError(f"unknown data set {name!r}: {hint}")


def data_root(root: Path | str | None = None) -> Path:
    """`root`, else `$ENGINE_DATA`, else `robust-engine` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if root is None:
        root = os.environ.get("ENGINE_DATA") or None
    try:
        if root is not None:
            return Path(root).expanduser().absolute()
        cache = os.environ.get("XDG_CACHE_HOME", "")
        # a relative path in it is void, says the XDG Base Directory Specification
        base = Path(cache) if Path(cache).is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        raise EngineError("no home folder is known: set ENGINE_DATA to a folder for data") from None
    return base / "robust-engine"


def system_folders(spec: Spec) -> list[Path]:
    """Where a package of the system would have put the files, whether it did or not."""
    if not spec.debian:
        return []
    shares = [str(Path(sys.prefix) / "share")]
    shares += (os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share").split(":")
    return [Path(s) / "datasets" / spec.name for s in dict.fromkeys(shares) if os.path.isabs(s)]


def home_of(spec: Spec, root: Path | str | None = None) -> Path | None:
    """The folder that is read: the first one with any file of the data set, unread."""
    if spec is _DIGITS:
        import sklearn

        return Path(sklearn.__file__).parent / "datasets" / "data"
    for folder in (data_root(root) / spec.name, *system_folders(spec)):
        edition = edition_in(spec, folder)
        if present(edition, folder, edition.all_parts):
            return folder
    return None


def edition_in(spec: Spec, folder: Path) -> Spec:
    """`spec` as `folder` holds it: the publisher's Python edition if that one alone is there."""
    other = spec.python
    if other is None or present(spec, folder, spec.all_parts):
        return spec
    return other if present(other, folder, other.all_parts) else spec


def present(spec: Spec, folder: Path, parts: Iterable[Part]) -> dict[Path, tuple[Part, ...]]:
    """Which files of `folder` hold which of `parts`; parts without a file are left out."""
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


# ---- reading ---------------------------------------------------------------------------------


def read_parts(
    spec: Spec, path: Path, parts: tuple[Part, ...], where: str | None = None
) -> dict[str, tuple[np.ndarray, ...]]:
    """The arrays of each of `parts`, by name, from the one file that holds them; all is verified.

    IDX: one uint8 array, [N, 28, 28] or [N]. CIFAR: images uint8 [N, 3, 32, 32] and labels uint8 [N].
    `where` is the name to show, if not `path`. EngineError: whatever is wrong with the file.
    """
    where = where or str(path)
    own = _check_own_sum(spec, path)
    if spec.archive and spec.archive in path.name:  # a draft of it has more to its name
        members = {f"{spec.folder}/{part.name}": part.size for part in parts}
        contents = readers.read_tar_gz(path, where, members, size_limit(spec.all_parts))
        data = {part.name: contents[f"{spec.folder}/{part.name}"] for part in parts}
    else:
        data = {part.name: readers.read_file(path, where, part.size) for part in parts}
    arrays: dict[str, tuple[np.ndarray, ...]] = {}
    for part in parts:
        shown = f"{where}: {part.name}" if len(data) > 1 else where
        arrays[part.name] = _parse(spec, part, data[part.name], shown)
        if not own and (difference := part.differs(data[part.name])):
            raise EngineError(
                f"{shown}: its content has {difference}: damaged, or not the published file"
            )
    return arrays


def size_limit(parts: Iterable[Part]) -> int:
    """Bytes that a file of `parts` may decompress to: archives hold a page and lists besides."""
    return sum(part.size for part in parts) + (1 << 20)


def _parse(spec: Spec, part: Part, data: bytes, where: str) -> tuple[np.ndarray, ...]:
    most = part.size // (len(spec.label_ranges) + readers.CIFAR_PIXELS)
    if spec.pickles:
        return pickles.parse(data, where, spec.pickles, most)
    if spec.archive:
        return readers.parse_cifar(data, where, spec.label_ranges, most)
    if "-labels-" in part.name:
        labels = readers.parse_idx(data, where, (), part.size - 8)
        readers.check_labels(labels, where, len(spec.classes))
        return (labels,)
    item = spec.shape[1:]
    return (readers.parse_idx(data, where, item, (part.size - 16) // prod(item)),)


def _read_split(spec: Spec, split: str, root: Path | str | None) -> tuple[np.ndarray, np.ndarray]:
    folder = home_of(spec, root)
    if folder is None:
        where = data_root(root) / spec.name
        raise EngineError(f"{spec.name}: not found in {where}: run `engine data fetch {spec.name}`")
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
    """Whether a SHA256SUMS of the data set's folder covers `path`; EngineError if the sums differ."""
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
    """scikit-learn's 8x8 digits, 0..16 scaled to 0..255; split by a permutation fixed for ever."""
    try:
        from sklearn.datasets import load_digits

        bunch = load_digits()
    except (ImportError, OSError, ValueError) as e:
        raise EngineError(f"digits: scikit-learn cannot give them: {e}") from None
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    # NumPy promises never to change the stream of RandomState, which it does not of Generator
    order = np.random.RandomState(0).permutation(len(images))
    train = _DIGITS.counts["train"]
    chosen = order[:train] if split == "train" else order[train:]
    return images[chosen], bunch.target[chosen]
