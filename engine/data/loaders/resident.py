"""The resident loader: the uint8 dataset lies on the training device, and one op makes a batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import kernels, rng
from ...adversary.memory import AdversaryMemory
from ...device.capture import WARM_UP
from .base import Batch, Loader, Sampling, check_images


class ResidentLoader(Loader):
    """Give shuffled, augmented batches as a pure function of (seed, epoch, position).

    Args:
        images: uint8 [N, C, H, W], or float32 [N, ...] in [0, 1] where nothing is to be augmented.
        labels: int64 [N].
        device: where batches are made; left out: where the images are.
        sampling: options as `Sampling` has them.
        memory: the trainer's adversary memory; batches of uint8 images then bring the attack's
            start, formed in the pass that makes them.
    Raises:
        EngineError: if the set is smaller than a batch, or of another type.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        memory: AdversaryMemory | None = None,
        **sampling: Any,
    ) -> None:
        shape = tuple(images.shape[1:])
        self.sampling = Sampling(len(images), shape, batch_size, **sampling)  # type: ignore[arg-type]
        augments = self.sampling.pad or self.sampling.flip or self.sampling.cutout
        check_images(images, labels, plain=not augments)
        device = images.device if device is None else torch.device(device)
        self.images = images.to(device).contiguous()
        self.labels = labels.to(device)
        self.memory = memory
        # The order of this epoch, and the number of its first step since training began. Warm-up
        # for a capture runs past the end of a short epoch.
        self._order = torch.zeros(
            (self.sampling.batches + WARM_UP, batch_size), dtype=torch.int64, device=device
        )
        self._first = torch.zeros(1, dtype=torch.int64, device=device)

    def __len__(self) -> int:
        return len(self.sampling)

    def begin(self, epoch: int) -> None:
        """Shuffle for an epoch (counted from 0); a captured step needs only this from the host."""
        self._order[: self.sampling.batches].copy_(self.sampling.order(epoch))
        self._first.fill_(epoch * len(self))

    def take(self, state: Tensor) -> Batch:
        """Return the batch of a step, made on the device without the host.

        Args:
            state: int64 [2] (seed, steps since training began): selects the batch of the epoch, and
                seeds the augmentation.
        """
        options, row = self.sampling, state[1:] - self._first
        if options.replays > 1:
            # A replay has the crops of its first step, so it draws them from that step's state.
            state = torch.cat([state[:1], state[1:] - row % options.replays])
            row = row // options.replays
        index = self._order.index_select(0, row).view(-1)
        labels = self.labels.index_select(0, index)
        if self.images.is_floating_point():
            crops = torch.zeros((len(index), 3), dtype=torch.int32, device=index.device)
            return Batch(self.images.index_select(0, index), labels, index, crops)
        memory = self.memory
        x, crops, start = kernels.augment(
            self.images,
            index,
            state,
            pad=options.pad,
            flip=options.flip,
            cutout=options.cutout,
            stream=rng.AUGMENT,
            memory=None if memory is None else memory.deltas,
            eps=None if memory is None else memory.threat.eps,
            norm="Linf" if memory is None else memory.threat.norm,
        )
        return Batch(x, labels, index, crops, start)

    def tensors(self) -> list[Tensor]:
        """Return the tensors that `take` reads at fixed places."""
        return [self.images, self.labels, self._order, self._first]

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Give the batches of one epoch, each made when it is asked for.

        With a memory, the earlier epoch must have been remembered before the next begins. Within an
        epoch every sample occurs once.
        """
        self.begin(epoch)
        state = rng.state(self.sampling.seed, self.images.device, epoch * len(self) + first)
        for _ in range(first, len(self)):
            yield self.take(state)
            state[1:].add_(1)
