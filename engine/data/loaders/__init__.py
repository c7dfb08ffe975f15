"""Loaders: the same batches from the device itself, from DALI, or from torch's DataLoader.

A set of images in memory has its loaders, and so have pictures in folders.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...adversary.memory import AdversaryMemory
from ...errors import EngineError
from ...registers import loaders as register
from ..photos import Photos
from .base import Batch, Loader, Sampling
from .dali import DaliLoader
from .resident import ResidentLoader
from .streamed import PhotoLoader, WorkerPhotoLoader
from .streamed_dali import DaliPhotoLoader
from .workers import TensorLoader, WorkerLoader

log = logging.getLogger(__name__)

# Options of images in memory that the resident loader alone serves.
_RESIDENT_ONLY = ("extra", "cutmix", "erase", "jitter")

__all__ = [
    "Batch",
    "DaliLoader",
    "DaliPhotoLoader",
    "Loader",
    "NullLoader",
    "PhotoLoader",
    "ResidentLoader",
    "Sampling",
    "TensorLoader",
    "WorkerLoader",
    "WorkerPhotoLoader",
    "build",
    "choose",
]


class NullLoader(Loader):
    """Repeat one batch, to measure training without the cost of data. For benchmarks only."""

    def __init__(self, loader: Loader) -> None:
        self._steps = len(loader)
        self._batch = next(loader.epoch(0))
        loader.close()

    def __len__(self) -> int:
        return self._steps

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        for _ in range(first, len(self)):
            yield self._batch


def choose(images: Tensor, device: torch.device | str) -> str:
    """Return the fastest loader for a set: resident, unless the device has no room for the set.

    Measured (docs/performance.md): on the CPU the resident loader makes batches several times as
    fast as DALI, and it is the only one that can be captured with the step. An adversary memory is
    as large as the set again.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if 2 * images.numel() > free // 2:
            return "torch" if _dali_missing() else "dali"
    return "resident"


def _dali_missing() -> str | None:
    from .dali import unavailable

    return unavailable()


def refused(name: str, options: Mapping[str, object]) -> str | None:
    """Return the first of the options that the loader called `name` does not serve, or None.

    The resident loader serves all, for images in memory. A registered loader is given every option
    but the extra images.
    """
    unserved: tuple[str, ...] = ()
    if name in ("dali", "torch"):
        unserved = _RESIDENT_ONLY
    elif register.maker(name) is not None:
        unserved = ("extra",)
    return next((option for option in unserved if options.get(option)), None)


def build(
    name: str,
    images: Tensor | Photos,
    labels: Tensor,
    batch_size: int,
    *,
    device: torch.device | str = "cpu",
    memory: AdversaryMemory | None = None,
    workers: int = 2,
    extra: tuple[Tensor, Tensor] | None = None,
    share: float = 0.0,
    numbered: bool = False,
    **sampling: Any,
) -> Loader:
    """Return the loader called `name`.

    Args:
        images: uint8 [N, C, H, W], or pictures in a folder, which bring their labels along;
            labels: int64 [N].
        memory: the adversary memory; only the resident loader forms the attack's start itself.
        extra, share, numbered: extra images for the resident loader, see `ResidentLoader`.
        workers: threads of DALI, processes of torch's loader.
        sampling: options as `Sampling` has them; for pictures, as `Framing` does too.
    Raises:
        EngineError: where DALI is asked for and missing; for a set smaller than a batch, or of
            another type; for pictures where the resident loader is asked for; where a registered
            maker returns no `Loader`.
    """
    if isinstance(images, Photos):
        return _of_photos(name, images, batch_size, device=device, workers=workers, **sampling)
    if name == "auto":
        name = choose(images, device)
    if option := refused(name, {"extra": extra is not None, **sampling}):
        raise EngineError(f"data.{option} with the {name} loader: it needs data.loader = resident")
    if (make := register.maker(name)) is not None:
        made = make(images, labels, batch_size, device=device, workers=workers, **sampling)
        return _checked(name, made)
    if name == "dali":
        return DaliLoader(images, labels, batch_size, device=device, workers=workers, **sampling)
    if name == "torch":
        return WorkerLoader(images, labels, batch_size, device=device, workers=workers, **sampling)
    resident = ResidentLoader(
        images,
        labels,
        batch_size,
        device=device,
        memory=memory,
        extra=extra,
        share=share,
        numbered=numbered,
        **sampling,
    )
    return NullLoader(resident) if name == "null" else resident


def _checked(name: str, made: object) -> Loader:
    if not isinstance(made, Loader):
        raise EngineError(
            f"data.loader = {name}: its maker returned no engine.data.loaders.Loader, but "
            f"{made!r:.60}"
        )
    return made


def _of_photos(
    name: str, photos: Photos, batch_size: int, *, workers: int, **options: Any
) -> Loader:
    shares = {
        key: options.pop(key) for key in ("device", "replays", "rank", "world") if key in options
    }
    photos = photos.framed(replace(photos.framing, **options))
    if name == "resident":
        raise EngineError(
            "data.loader = resident: pictures of many sizes are streamed: dali, torch or auto"
        )
    if name == "auto":
        name = "dali"
        if missing := _dali_missing():
            log.warning("torch's DataLoader reads the pictures: %s", missing)
            name = "torch"
    if (make := register.maker(name)) is not None:
        made = make(photos, photos.labels, batch_size, workers=workers, **shares)
        return _checked(name, made)
    kind = DaliPhotoLoader if name == "dali" else WorkerPhotoLoader
    loader = kind(photos, batch_size, workers=0 if name == "null" else workers, **shares)
    return NullLoader(loader) if name == "null" else loader
