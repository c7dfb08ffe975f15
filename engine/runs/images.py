"""Give the training, validation and test images of a recipe."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..data import datasets
from ..device.machine import device
from ..errors import EngineError
from ..recipes import Recipe

# One dataset serves the check, the training, the evaluation and the report of a process.
_load = lru_cache(maxsize=4)(datasets.load)
_load_extra = lru_cache(maxsize=2)(datasets.load_extra)


@dataclass(frozen=True)
class Split:
    """Hold the training and validation images of a recipe: uint8 [N, C, H, W], int64 [N]."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    classes: tuple[str, ...]
    total: int


def split(recipe: Recipe) -> Split:
    """Cut the training set in two by a permutation that depends on the dataset alone.

    So every seed and every recipe validates on the same images of a dataset.
    """
    data = _load(recipe.data.name, "train")
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
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
    images = _load(recipe.data.name, "train").images
    parts = split(recipe)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order[len(parts.validation[0]) + len(parts.train[0]) :]]


def extra_set(recipe: Recipe) -> tuple[Tensor, Tensor] | None:
    """Return the recipe's extra training images, uint8 [N, C, H, W], and their labels, if any."""
    if recipe.data.extra is None:
        return None
    found = _load_extra(recipe.data.extra, _load(recipe.data.name, "train"))
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
    return len(_load(recipe.data.name, "test").images)


def shape_of(recipe: Recipe) -> torch.Size:
    """Return the shape [C, H, W] of the dataset's images."""
    return _load(recipe.data.name, "test").images.shape[1:]


def classes(recipe: Recipe) -> tuple[str, ...]:
    """Return the names of the dataset's classes."""
    return _load(recipe.data.name, "test").classes


def test_set(recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Return the first `evaluation.examples` test images as floats in [0, 1], on the device."""
    data = _load(recipe.data.name, "test")
    n = recipe.evaluation.examples
    return as_floats(data.images[:n], data.labels[:n], device())


def as_floats(images: Tensor, labels: Tensor, target: torch.device) -> tuple[Tensor, Tensor]:
    """Return uint8 images as float32 in [0, 1], and their labels, on the device."""
    return images.to(target).float() / 255.0, labels.to(target)
