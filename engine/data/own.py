"""A user's own data set: a folder of images, or one .npz or .safetensors file of arrays.

A folder has train/CLASS/*.png and test/CLASS/*.png, or val in place of test (or .jpg, .bmp, .ppm,
.webp), all of one size. Classes are numbered in the order of their names, and test images come in
one fixed shuffled order. A file has the arrays `train_images`, `train_labels`, `test_images` and
`test_labels` (or `x_train`, `y_train`, `x_test`, `y_test`, as Keras names them): images uint8
[N, H, W] or [N, H, W, C], whole numbers [N] or [N, 1] as labels.

The files may be anything: nothing is unpickled, no name leaves its folder, and no more than `LIMIT`
bytes are ever decompressed. Every fault is an `EngineError` that begins with the file's name.
"""

from __future__ import annotations

import logging
import warnings
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import EngineError
from . import readers
from .photos.decode import FORMATS
from .photos.listing import SUFFIXES, announce_others, fixed_order, is_image, no_images

log = logging.getLogger(__name__)

LIMIT = 16 << 30
SPLITS = ("train", "test")
FILES = (".npz", ".safetensors")
# One image, in pixels: more is a mistake, or a picture made to fill memory when it is unpacked.
_IMAGE_LIMIT = 1 << 24
_CLASSES_LIMIT = 100_000

_ANY_FAULT = (
    *(OSError, EOFError, ValueError, KeyError, IndexError, OverflowError),
    *(NotImplementedError, RuntimeError, MemoryError, SyntaxError),
)

Names = list[tuple[str, str]]  # the possible names of each array
Arrays = tuple[np.ndarray, np.ndarray]  # images uint8 [N, C, H, W], labels int64 [N]


def is_path(name: str) -> bool:
    """Return whether a data set's name is a path."""
    path = Path(name)
    return (
        len(path.parts) > 1
        or name.startswith((".", "~"))
        or path.suffix in (".npz", ".safetensors")
    )


def absolute(name: str) -> str:
    """Return a data set's name with a path made absolute: a run is evaluated from any folder."""
    return str(Path(name).expanduser().absolute()) if is_path(name) else name


def check_exists(path: Path) -> None:
    """Raise EngineError where there is no such file or folder."""
    if not path.exists():
        raise EngineError(f"{path}: no such file or folder")


def files(path: Path) -> list[Path]:
    """Return the files of the data set, to notice a change. EngineError where there are none."""
    check_exists(path)
    if path.is_dir():
        return [file for split in SPLITS for file, _ in _images(path, split)[0]]
    return [path]


def read(path: Path, split: str) -> tuple[Arrays, tuple[str, ...]]:
    """Return one split's images uint8 [N, C, H, W] and labels int64 [N], and all class names."""
    if path.is_dir():
        return _read_folder(path, split)
    readers_of: dict[str, Callable[[Path, Names], dict[str, np.ndarray]]] = {
        ".npz": _npz,
        ".safetensors": _safetensors,
    }
    if path.suffix not in readers_of:
        raise EngineError(f"{path}: a data set is a folder, an .npz or a .safetensors file")
    names = _names(split)
    arrays = readers_of[path.suffix](path, [*names, *_names("train")])
    images, labels = (_pick(arrays, options, path) for options in names)
    every = _pick(arrays, _names("train")[1], path)
    # The training set numbers the classes; a label that only the test set has is refused.
    classes = _class_count(every, path)
    return _checked(images, labels, classes, path), tuple(map(str, range(classes)))


def read_images(path: Path) -> np.ndarray:
    """Return the images of a file as `read_extra` does; labels are not needed."""
    names: Names = [("image", "images")]
    reader = _safetensors if path.suffix == ".safetensors" else _npz
    images = _pick(reader(path, names), names[0], path)
    return _checked(images, np.zeros(len(images), np.int64), 1, path)[0]


def has_splits(path: Path) -> bool:
    """Return whether a file of arrays holds a whole data set, and not extra images."""
    check_exists(path)
    if path.suffix == ".npz":
        try:
            with (
                readers.open_file(path, str(path), LIMIT) as file,
                zipfile.ZipFile(file) as archive,
            ):
                names = {name.removesuffix(".npy") for name in archive.namelist()}
        except (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, *_ANY_FAULT) as e:
            raise EngineError(f"{path}: damaged .npz ({_line(e)})") from None
    else:
        names = set(_safetensors(path, _names("train")))
    return any(name in names for name in _names("train")[0])


def read_extra(path: Path, classes: int) -> Arrays:
    """Return the images uint8 [N, C, H, W] and labels int64 [N] of extra training images.

    The file is an .npz or .safetensors with `image` uint8 [N, H, W] or [N, H, W, C] and `label`
    [N], as the published sets of generated images have them.
    """
    names: Names = [("image", "images"), ("label", "labels")]
    reader = _safetensors if path.suffix == ".safetensors" else _npz
    arrays = reader(path, names)
    images, labels = (_pick(arrays, options, path) for options in names)
    return _checked(images, labels, classes, path)


def _images(path: Path, split: str) -> tuple[list[tuple[Path, int]], tuple[str, ...]]:
    """Return every image of a split with its label, and the training split's class names.

    Test images come in `fixed_order`, so that the first N are of all classes. EngineError: a class
    folder without an image; the test split may lack the folder of a class.
    """
    try:
        names = _folders(path / "train")
        folder = path / "train" if split == "train" else _test_folder(path)
        if unknown := sorted(set(_folders(folder)) - set(names)):
            raise EngineError(f"{folder / unknown[0]}: a class that {path / 'train'} has not")
        found: list[tuple[Path, int]] = []
        others: list[str] = []
        for label, name in enumerate(names):
            if (folder / name).is_dir():
                images, more = _of_class(folder / name)
                found += [(file, label) for file in images]
                others += more
    except OSError as e:
        raise EngineError(f"{e.filename or path}: cannot read it: {e.strerror or e}") from None
    if not found:
        raise EngineError(f"{folder}: no images in class folders ({', '.join(SUFFIXES)})")
    announce_others(folder, others)
    if split != "train":
        found = [found[row] for row in fixed_order(len(found)).tolist()]
    return found, tuple(names)


def _of_class(folder: Path) -> tuple[list[Path], list[str]]:
    """Return a class folder's images in the order of their names, and its other files' names."""
    entries = sorted(e for e in folder.iterdir() if not e.name.startswith("."))
    images = [entry for entry in entries if is_image(entry.name)]
    others = [entry for entry in entries if not is_image(entry.name)]
    files = [entry.name for entry in others if not entry.is_dir()]
    if not images:
        below = "; folders below a class are read with data.size = 224"
        raise no_images(folder, files, below if len(files) < len(others) else "")
    return images, files


@cache
def _test_folder(path: Path) -> Path:
    """Return the folder of the test images: `test`, or `val` where there is no `test`."""
    if (path / "test").is_dir() or not (path / "val").is_dir():
        return path / "test"
    log.warning("%s has no test folder: its val folder serves as the test images", path)
    return path / "val"


def _folders(path: Path) -> list[str]:
    if not path.is_dir():
        raise EngineError(
            f"{path}: missing: a folder of images has train/CLASS/*.png and test/CLASS/*.png"
        )
    return sorted(e.name for e in path.iterdir() if e.is_dir() and not e.name.startswith("."))


def _read_folder(path: Path, split: str) -> tuple[Arrays, tuple[str, ...]]:
    found, names = _images(path, split)
    grey = all(_head(file)[1] in ("1", "L") for file, _ in found)
    # The test split must look like the training split.
    first = _images(path, "train")[0][0][0]
    if split != "train":
        grey = grey and all(_head(file)[1] in ("1", "L") for file, _ in _images(path, "train")[0])
    size = _head(first)[0]
    if (total := len(found) * prod(size) * (1 if grey else 3)) > LIMIT:
        raise EngineError(f"{path / split}: {total:,} bytes of pixels; at most {LIMIT:,} fit")
    images = np.empty((len(found), 1 if grey else 3, size[1], size[0]), np.uint8)
    for i, (file, _) in enumerate(found):
        if _head(file)[0] != size:
            raise EngineError(
                f"{file}: {'x'.join(map(str, _head(file)[0]))} pixels, where {first} has "
                f"{'x'.join(map(str, size))}: bring all images to one size, or stream them "
                "(data.size = 224)"
            )
        images[i] = _pixels(file, "L" if grey else "RGB")
    return (images, np.array([label for _, label in found], np.int64)), names


def _head(file: Path) -> tuple[tuple[int, int], str]:
    """Return an image's (width, height) and mode, without its pixels."""
    with _opened(file) as image:
        if prod(image.size) > _IMAGE_LIMIT:
            raise EngineError(
                f"{file}: {image.size[0]}x{image.size[1]} pixels: too large to hold in memory: "
                "stream the folder (data.size = 224)"
            )
        return image.size, image.mode


def _pixels(file: Path, mode: str) -> np.ndarray:
    """Return an image's pixels, uint8 [C, H, W]."""
    with _opened(file) as image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pixels = np.asarray(image.convert(mode))
        except _ANY_FAULT as e:
            raise EngineError(f"{file}: damaged image ({_line(e)})") from None
    return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)


def _opened(file: Path) -> Any:
    from PIL import Image

    if file.exists() and not file.is_file():
        # Opening a FIFO waits for a writer.
        raise EngineError(f"{file}: cannot read it: not a regular file")
    try:
        with warnings.catch_warnings():
            # Sizes are checked here, and a fault is reported once.
            warnings.simplefilter("ignore")
            return Image.open(file, formats=FORMATS)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else "no image in it"
        raise EngineError(f"{file}: cannot read it: {reason}") from None


def _names(split: str) -> Names:
    """Return the possible names of a split's images and of its labels."""
    return [(f"{split}_images", f"x_{split}"), (f"{split}_labels", f"y_{split}")]


def _pick(arrays: dict[str, np.ndarray], options: tuple[str, str], path: Path) -> np.ndarray:
    for name in options:
        if name in arrays:
            return arrays[name]
    raise EngineError(f"{path}: has no array {options[0]} (or {options[1]})")


def _npz(path: Path, wanted: Names) -> dict[str, np.ndarray]:
    names = {f"{name}.npy" for options in wanted for name in options}
    found: dict[str, np.ndarray] = {}
    try:
        with readers.open_file(path, str(path), LIMIT) as file, zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                if entry.filename.startswith("/") or ".." in entry.filename.split("/"):
                    raise EngineError(
                        f"{path}: member {entry.filename!r} points out of the archive"
                    )
                if entry.filename not in names:
                    continue
                with archive.open(entry) as member:
                    name = entry.filename.removesuffix(".npy")
                    found[name] = _npy(member, f"{path}: {entry.filename}", _remedy(name))
    # A hostile header makes the two libraries raise BadZipFile and many others.
    except (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, *_ANY_FAULT) as e:
        raise EngineError(f"{path}: damaged .npz ({_line(e)})") from None
    return found


def _remedy(name: str) -> str:
    """Return how to save the array called `name`, which does not hold whole numbers."""
    if "label" in name or name.startswith("y_"):
        return (
            "save labels as int64, one number from 0 for each image (one-hot labels: "
            "labels.argmax(1))"
        )
    return "save images as uint8 in 0..255, and let model.normalise normalise them"


def _npy(member: Any, title: str, remedy: str) -> np.ndarray:
    """Return an array of whole numbers; read the bytes that its header announces and no more.

    EngineError: begins with `title`; for numbers that are not whole, ends with `remedy`.
    """
    version = np.lib.format.read_magic(member)
    read_header = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in read_header:
        raise EngineError(f"{title}: an .npy of version {version[0]}.{version[1]}")
    shape, fortran, dtype = read_header[version](member, max_header_size=10_000)
    if dtype.hasobject or dtype.kind not in "iu":
        raise EngineError(f"{title}: holds {dtype}, not whole numbers: {remedy}")
    size = prod(shape) * dtype.itemsize
    if size > LIMIT or any(n < 0 for n in shape):
        raise EngineError(f"{title}: {size:,} bytes; at most {LIMIT:,} fit")
    data = member.read(size)
    if len(data) < size or member.read(1):
        raise EngineError(f"{title}: its length is not what its header says")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _safetensors(path: Path, wanted: Names) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    with readers.open_file(path, str(path), LIMIT):
        pass
    names = {name for options in wanted for name in options}
    try:
        with safe_open(str(path), framework="np") as file:
            held = {name: file.get_tensor(name) for name in file.keys() if name in names}  # noqa: SIM118
    except (SafetensorError, TypeError, AttributeError, *_ANY_FAULT) as e:
        raise EngineError(f"{path}: damaged ({_line(e)})") from None
    for name, array in held.items():
        if array.dtype.kind not in "iu":
            raise EngineError(
                f"{path}: {name}: holds {array.dtype}, not whole numbers: {_remedy(name)}"
            )
    return held


def _class_count(labels: np.ndarray, path: Path) -> int:
    if labels.size == 0:
        raise EngineError(f"{path}: no training labels")
    highest = int(labels.max())
    if not 1 <= highest < _CLASSES_LIMIT:
        raise EngineError(
            f"{path}: the highest training label is {highest}: at least two classes, from 0"
        )
    return highest + 1


def _checked(images: np.ndarray, labels: np.ndarray, classes: int, path: Path) -> Arrays:
    if images.dtype != np.uint8:
        raise EngineError(f"{path}: images are {images.dtype}, not uint8")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in (1, 3) or 0 in images.shape:
        raise EngineError(
            f"{path}: images are {list(images.shape)}, not [N, H, W], [N, H, W, 1] or [N, H, W, 3]"
        )
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1 or len(labels) != len(images):
        one_hot = labels.ndim == 2 and len(labels) == len(images)
        raise EngineError(
            f"{path}: {len(images):,} images, but labels are {list(labels.shape)}"
            + (": save one-hot labels as labels.argmax(1)" if one_hot else "")
        )
    bad = np.flatnonzero((labels < 0) | (labels >= classes))
    if bad.size:
        raise EngineError(
            f"{path}: label {labels[bad[0]]} of sample {bad[0]:,} is not in 0..{classes - 1}, the "
            "training set's"
        )
    return np.array(images.transpose(0, 3, 1, 2), order="C"), labels.astype(np.int64)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]
