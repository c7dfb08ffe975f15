"""Loaders of pictures in folders: what they share, and torch's DataLoader with Pillow."""

from __future__ import annotations

import abc
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..arrays import to_device
from ..photos import Frames, Photos, Sample, as_floats, stacked
from .base import Batch, Loader, Sampling, blank

Faults = list[tuple[str, str]]


class PhotoLoader(Loader, abc.ABC):
    """Give batches of pictures, each in the frame that (seed, epoch, position) draws.

    Args:
        photos: the training set, whose framing holds the seed and the options.
        workers: threads or processes.
        replays, rank, world: as `Sampling` has them.
    Raises:
        EngineError: if the set is smaller than a batch.
    """

    def __init__(
        self,
        photos: Photos,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        workers: int = 0,
        replays: int = 1,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.photos, self.framing = photos, photos.framing
        self.device, self.workers = torch.device(device), workers
        self.sampling = Sampling(
            len(photos),
            (3, *self.framing.size),
            batch_size,
            seed=self.framing.seed,
            replays=replays,
            rank=rank,
            world=world,
        )
        self._order: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.sampling)

    def example(self) -> Batch:
        return blank(self.sampling, self.device)

    def positions(self, epoch: int, step: int) -> Tensor:
        """Return the pictures of a step of an epoch, int64 [B], positions in the training set."""
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, self.sampling.order(epoch)
        return self._order[1][step // self.sampling.replays]

    def frames(self, epoch: int, positions: Tensor) -> Frames:
        """Return the frames of pictures in an epoch."""
        return self.framing.draw(epoch, positions, self.photos.sizes_of(positions))

    def batch(
        self, epoch: int, pixels: Tensor, positions: Tensor, crops: Tensor, faults: Faults
    ) -> Batch:
        """Return the batch of framed pictures, on the device.

        Args:
            pixels: uint8 [B, 3, H, W], or float32 in [0, 1].
            positions: int64 [B], after damaged pictures were replaced.
            crops: int32 [B, 3], before that.
        Raises:
            EngineError: for damaged files, where they are refused.
        """
        if faults:
            self.photos.admit(faults)
            crops = self.frames(epoch, positions).crops
        x = pixels if pixels.is_floating_point() else as_floats(pixels, self.device)
        if self.framing.jitter:
            colours = self.framing.colours(epoch, positions)
            matrix, offset = (to_device(t, self.device) for t in colours)
            x = torch.baddbmm(offset, matrix, x.flatten(2)).clamp_(0.0, 1.0).view_as(x)
        labels = self.photos.labels_of(positions)
        return Batch(x, *(to_device(t, self.device) for t in (labels, positions, crops)))


class _Samples(Dataset):
    """Return one framed picture for a key: position, window, crop and epoch."""

    def __init__(self, photos: Photos) -> None:
        self.photos = photos

    def __getitem__(self, key: list[int]) -> Sample:
        position, *frame, epoch = key
        return self.photos.sample(position, frame[:4], frame[4:], epoch)


class _Keys:
    """Give the keys of every batch of an epoch: a batch sampler for a DataLoader."""

    def __init__(self, loader: WorkerPhotoLoader) -> None:
        self.loader, self.epoch, self.first = loader, 0, 0
        # Of the batches on their way.
        self.crops: deque[Tensor] = deque()

    def __len__(self) -> int:
        return len(self.loader) - self.first

    def __iter__(self) -> Iterator[list[list[int]]]:
        loader, epoch = self.loader, self.epoch
        for step in range(self.first, len(loader)):
            positions = loader.positions(epoch, step)
            frames = loader.frames(epoch, positions)
            self.crops.append(frames.crops)
            columns = [positions[:, None], frames.windows, frames.crops]
            keys = torch.cat([*columns, torch.full_like(positions[:, None], epoch)], 1)
            yield keys.tolist()


def _collated(samples: list[Sample]) -> tuple[Tensor, Tensor, Faults]:
    positions = torch.tensor([sample.position for sample in samples])
    return stacked(samples), positions, [fault for sample in samples for fault in sample.faults]


class WorkerPhotoLoader(PhotoLoader):
    """Give batches from torch's DataLoader; Pillow decodes in its worker processes.

    Args:
        workers: processes; 0: the training process itself.
    """

    def __init__(self, photos: Photos, batch_size: int, **options: Any) -> None:
        super().__init__(photos, batch_size, **options)
        self._keys = _Keys(self)
        self._loader: Any = DataLoader(
            _Samples(photos),
            batch_sampler=self._keys,
            collate_fn=_collated,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
        )

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        self._keys.epoch, self._keys.first = epoch, first
        self._keys.crops.clear()
        for pixels, positions, faults in self._loader:
            yield self.batch(epoch, pixels, positions, self._keys.crops.popleft(), faults)

    def close(self) -> None:
        self._loader = ()
