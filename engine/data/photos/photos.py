"""Pictures in a folder in place of a tensor of images: the same length and shape, read by parts."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import EngineError
from ..arrays import to_device
from . import decode
from .framing import Framing
from .index import Index, read_file
from .listing import fixed_order

log = logging.getLogger(__name__)

Damaged = Literal["refuse", "skip"]
# The statistics of a set come from so many of its pictures.
_STATISTICS = 1000
# One message names so many files at most.
_NAMED = 5


class Sample(NamedTuple):
    """Hold one framed picture.

    Attributes:
        pixels: uint8 [3, H, W], of any layout in memory.
        position: of this picture in its set; not the one asked for where that one is damaged.
        faults: (name, reason) of the damaged files on the way to it.
    """

    pixels: np.ndarray
    position: int
    faults: list[tuple[str, str]]


@dataclass(frozen=True, eq=False)
class Photos:
    """Hold some of a folder's pictures, in an order.

    A picture that turns out to be damaged when it is decoded is replaced by the next whole one of
    the set, so every batch stays a function of the files alone.

    Attributes:
        rows: int64 [N], positions in the index.
        framing: the frames of these pictures.
        damaged: "refuse" damaged files, or "skip" them.
        threads: that read and decode [count].
    """

    index: Index = field(repr=False)
    rows: Tensor = field(repr=False)
    framing: Framing
    damaged: Damaged = "refuse"
    threads: int = 2
    _named: set[str] = field(default_factory=set, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, chosen: Tensor | slice) -> Photos:
        """Return some of these pictures, in the order of `chosen`."""
        return replace(self, rows=self.rows[chosen])

    @property
    def shape(self) -> torch.Size:
        """Return [N, 3, H, W]: pictures are RGB, and of the size that the network sees."""
        return torch.Size((len(self), 3, *self.framing.size))

    @property
    def labels(self) -> Tensor:
        """Return int64 [N]."""
        return self.index.labels[self.rows]

    def labels_of(self, positions: Tensor) -> Tensor:
        """Return the labels of some pictures, int64 [n]."""
        return self.index.labels[self.rows[positions]]

    def sizes_of(self, positions: Tensor) -> Tensor:
        """Return the upright pictures' (height, width), int32 [n, 2]."""
        return self.index.sizes[self.rows[positions]]

    def framed(self, framing: Framing) -> Photos:
        """Return the same pictures with other frames."""
        return replace(self, framing=framing)

    def sample(
        self, position: int, window: Sequence[int], crop: Sequence[int], epoch: int
    ) -> Sample:
        """Return a picture in its frame; the next whole one where it is damaged.

        Args:
            window, crop: the picture's frame, as in `Frames`.
            epoch: in which a replacement's frame is drawn; -1: its centre.
        """
        faults: list[tuple[str, str]] = []
        for step in range(len(self)):
            at = (position + step) % len(self)
            row = int(self.rows[at])
            if step:
                window, crop = self._frame(at, epoch)
            try:
                data = read_file(self.index.path(row), int(self.index.bytes[row]))
                pixels = decode.pixels(data, window, self.framing.size)
            except EngineError as error:
                faults.append((self.index.names[row], str(error)))
                continue
            return Sample(shifted(pixels.transpose(2, 0, 1), crop), at, faults)
        raise EngineError(f"{self.index.folder / faults[0][0]}: {faults[0][1]}; no file is whole")

    def admit(self, faults: list[tuple[str, str]]) -> None:
        """Name each damaged file once; EngineError where damaged files are refused."""
        fresh = [fault for fault in faults if fault[0] not in self._named]
        if faults and self.damaged == "refuse":
            raise EngineError(self._told(faults, "; data.damaged = skip leaves damaged files out"))
        if fresh:
            self._named.update(name for name, _ in fresh)
            log.warning("%s: left out", self._told(fresh, ""))

    def read(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return centre crops uint8 [n, 3, H, W] and labels int64 [n]."""
        with ThreadPoolExecutor(max(1, self.threads)) as pool:
            return self._collected(self._asked(pool, positions))

    def batches(self, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Give all pictures in order: float32 [B, 3, H, W] in [0, 1] and int64 [B], on `device`.

        The next batch is read while the present one is used.
        """
        with ThreadPoolExecutor(max(1, self.threads)) as pool:
            parts = torch.arange(len(self)).split(size)
            ahead = self._asked(pool, parts[0]) if parts else []
            for following in (*parts[1:], None):
                asked, ahead = ahead, []
                if following is not None:
                    ahead = self._asked(pool, following)
                x, y = self._collected(asked)
                yield as_floats(x, device), y.to(device)

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the mean and the deviation of every channel in [0, 1], of 1000 centre crops."""
        scaled = as_floats(self.read(torch.arange(min(_STATISTICS, len(self))))[0])
        return tuple(scaled.mean((0, 2, 3)).tolist()), tuple(scaled.std((0, 2, 3)).tolist())

    def _asked(self, pool: ThreadPoolExecutor, positions: Tensor) -> list[Future[Sample]]:
        windows = self.framing.centre(self.sizes_of(positions))
        pairs = zip(positions.tolist(), windows.tolist(), strict=True)
        return [pool.submit(self.sample, at, window, [0, 0, 0], -1) for at, window in pairs]

    def _collected(self, asked: list[Future[Sample]]) -> tuple[Tensor, Tensor]:
        samples = [future.result() for future in asked]
        self.admit([fault for sample in samples for fault in sample.faults])
        positions = torch.tensor([sample.position for sample in samples])
        return stacked(samples), self.labels_of(positions)

    def _frame(self, position: int, epoch: int) -> tuple[list[int], list[int]]:
        """Return one picture's frame in an epoch, see `sample`."""
        positions = torch.tensor([position])
        size = self.sizes_of(positions)
        if epoch < 0:
            return self.framing.centre(size)[0].tolist(), [0, 0, 0]
        frames = self.framing.draw(epoch, positions, size)
        return frames.windows[0].tolist(), frames.crops[0].tolist()

    def _told(self, faults: list[tuple[str, str]], advice: str) -> str:
        """Return one line that names the first damaged files."""
        shown = "; ".join(f"{self.index.folder / n}: {why}" for n, why in faults[:_NAMED])
        more = len(faults) - _NAMED
        rest = f" (and {more:,} more; `engine data verify` lists them)" if more > 0 else ""
        return shown + rest + advice


def of_index(index: Index, framing: Framing, damaged: Damaged, threads: int, order: bool) -> Photos:
    """Return all whole pictures of an index.

    Args:
        order: put the pictures in `fixed_order`.
    Raises:
        EngineError: for damaged files, where they are refused.
    """
    count = len(index.names)
    rows = fixed_order(count) if order else torch.arange(count)
    photos = Photos(index, rows, framing, damaged, threads)
    photos.admit(index.faults)
    return photos


def stacked(samples: Sequence[Sample]) -> Tensor:
    """Return the pixels of samples, uint8 [n, 3, H, W]."""
    return torch.from_numpy(np.stack([sample.pixels for sample in samples]))


def shifted(image: np.ndarray, crop: Sequence[int]) -> np.ndarray:
    """Return an image [C, H, W] shifted by (dy, dx), zeros outside, then mirrored.

    Without the mirror, out[y, x] = in[y + dy, x + dx].
    """
    dy, dx, mirrored = crop
    if dy or dx:
        shifts = list(zip((dy, dx), image.shape[1:], strict=True))
        into = tuple(slice(max(0, -d), n - max(0, d)) for d, n in shifts)
        source = tuple(slice(max(0, d), n - max(0, -d)) for d, n in shifts)
        out = np.zeros_like(image)
        out[:, into[0], into[1]] = image[:, source[0], source[1]]
        image = out
    if not mirrored:
        return image
    # torch's kernel mirrors bytes faster than NumPy divides rows that lie backwards in memory. It
    # takes arrays that can be written to, and Pillow's cannot.
    return torch.from_numpy(np.require(image, requirements="W")).flip(2).numpy()


def as_floats(x: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Return pixels uint8 [n, 3, H, W] as float32 in [0, 1] on `device`, contiguous."""
    if torch.device(device).type != "cpu":
        return to_device(x, device).contiguous().float().div_(255.0)
    out = np.empty(x.shape, np.float32)
    for pixels, place in zip(x.numpy(), out, strict=True):
        scale_into(place, pixels)
    return torch.from_numpy(out)


def scale_into(out: np.ndarray, pixels: np.ndarray) -> None:
    """Write pixels uint8 as float32 in [0, 1] into `out`, both [3, H, W].

    NumPy takes a picture at a time, so the data stay in the cache: measured, an eighth of the time
    that torch takes for the whole batch on the CPU.
    """
    np.divide(pixels, np.float32(255.0), out=out, dtype=np.float32)
