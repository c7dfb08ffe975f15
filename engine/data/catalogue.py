"""The published data sets: their facts, files and checksums.

Every SHA-256 is of the decompressed bytes, so one sum serves the publisher's file, Debian's
repacking and an unpacked copy.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..errors import EngineError
from .folders import KNOWN


@dataclass(frozen=True)
class Part:
    """Hold the facts of one file of records, under its publisher's name without `.gz`."""

    name: str
    sha256: str  # or MD5, as the publisher or others give it; the length tells which
    size: int  # bytes, decompressed; for a pickle the most

    def differs(self, data: bytes) -> str | None:
        """Return the difference between the sum of `data` and the known one, or None."""
        kind = "SHA-256" if len(self.sha256) == 64 else "MD5"
        got = hashlib.new(kind.replace("-", ""), data, usedforsecurity=False).hexdigest()
        return None if got == self.sha256 else f"{kind} {got[:16]}..., not {self.sha256[:16]}..."


@dataclass(frozen=True)
class Spec:
    """Hold the known facts of a data set."""

    name: str
    shape: tuple[int, int, int]  # C, H, W
    counts: Mapping[str, int]
    classes: tuple[str, ...]
    parts: Mapping[str, tuple[Part, ...]]  # by split; IDX: images, labels; CIFAR: the batches
    homepage: str
    url: str = ""  # the folder of the downloads
    archive: str | None = None  # the tar.gz that holds all parts, in `folder`
    folder: str = ""
    label_ranges: tuple[int, ...] = ()  # CIFAR: the number of classes of each label byte
    debian: str | None = None  # a Debian package that holds the files
    pickles: tuple[tuple[str, int], ...] = ()  # a Python edition: name and range of its label lists
    python: Spec | None = None  # the publisher's Python edition, read where this one is absent

    @property
    def all_parts(self) -> tuple[Part, ...]:
        return tuple(part for parts in self.parts.values() for part in parts)

    @property
    def files(self) -> dict[str, tuple[Part, ...]]:
        """Return the files as they are downloaded, with the parts in each."""
        if self.archive:
            return {self.archive: self.all_parts}
        return {f"{part.name}.gz": (part,) for part in self.all_parts}


def _idx(images: str, labels: str, prefix: str, count: int) -> tuple[Part, Part]:
    return (
        Part(f"{prefix}-images-idx3-ubyte", images, 16 + count * 28 * 28),
        Part(f"{prefix}-labels-idx1-ubyte", labels, 8 + count),
    )


_TEN = tuple("0123456789")
_MNIST_COUNTS = {"train": 60_000, "test": 10_000}
_CIFAR_COUNTS = {"train": 50_000, "test": 10_000}
_CIFAR_HOME = "https://www.cs.toronto.edu/~kriz/"

DIGITS = Spec(
    name="digits",
    shape=(1, 8, 8),
    counts={"train": 1_437, "test": 360},
    classes=_TEN,
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

# The sums of MNIST and CIFAR are those that others have published; no own download has confirmed
# them yet. MNIST's and CIFAR-10's agree between independent projects.
_MNIST = Spec(
    name="mnist",
    shape=(1, 28, 28),
    counts=_MNIST_COUNTS,
    classes=_TEN,
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

SPECS = {s.name: s for s in (DIGITS, _FASHION_MNIST, _MNIST, _CIFAR10, _CIFAR100)}


def find_spec(name: str) -> Spec:
    """Return the data set called `name`; EngineError, with the nearest name, for an unknown one."""
    if name in SPECS:
        return SPECS[name]
    known = (*SPECS, *KNOWN)
    near = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
    if name and os.path.isdir(name):  # Path.is_dir raises OSError for a name that is too long
        hint = f"the folder of that name is given as ./{name} ({hint})"
    raise EngineError(f"unknown data set {name!r}: {hint}")
