"""The familiar loader: torch's DataLoader, one sample at a time, in worker processes if asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..arrays import to_device
from .base import Batch, Loader, Sampling, blank, check_images


class _Samples(Dataset):
    """Return one augmented sample for a key (sample, dy, dx, mirrored, y, x)."""

    def __init__(self, images: Tensor, labels: Tensor, sampling: Sampling) -> None:
        self.images, self.labels, self.sampling = images, labels, sampling

    def __getitem__(self, key: tuple[int, int, int, int, int, int]) -> tuple[Tensor, Tensor]:
        sample, dy, dx, mirrored, y, x = key
        image, pad = self.images[sample], self.sampling.pad
        _, height, width = image.shape
        if pad:
            image = F.pad(image, (pad, pad, pad, pad))
            image = image[:, pad + dy : pad + dy + height, pad + dx : pad + dx + width]
        if mirrored:
            image = image.flip(2)
        image = image.float().div(255.0)
        side = self.sampling.cutout
        if side:
            top, left = y - side // 2, x - side // 2
            image[:, max(0, top) : max(0, top + side), max(0, left) : max(0, left + side)] = 0.0
        return image, self.labels[sample]


class _Keys:
    """Give the keys of every batch of an epoch: a batch sampler for a DataLoader."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling, self.epoch, self.first = sampling, 0, 0

    def __len__(self) -> int:
        return len(self.sampling) - self.first

    def __iter__(self) -> Iterator[list[tuple[int, ...]]]:
        options, order = self.sampling, self.sampling.order(self.epoch)
        for position in range(self.first, len(options)):
            crops = options.crops(self.epoch * len(options) + position)
            samples = order[position // options.replays]
            yield [tuple(row) for row in torch.cat([samples[:, None], crops], dim=1).tolist()]


class WorkerLoader(Loader):
    """Give batches from torch's DataLoader.

    Args:
        images: uint8 [N, C, H, W]; labels: int64 [N]; both on the host.
        workers: processes; 0: the training process itself.
        sampling: options as `Sampling` has them.
    Raises:
        EngineError: for a set smaller than a batch, or of another type.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        workers: int = 0,
        **sampling: Any,
    ) -> None:
        check_images(images, labels)
        shape = tuple(images.shape[1:])
        self.sampling = Sampling(len(images), shape, batch_size, **sampling)  # type: ignore[arg-type]
        self.device = torch.device(device)
        self._keys = _Keys(self.sampling)
        self._loader: Any = DataLoader(
            _Samples(images, labels, self.sampling),
            batch_sampler=self._keys,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.device.type == "cuda",
        )

    def __len__(self) -> int:
        return len(self.sampling)

    def example(self) -> Batch:
        return blank(self.sampling, self.device)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        self._keys.epoch, self._keys.first = epoch, first
        order = self.sampling.order(epoch)
        for position, (x, y) in enumerate(self._loader, start=first):
            samples = order[position // self.sampling.replays]
            crops = self.sampling.crops(epoch * len(self) + position)[:, :3].contiguous()
            yield Batch(*(to_device(t, self.device) for t in (x, y, samples, crops)))

    def close(self) -> None:
        self._loader = ()


class TensorLoader(Loader):
    """Give the batches of anything that yields (x, y), without sample indices.

    Args:
        source: re-iterable with a length; x float in [0, 1], y int64.
    """

    def __init__(self, source: Any, device: torch.device | str = "cpu") -> None:
        self.source, self.device = source, device

    def __len__(self) -> int:
        return len(self.source)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        sampler = getattr(self.source, "sampler", None)
        set_epoch = getattr(sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
        for position, (x, y) in enumerate(self.source):
            if position >= first:
                yield Batch(to_device(x, self.device), to_device(y, self.device))
