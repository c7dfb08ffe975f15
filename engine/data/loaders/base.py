"""The interface of a loader, its batches, and the samples and crops that it draws."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ... import rng
from ...errors import EngineError
from ...kernels import Labels, MixedLabels, reference
from ...threat import check_pixels


class Batch(NamedTuple):
    """Hold one training batch.

    Attributes:
        x: float32 [B, C, H, W] in [0, 1]; y: int64 [B].
        samples: int64 [B], positions in the training set. Extra images come last in the batch; they
            have no position and are left out, or their positions begin where the set ends.
        crops: int32, a row (dy, dx, mirrored) for each of `samples`: its crop. An adversary memory
            needs `samples` and `crops`; both are None if the loader does not know them.
        start: float32 like x[: len(samples)], where the attack starts; None where the loader has no
            memory of its own.
        second, share: int64 and float32 [B], for mixed images: the other label, and the share in
            [0.5, 1] of the label in `y`. None without CutMix.
    """

    x: Tensor
    y: Tensor
    samples: Tensor | None = None
    crops: Tensor | None = None
    start: Tensor | None = None
    second: Tensor | None = None
    share: Tensor | None = None

    @property
    def labels(self) -> Labels:
        """Return the labels as objectives take them."""
        if self.second is None or self.share is None:
            return self.y
        return MixedLabels(self.y, self.second, self.share)


class Loader(abc.ABC):
    """Give the batches of a training set, the same ones for the same (epoch, position).

    Attributes:
        take: makes the batch of a step on the device, from the step's random state; None: the
            loader hands every batch over from the host.
    """

    take: Callable[[Tensor], Batch] | None = None

    @abc.abstractmethod
    def __len__(self) -> int:
        """Return the number of steps in an epoch."""

    @abc.abstractmethod
    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Give the batches of one epoch (counted from 0), from position `first` on."""

    def begin(self, epoch: int) -> None:  # noqa: B027
        """Prepare `take` for the batches of an epoch (counted from 0)."""

    def feed(self, epoch: int, first: int = 0, *, taken: bool) -> Iterable[Batch | None]:
        """Give the argument of every step of an epoch, from position `first` on.

        Args:
            taken: the step makes its batches by `take`; its argument is then None.
        """
        if not taken:
            return self.epoch(epoch, first)
        self.begin(epoch)
        return itertools.repeat(None, len(self) - first)

    def example(self) -> Batch | None:
        """Return a batch of the shapes to come, made before any thread runs.

        None: the loader has no such batch before its first.
        """
        return None

    def close(self) -> None:  # noqa: B027
        """Stop threads and processes; the loader gives no batch after this."""


def blank(sampling: Sampling, device: torch.device) -> Batch:
    """Return a batch of zeros with the shapes of all others."""
    b = sampling.batch_size
    return Batch(
        torch.zeros((b, *sampling.shape), device=device),
        torch.zeros(b, dtype=torch.int64, device=device),
        torch.zeros(b, dtype=torch.int64, device=device),
        torch.zeros((b, 3), dtype=torch.int32, device=device),
    )


@dataclass(frozen=True)
class Sampling:
    """Draw the samples of every batch, and their crops, as a pure function of seed and step.

    Attributes:
        shape: (C, H, W) of one image.
        batch_size: of one process; a last short batch is dropped, so every step has one shape.
        pad: random crop of the image padded by this [pixels]; flip: random mirroring; cutout: side
            of a square set to 0 [pixels], 0: none; cutmix, erase, jitter: as `kernels.augment` has
            them, for the resident loader.
        extra, extra_count: how many images of a batch are extra ones, its last, and the size of the
            set that they are drawn from, with replacement. An epoch has as many steps as without
            them, so the set's own images go round more slowly.
        replays: steps in a row on every batch, which keeps its crops meanwhile.
        rank, world: this process takes its share of each of the `world` times larger batches.
    Raises:
        EngineError: if the set is smaller than a batch.
    """

    count: int
    shape: tuple[int, int, int]
    batch_size: int
    seed: int = 0
    pad: int = 0
    flip: bool = False
    cutout: int = 0
    cutmix: bool = False
    erase: float = 0.0
    jitter: float = 0.0
    replays: int = 1
    rank: int = 0
    world: int = 1
    extra: int = 0
    extra_count: int = 0

    def __post_init__(self) -> None:
        if self.count < self.batch_size * self.world:
            raise EngineError(
                f"a batch of {self.batch_size * self.world} is larger than the {self.count} "
                "training images: lower the batch size (--optim.batch-size)"
            )

    @property
    def augments(self) -> bool:
        """Return whether images are changed, which needs uint8 images."""
        options = (self.pad, self.flip, self.cutout, self.cutmix, self.erase, self.jitter)
        return any(options)

    @property
    def batches(self) -> int:
        """Return the number of different batches in an epoch."""
        return self.count // (self.batch_size * self.world)

    @property
    def own(self) -> int:
        """Return how many images of a batch are the set's own, its first."""
        return self.batch_size - self.extra

    def __len__(self) -> int:
        return self.batches * self.replays

    def order(self, epoch: int) -> Tensor:
        """Return the samples of every batch of an epoch, int64 [batches, own]."""
        # Without extra images, a round is an epoch.
        size = self.count // (self.own * self.world)
        first, last = epoch * self.batches, (epoch + 1) * self.batches
        rounds = range(first // size, (last - 1) // size + 1)
        rows = torch.cat([self._round(number, size) for number in rounds])
        return rows[first - rounds[0] * size :][: self.batches]

    def _round(self, number: int, size: int) -> Tensor:
        """Return the samples of the `size` batches of a round through the set, shuffled."""
        # Every round has its own generator: the order does not depend on earlier draws.
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        order = torch.randperm(self.count, generator=draw)
        whole = order[: size * self.world * self.own]
        return whole.view(size, self.world, self.own)[:, self.rank]

    def extras(self, epoch: int) -> Tensor:
        """Return the extra images of every batch of an epoch, int64 [batches, extra]."""
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch + (1 << 40))
        shape = (self.batches, self.world, self.extra)
        return torch.randint(self.extra_count, shape, generator=draw)[:, self.rank]

    def crops(self, step: int) -> Tensor:
        """Return the crops of a step, counted since training began.

        Returns:
            int32 [batch_size, 5]: (dy, dx, mirrored), and the cutout's centre (y, x).
        """
        state = rng.state(self.seed, step=step - step % len(self) % self.replays)
        drawn = reference.draw_crops(
            state,
            self.world * self.batch_size,
            self.pad,
            self.flip,
            rng.AUGMENT,
            *self.shape[1:],
        )
        return drawn.view(self.world, self.batch_size, 5)[self.rank]


def check_images(images: Tensor, labels: Tensor, *, plain: bool = False) -> None:
    """Refuse images that are not uint8 [N, C, H, W] with a label each.

    Args:
        plain: float32 images [N, ...] in [0, 1] are taken too.
    """
    if not (plain and images.dtype == torch.float32) and (
        images.dtype != torch.uint8 or images.dim() != 4
    ):
        raise EngineError(
            "training images must be uint8 [N, C, H, W] (or float32 in [0, 1], without crop "
            f"and mirror), got {images.dtype} {tuple(images.shape)}"
        )
    if len(labels) != len(images):
        raise EngineError(f"{len(images)} training images have {len(labels)} labels")
    check_pixels(images)
