"""Give the training, validation and test images of a recipe.

A set in memory is a tensor; a folder of pictures is a `Photos`, which has a length and a shape too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ..data import datasets
from ..data.photos import Photos
from ..data.photos.listing import fixed_order
from ..device.machine import device
from ..errors import EngineError
from ..evaluation.robust_accuracy import Parts
from ..recipes import Recipe

# One dataset serves the check, the training, the evaluation and the report of a process.
_images = lru_cache(maxsize=4)(datasets.load)
_load_extra = lru_cache(maxsize=2)(datasets.load_extra)
_pictures = lru_cache(maxsize=4)(datasets.photos)

Images = Tensor | Photos
# The numbers of one part of pictures: about 1 GB as floats, and as much again for the adversaries.
_PART_NUMBERS = 1 << 28


@dataclass(frozen=True)
class Split:
    """Hold the training and validation images of a recipe: uint8 [N, C, H, W], int64 [N]."""

    train: tuple[Images, Tensor]
    validation: tuple[Images, Tensor]
    classes: tuple[str, ...]
    total: int


class _Streamed:
    """Give pictures in parts, again and again: float32 [B, C, H, W] in [0, 1] and int64 [B].

    Args:
        size: of a part [images].
    """

    def __init__(self, photos: Photos, size: int, target: torch.device) -> None:
        self.photos, self.size, self.target = photos, size, target

    def __len__(self) -> int:
        return -(-len(self.photos) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.photos.batches(self.size, self.target)


def _load(recipe: Recipe, part: datasets.Split) -> datasets.ImageSet:
    data = recipe.data
    if data.size is None:
        return _images(data.name, part)
    return _pictures(
        data.name,
        part,
        size=data.size,
        resize=data.resized,
        damaged=data.damaged,
        threads=data.workers,
    )


@dataclass(frozen=True)
class Facts:
    """Hold the facts of a recipe's dataset that a prediction needs.

    Attributes:
        shape: (C, H, W) that the network sees; train: training images; classes: their number.
    """

    shape: tuple[int, int, int]
    train: int
    classes: int


def facts(recipe: Recipe) -> Facts:
    """Return the facts of the recipe's dataset; the files of a known one may be absent.

    Raises:
        EngineError: for a folder of pictures of several sizes, where the recipe has no `data.size`.
    """
    size = recipe.data.size
    about = datasets.info(recipe.data.name, read=False)
    shape = about.shape if size is None else (3, *size)
    if shape is None:
        raise EngineError(f"{recipe.data.name}: pictures of several sizes: set data.size = 224")
    return Facts(shape, about.train, len(about.classes))


def in_memory(recipe: Recipe) -> Recipe:
    """Return the recipe for images in memory that stand for its pictures.

    Pictures reach a captured step as copies of batches, so the step is the same.
    """
    if recipe.data.size is None:
        return recipe
    data = replace(recipe.data, size=None, resize=None, scale=None, jitter=0.0)
    return replace(recipe, data=data)


def split(recipe: Recipe) -> Split:
    """Cut the training set in two by a permutation that depends on the dataset alone.

    So every seed and every recipe validates on the same images of a dataset.
    """
    data = _load(recipe, "train")
    order = fixed_order(len(data.images))
    count = recipe.data.held_out(len(order))
    held_out, rest = order[:count], order[count:]
    if recipe.data.train_examples is not None:
        rest = rest[: recipe.data.train_examples]
    if len(rest) == 0:
        raise EngineError(f"{recipe.data.name} has one training image: at least two are needed")
    return Split(
        (data.images[rest], data.labels[rest]),
        (data.images[held_out], data.labels[held_out]),
        data.classes,
        len(order),
    )


def unused(recipe: Recipe) -> Tensor:
    """Return the training images that a run neither trains on nor validates on."""
    images = _load(recipe, "train").images
    if not isinstance(images, Tensor):
        raise EngineError("engine data label: streamed pictures (data.size) cannot be labelled")
    parts = split(recipe)
    order = fixed_order(len(images))
    return images[order[len(parts.validation[0]) + len(parts.train[0]) :]]


def extra_set(recipe: Recipe) -> tuple[Tensor, Tensor] | None:
    """Return the recipe's extra training images, uint8 [N, C, H, W], and their labels, if any."""
    if recipe.data.extra is None:
        return None
    if recipe.data.size is not None:
        raise EngineError("data.extra with data.size: streamed pictures take no extra images")
    found = _load_extra(recipe.data.extra, _load(recipe, "train"))
    assert isinstance(found.images, Tensor)
    return found.images, found.labels


@lru_cache(maxsize=2)
def extra_sum(recipe: Recipe) -> str | None:
    """Return the SHA-256 of the recipe's extra images and labels; None without any."""
    extra = extra_set(recipe)
    if extra is None:
        return None
    found = hashlib.sha256(repr(tuple(extra[0].shape)).encode())
    for t in extra:
        found.update(t.contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def test_size(recipe: Recipe) -> int:
    """Return the number of test images in the recipe's dataset."""
    return len(_load(recipe, "test").images)


def shape_of(recipe: Recipe) -> torch.Size:
    """Return the shape [C, H, W] of the dataset's images."""
    return _load(recipe, "test").images.shape[1:]


def classes(recipe: Recipe) -> tuple[str, ...]:
    """Return the names of the dataset's classes."""
    return _load(recipe, "test").classes


def test_images(recipe: Recipe) -> tuple[Images, Tensor]:
    """Return the first `evaluation.examples` test images and their labels, as `Split` has them."""
    data, n = _load(recipe, "test"), recipe.evaluation.examples
    return data.images[:n], data.labels[:n]


def test_set(recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Return the first `evaluation.examples` test images as floats in [0, 1], on the device."""
    return first_test_images(recipe, None)


def first_test_images(recipe: Recipe, most: int | None) -> tuple[Tensor, Tensor]:
    """Return no more than the first `most` images of `test_set`.

    A folder of pictures may be too large to lie in memory.
    """
    images, labels = test_images(recipe)
    images, labels = images[:most], labels[:most]
    return next(iter(parts(images, labels, device(), max(1, len(labels)))))


def parts(images: Images, labels: Tensor, target: torch.device, size: int) -> Parts:
    """Return images float32 in [0, 1] and labels, on the device, in parts that fit there.

    A tensor is one part; pictures come `size` at a time, read anew in every pass.
    """
    if isinstance(images, Photos):
        return _Streamed(images, size, target)
    return [as_floats(images, labels, target)]


def part_size(images: Images, batch_size: int) -> int:
    """Return how many pictures make a part of an evaluation: as many whole batches as fit.

    Attacks drop the images that have fallen and fill their batches with the rest of the part.
    """
    return max(1, _PART_NUMBERS // (images.shape[1:].numel() * batch_size)) * batch_size


def as_floats(images: Tensor, labels: Tensor, target: torch.device) -> tuple[Tensor, Tensor]:
    """Return uint8 images as float32 in [0, 1], and their labels, on the device."""
    return images.to(target).float() / 255.0, labels.to(target)
