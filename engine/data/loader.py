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
        self.state = rng.state(seed, device)
        self.memory = memory

    def __len__(self) -> int:
        """Steps in an epoch."""
        return len(self.images) // self.batch_size

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch (counted from 0), each made when it is asked for.

        With a memory that matters across epochs: an epoch must not begin before the last has been
        remembered. Within one, every sample occurs once.
        """
        # A generator of its own for every epoch: the order never depends on what ran before.
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.images), generator=draw).to(self.images.device)
        for i in range(len(self)):
            index = order[i * self.batch_size : (i + 1) * self.batch_size]
            if self.images.is_floating_point():
                where = torch.zeros((len(index), 3), dtype=torch.int32, device=index.device)
                yield Batch(self.images[index], self.labels[index], index, where)
                continue
            self.state[1] = epoch * len(self) + i
            yield self._augmented(index)

    def _augmented(self, index: Tensor) -> Batch:
        memory = self.memory
        x, where, start = kernels.augment(
            self.images,
            index,
            self.state,
            pad=self.pad,
            flip=self.flip,
            stream=rng.AUGMENT,
            memory=None if memory is None else memory.deltas,
            eps=None if memory is None else memory.threat.eps,
            norm="Linf" if memory is None else memory.threat.norm,
        )
        return Batch(x, self.labels[index], index, where, start)


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
