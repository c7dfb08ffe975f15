"""Generated photographs: folders of JPEGs of mixed sizes, in ImageNet's layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIZES = ((96, 128), (128, 96), (150, 200), (80, 80), (240, 180))  # (height, width)


def photo(number: int, label: int, size: tuple[int, int]) -> Image.Image:
    """Return a smooth picture whose colour tells its class."""
    draw = np.random.default_rng([number, label])
    coarse = draw.normal(128, 50, (6, 6, 3))
    coarse += 60 * np.sin(np.array([1.0, 2.0, 3.0]) * (label + 1))
    small = Image.fromarray(np.clip(coarse, 0, 255).astype(np.uint8))
    return small.resize((size[1], size[0]), Image.Resampling.BICUBIC)


def folder(
    path: Path, *, classes: int = 10, train: int = 20, test: int = 4, held: str = "val"
) -> Path:
    """Write `train` and `test` JPEGs a class and return `path`."""
    for split, count in (("train", train), (held, test)):
        for label in range(classes):
            place = path / split / f"class{label}"
            place.mkdir(parents=True)
            for number in range(count):
                size = SIZES[(number + label) % len(SIZES)]
                seed = number if split == "train" else 1000 + number
                photo(seed, label, size).save(place / f"{number}.jpg", quality=90)
    return path
