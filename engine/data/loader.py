"""The resident loader: the whole uint8 dataset lies on the training device, and one op makes each batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import kernels, rng
from ..errors import EngineError
from ..memory import AdversaryMemory


class Batch(NamedTuple):
    """One training batch.

    Attributes:
        x: float32 [B, C, H, W] in [0, 1]; y: int64 [B].
        samples: int64 [B], positions in the training set; where: int32 [B, 3], the (dy, dx, mirrored)
            of each crop. An adversary memory needs both; None where a loader cannot tell.
        start: float32 like x, where the attack starts; None where the loader has no memory of its own.
    """

    x: Tensor
    y: Tensor
    samples: Tensor | None = None
    where: Tensor | None = None
    start: Tensor | None = None


class ResidentLoader:
    """Shuffled, augmented batches as a pure function of (seed, epoch, position).

    Args:
        images: uint8 [N, C, H, W], or float32 [N, ...] in [0, 1] where nothing is to be augmented.
        labels: int64 [N].
        batch_size: a last short batch is dropped, so every step has one shape.
        pad, flip: random crop of the image padded by `pad` pixels; random mirroring.
        replays: steps in a row on every batch (Free-AT's m, arXiv 1904.12843); an epoch has as many
            times more steps.
        memory: the trainer's adversary memory; batches of uint8 images then bring the attack's start,
            formed in the pass that makes them.
    Raises:
        EngineError: if the set is smaller than a batch, or of another type.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        seed: int = 0,
        pad: int = 0,
        flip: bool = False,
        replays: int = 1,
        device: torch.device | str = "cpu",
        memory: AdversaryMemory | None = None,
    ) -> None:
        if len(images) < batch_size:
            raise EngineError(
                f"a batch of {batch_size} is larger than the {len(images)} training images: "
                "lower --optim.batch-size"
            )
        plain = images.dtype == torch.float32 and pad == 0 and not flip
        if not plain and (images.dtype != torch.uint8 or images.dim() != 4):
            raise EngineError(
                "training images must be uint8 [N, C, H, W] (or float32 in [0, 1], without crop "
                f"and mirror), got {images.dtype} {tuple(images.shape)}"
            )
        if len(labels) != len(images):
            raise EngineError(f"{len(images)} training images have {len(labels)} labels")
        self.images = images.to(device).contiguous()
        self.labels = labels.to(device)
        self.batch_size, self.seed, self.pad, self.flip = batch_size, seed, pad, flip
        self.replays, self.memory = replays, memory
        # The order of the epoch at hand, and the number of its first step since training began.
        batches = len(images) // batch_size
        self._order = torch.zeros((batches, batch_size), dtype=torch.int64, device=device)
        self._first = torch.zeros(1, dtype=torch.int64, device=device)

    def __len__(self) -> int:
        """Steps in an epoch."""
        return len(self._order) * self.replays

    def begin(self, epoch: int) -> None:
        """Shuffle for an epoch (counted from 0): the one word that a captured step needs from the host."""
        # A generator of its own for every epoch: the order never depends on what ran before.
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.images), generator=draw)[: self._order.numel()]
        self._order.copy_(order.view_as(self._order))
        self._first.fill_(epoch * len(self))

    def take(self, state: Tensor) -> Batch:
        """The batch of a step, made on the device with no word to or from the host.

        Args:
            state: int64 [2] (seed, steps since training began): says which batch of the epoch it is,
                and seeds the augmentation.
        """
        row = state[1:] - self._first
        if self.replays > 1:
            # A replay has the crops of its first time, so it draws them from that step's state.
            state = torch.cat([state[:1], state[1:] - row % self.replays])
            row = row // self.replays
        index = self._order.index_select(0, row).view(-1)
        labels = self.labels.index_select(0, index)
        if self.images.is_floating_point():
            where = torch.zeros((len(index), 3), dtype=torch.int32, device=index.device)
            return Batch(self.images.index_select(0, index), labels, index, where)
        memory = self.memory
        x, where, start = kernels.augment(
            self.images,
            index,
            state,
            pad=self.pad,
            flip=self.flip,
            stream=rng.AUGMENT,
            memory=None if memory is None else memory.deltas,
            eps=None if memory is None else memory.threat.eps,
            norm="Linf" if memory is None else memory.threat.norm,
        )
        return Batch(x, labels, index, where, start)

    def tensors(self) -> list[Tensor]:
        """What `take` reads, and must find where it was."""
        return [self.images, self.labels, self._order, self._first]

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch, each made when it is asked for.

        With a memory that matters across epochs: an epoch must not begin before the last has been
        remembered. Within one, every sample occurs once.
        """
        self.begin(epoch)
        state = rng.state(self.seed, self.images.device, epoch * len(self))
        for _ in range(len(self)):
            yield self.take(state)
            state[1:].add_(1)


class TensorLoader:
    """Anything that yields (x, y), a torch DataLoader for one, as a loader without indices.

    Args:
        source: re-iterable with a length; x float in [0, 1], y int64.
    """

    def __init__(self, source, device: torch.device | str = "cpu") -> None:
        self.source, self.device = source, device

    def __len__(self) -> int:
        return len(self.source)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        sampler = getattr(self.source, "sampler", None)
        set_epoch = getattr(sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
        for x, y in self.source:
            yield Batch(x.to(self.device), y.to(self.device))
