"""The resident loader: the uint8 dataset lies on the training device, and one op makes a batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import kernels, rng
from ...adversary.memory import AdversaryMemory
from ...device.capture import WARM_UP
from ...errors import EngineError
from ..arrays import to_device
from .base import Batch, Loader, Sampling, check_images


class ResidentLoader(Loader):
    """Give shuffled, augmented batches as a pure function of (seed, epoch, position).

    Args:
        images: uint8 [N, C, H, W], or float32 [N, ...] in [0, 1] where nothing is to be augmented.
        labels: int64 [N].
        device: where batches are made; left out: where the images are.
        sampling: options as `Sampling` has them.
        extra: extra images and labels, as `images` and `labels`; `share` of every batch are drawn
            from them. They lie on the device where they fit beside the set, else on the host, which
            then hands over every batch.
        numbered: extra images have positions too, from N on, for a memory that holds all images.
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
        extra: tuple[Tensor, Tensor] | None = None,
        share: float = 0.0,
        numbered: bool = False,
        **sampling: Any,
    ) -> None:
        shape = tuple(images.shape[1:])
        if extra is not None:
            sampling |= {"extra": extras_of(batch_size, share), "extra_count": len(extra[0])}
        self.sampling = Sampling(len(images), shape, batch_size, **sampling)  # type: ignore[arg-type]
        check_images(images, labels, plain=not self.sampling.augments)
        device = images.device if device is None else torch.device(device)
        self.images = images.to(device).contiguous()
        self.labels = labels.to(device)
        self.memory = memory
        self._extra, self._numbered = extra, numbered
        if extra is not None:
            check_images(*extra)
            if extra[0].shape[1:] != images.shape[1:]:
                raise EngineError(
                    f"extra images of {'x'.join(map(str, extra[0].shape[1:]))}, where the training "
                    f"images are {'x'.join(map(str, images.shape[1:]))}: bring them to one shape"
                )
            if _fits(extra[0], device):
                self._extra = extra[0].to(device), extra[1].to(device)
            else:
                self.take = None  # type: ignore[assignment]
        # The order of this epoch, and the number of its first step since training began. Warm-up
        # for a capture runs past the end of a short epoch.
        self._order = torch.zeros(
            (self.sampling.batches + WARM_UP, self.sampling.own), dtype=torch.int64, device=device
        )
        rows = (self.sampling.batches + WARM_UP, self.sampling.extra)
        self._extras = torch.zeros(rows, dtype=torch.int64, device=device)
        self._first = torch.zeros(1, dtype=torch.int64, device=device)

    def __len__(self) -> int:
        return len(self.sampling)

    def begin(self, epoch: int) -> None:
        """Shuffle for an epoch (counted from 0); a captured step needs only this from the host."""
        self._order[: self.sampling.batches].copy_(self.sampling.order(epoch))
        if self.sampling.extra:
            self._extras[: self.sampling.batches].copy_(self.sampling.extras(epoch))
        self._first.fill_(epoch * len(self))

    def take(self, state: Tensor) -> Batch:  # type: ignore[override]
        """Return the batch of a step, made on the device without the host.

        Args:
            state: int64 [2] (seed, steps since training began): selects the batch of the epoch, and
                seeds the augmentation.
        """
        state, row = self._place(state)
        batch = self._own(state, row)
        if self._extra is None:
            return batch
        index = self._extras.index_select(0, row).view(-1)
        return self._joined(batch, *self._extra, index, index, state)

    def _place(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return the state that seeds a step's crops, and the row of its batch in the epoch."""
        row, replays = state[1:] - self._first, self.sampling.replays
        if replays > 1:
            # A replay has the crops of its first step, so it draws them from that step's state.
            state = torch.cat([state[:1], state[1:] - row % replays])
            row = row // replays
        return state, row

    def _joined(
        self,
        batch: Batch,
        images: Tensor,
        labels: Tensor,
        index: Tensor,
        positions: Tensor,
        state: Tensor,
    ) -> Batch:
        """Return `batch` with the rows `index` of extra images after its own.

        Args:
            positions: int64 like `index`, of these images in the whole extra set.
        """
        made = self._augment(images, index, state, rng.EXTRA)
        extra = _labelled(made, labels.index_select(0, index))
        joined = {"x": torch.cat([batch.x, extra.x]), "y": torch.cat([batch.y, extra.y])}
        if batch.second is not None and extra.second is not None:
            joined["second"] = torch.cat([batch.second, extra.second])
        if batch.share is not None and extra.share is not None:
            joined["share"] = torch.cat([batch.share, extra.share])
        if self._numbered and batch.samples is not None and batch.crops is not None:
            joined["samples"] = torch.cat([batch.samples, positions + len(self.images)])
            joined["crops"] = torch.cat([batch.crops, made.crops])
        return batch._replace(**joined)

    def _own(self, state: Tensor, row: Tensor) -> Batch:
        index = self._order.index_select(0, row).view(-1)
        labels = self.labels.index_select(0, index)
        if self.images.is_floating_point():
            crops = torch.zeros((len(index), 3), dtype=torch.int32, device=index.device)
            return Batch(self.images.index_select(0, index), labels, index, crops)
        made = self._augment(self.images, index, state, rng.AUGMENT, self.memory)
        return _labelled(made, labels)._replace(samples=index, crops=made.crops, start=made.start)

    def _augment(
        self,
        images: Tensor,
        index: Tensor,
        state: Tensor,
        stream: int,
        memory: AdversaryMemory | None = None,
    ) -> kernels.Augmented:
        options = self.sampling
        return kernels.augment(
            images,
            index,
            state,
            pad=options.pad,
            flip=options.flip,
            cutout=options.cutout,
            stream=stream,
            memory=None if memory is None else memory.deltas,
            eps=None if memory is None else memory.threat.eps,
            norm="Linf" if memory is None else memory.threat.norm,
            cutmix=options.cutmix,
            erase=options.erase,
            jitter=options.jitter,
        )

    def tensors(self) -> list[Tensor]:
        """Return the tensors that `take` reads at fixed places."""
        fixed = [self.images, self.labels, self._order, self._first]
        if self._extra is not None and self.take is not None:
            fixed += [*self._extra, self._extras]
        return fixed

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Give the batches of one epoch, each made when it is asked for.

        With a memory, the earlier epoch must have been remembered before the next begins. Within an
        epoch every sample occurs once.
        """
        self.begin(epoch)
        state = rng.state(self.sampling.seed, self.images.device, epoch * len(self) + first)
        if self.take is None:
            yield from self._from_host(epoch, first, state)
            return
        for _ in range(first, len(self)):
            yield self.take(state)
            state[1:].add_(1)

    def _from_host(self, epoch: int, first: int, state: Tensor) -> Iterator[Batch]:
        """Give the batches of an epoch whose extra images lie on the host."""
        assert self._extra is not None
        images, labels = self._extra
        device, order = self.images.device, self.sampling.extras(epoch)
        whole = torch.arange(self.sampling.extra, device=device)
        for position in range(first, len(self)):
            index = order[position // self.sampling.replays]
            rows = (images.index_select(0, index), labels.index_select(0, index), index)
            drawn = [to_device(t, device) for t in rows]
            seeded, row = self._place(state)
            own = self._own(seeded, row)
            yield self._joined(own, drawn[0], drawn[1], whole, drawn[2], seeded)
            state[1:].add_(1)

    def example(self) -> Batch | None:
        # Without `take`, a captured step wants a batch before its first.
        return next(self.epoch(0)) if self.take is None else None


def _labelled(made: kernels.Augmented, labels: Tensor) -> Batch:
    """Return the images with their labels; of mixed images the larger part has the label `y`."""
    if made.share is None:
        return Batch(made.x, labels)
    # The rest of an image is the next one's.
    others, own = labels.roll(-1), made.share >= 0.5
    return Batch(
        made.x,
        torch.where(own, labels, others),
        second=torch.where(own, others, labels),
        share=torch.maximum(made.share, 1.0 - made.share),
    )


def extras_of(batch_size: int, share: float) -> int:
    """Return how many of `batch_size` images are extra ones: `share` of them, rounded.

    Raises:
        EngineError: where that is none of them, or all.
    """
    extra = round(share * batch_size)
    if not 0 < extra < batch_size:
        raise EngineError(
            f"data.extra_share = {share:g} of a batch of {batch_size} is {extra} images: at least "
            "one must be extra, and one the set's own"
        )
    return extra


def _fits(images: Tensor, device: torch.device) -> bool:
    """Return whether extra images may lie on the device, beside all else."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return images.numel() <= free // 2
