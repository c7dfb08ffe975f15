"""Loaders: the same batches from the device itself, from DALI, or from torch's DataLoader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from ...adversary.memory import AdversaryMemory
from ...errors import EngineError
from .base import Batch, Loader, Sampling
from .dali import DaliLoader
from .resident import ResidentLoader
from .workers import TensorLoader, WorkerLoader

LoaderName = Literal["auto", "resident", "dali", "torch", "null"]

__all__ = [
    "Batch",
    "DaliLoader",
    "Loader",
    "LoaderName",
    "NullLoader",
    "ResidentLoader",
    "Sampling",
    "TensorLoader",
    "WorkerLoader",
    "build",
    "choose",
]


class NullLoader(Loader):
    """Repeat one batch, to measure training without the cost of data. For benchmarks only."""

    def __init__(self, resident: ResidentLoader) -> None:
        self._steps = len(resident)
        self._batch = next(resident.epoch(0))

    def __len__(self) -> int:
        return self._steps

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        for _ in range(first, len(self)):
            yield self._batch


def choose(images: Tensor, device: torch.device | str) -> LoaderName:
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


def build(
    name: LoaderName,
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    *,
    device: torch.device | str = "cpu",
    memory: AdversaryMemory | None = None,
    workers: int = 2,
    extra: tuple[Tensor, Tensor] | None = None,
    share: float = 0.0,
    **sampling: Any,
) -> Loader:
    """Return the loader called `name`.

    Args:
        images: uint8 [N, C, H, W]; labels: int64 [N].
        memory: the adversary memory; only the resident loader forms the attack's start itself.
        extra, share: extra images for the resident loader, see `ResidentLoader`.
        workers: threads of DALI, processes of torch's loader.
        sampling: options as `Sampling` has them.
    Raises:
        EngineError: where DALI is asked for and missing; for a set smaller than a batch, or of
            another type.
    """
    if name == "auto":
        name = choose(images, device)
    if extra is not None and name in ("dali", "torch"):
        raise EngineError(f"data.extra with the {name} loader: it needs data.loader = resident")
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
        **sampling,
    )
    return NullLoader(resident) if name == "null" else resident
