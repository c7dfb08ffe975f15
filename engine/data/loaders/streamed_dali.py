"""Pictures in folders by NVIDIA DALI: it reads the files and decodes the window of each frame.

On a GPU, nvJPEG decodes and DALI scales there. On the CPU, DALI decodes in its own threads, and
torch scales: its kernel for uint8 takes a third of the time of DALI's and gives Pillow's pixels.
A picture that DALI does not decode to Pillow's pixels (CMYK, a palette, alpha, 16 bits), or not at
all, goes to Pillow.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import EngineError
from ...kernels import reference
from ..photos import Photos, Sample, shifted
from .base import Batch
from .dali import unavailable
from .streamed import PhotoLoader

# DALI reads this picture of one pixel where Pillow decodes the real one.
_STAND_IN = b"P6 1 1 255 \0\0\0"


@dataclass
class _Asked:
    """Hold a batch on its way through DALI.

    Attributes:
        by_hand: the rows that Pillow decodes.
    """

    epoch: int
    positions: Tensor
    crops: Tensor
    by_hand: dict[int, Future[Sample]]


class DaliPhotoLoader(PhotoLoader):
    """Give batches through a DALI pipeline that reads two batches ahead.

    Args:
        workers: DALI's threads, and as many that scale.
    Raises:
        EngineError: where DALI is missing; if the set is smaller than a batch.
    """

    def __init__(self, photos: Photos, batch_size: int, **options: Any) -> None:
        if missing := unavailable():
            raise EngineError(missing)
        super().__init__(photos, batch_size, **options)
        self.workers = max(1, self.workers)
        self._on_gpu = self.device.type == "cuda"
        # Positions that DALI has failed on.
        self._refused: set[int] = set()
        self._pipeline: Any = None
        # The step at which the pipeline was built, and the next step to hand over.
        self._base = self._next = 0
        self._asked: deque[_Asked] = deque()
        self._opened = contextlib.ExitStack()

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        step = epoch * len(self) + first
        if self._pipeline is None or step != self._next:
            # The batches that were read ahead belong to other steps.
            self._start(step)
        for _ in range(first, len(self)):
            batch = self._run()
            self._next += 1
            yield batch

    def close(self) -> None:
        self._pipeline = None
        self._asked.clear()
        self._opened.close()

    def _start(self, step: int) -> None:
        self.close()
        self._base = self._next = step
        self._opened = contextlib.ExitStack()
        self._pool = self._opened.enter_context(ThreadPoolExecutor(self.workers))
        stand_in = Path(self._opened.enter_context(tempfile.TemporaryDirectory()), "one.ppm")
        stand_in.write_bytes(_STAND_IN)
        self._stand_in = _path(stand_in)
        self._pipeline = self._build()

    def _run(self) -> Batch:
        try:
            images = self._decoded()
        except RuntimeError:
            # DALI does not tell which picture it was: Pillow decodes this batch, and names a
            # damaged file.
            step = self._next
            self._refused.update(self.positions(*divmod(step, len(self))).tolist())
            self._start(step)
            images = self._decoded()
        asked = self._asked.popleft()
        samples = {row: future.result() for row, future in asked.by_hand.items()}
        pixels = self._scaled(images, asked, samples)
        positions = asked.positions.clone()
        for row, sample in samples.items():
            positions[row] = sample.position
        faults = [fault for sample in samples.values() for fault in sample.faults]
        return self.batch(asked.epoch, pixels, positions, faults)

    def _decoded(self) -> Any:
        # Outputs made on the stream that reads them need no wait for the device.
        stream = torch.cuda.current_stream(self.device) if self._on_gpu else None
        return self._pipeline.run(stream)[0]

    def _scaled(self, images: Any, asked: _Asked, samples: dict[int, Sample]) -> Tensor:
        """Return uint8 [B, 3, H, W], shifted, channels last in memory."""
        if self._on_gpu:
            pixels = torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2).clone()
            if self.framing.pad:
                shifts = asked.crops.to(self.device)
                # DALI has mirrored already.
                shifts = torch.stack([shifts[:, 0], shifts[:, 1] * (1 - 2 * shifts[:, 2])], 1)
                shifts = torch.cat([shifts, torch.zeros_like(shifts[:, :1])], 1)
                rows = torch.arange(len(pixels), device=self.device)
                pixels = reference.crop(pixels, rows, shifts)
            for row, sample in samples.items():
                pixels[row] = torch.from_numpy(sample.pixels).permute(2, 0, 1).to(self.device)
            return pixels
        height, width = self.framing.size
        out = np.empty((len(asked.positions), height, width, 3), np.uint8)
        crops = asked.crops.tolist()

        def scale(row: int) -> None:
            if row in samples:
                out[row] = samples[row].pixels
                return
            image = torch.from_dlpack(images[row]).permute(2, 0, 1)[None]
            scaled = F.interpolate(image, (height, width), mode="bilinear", antialias=True)
            out[row] = shifted(scaled[0].permute(1, 2, 0).numpy(), crops[row])

        list(self._pool.map(scale, range(len(out))))
        return torch.from_numpy(out).permute(0, 3, 1, 2)

    def _source(self, info: Any) -> list[Any]:
        """Return DALI's arguments for one batch: paths, corners and sizes of windows, mirrors."""
        epoch, step = divmod(self._base + info.iteration, len(self))
        positions, photos = self.positions(epoch, step), self.photos
        frames = self.framing.draw(epoch, positions, photos.sizes_of(positions))
        windows, crops = frames.windows.numpy().copy(), frames.crops
        paths, by_hand = [], {}
        rows = photos.rows[positions].tolist()
        for row, (position, place) in enumerate(zip(positions.tolist(), rows, strict=True)):
            path = photos.index.path(place)
            if self._fits_dali(position, place):
                paths.append(_path(path))
                continue
            frame = windows[row].tolist(), crops[row].tolist()
            by_hand[row] = self._pool.submit(photos.sample, position, *frame, epoch)
            paths.append(self._stand_in)
            windows[row] = 0, 0, 1, 1
        self._asked.append(_Asked(epoch, positions, crops, by_hand))
        mirrors = np.ascontiguousarray(crops[:, 2].numpy())
        return [paths, *(np.ascontiguousarray(windows[:, k : k + 2]) for k in (0, 2)), mirrors]

    def _fits_dali(self, position: int, row: int) -> bool:
        index = self.photos.index
        if position in self._refused or not index.plain[row]:
            return False
        try:
            return os.stat(index.path(row)).st_size == int(index.bytes[row])
        except OSError:
            return False

    def _build(self) -> Any:
        # Any: DALI makes its enumerations at run time.
        dali: Any = importlib.import_module("nvidia.dali")
        fn, types = importlib.import_module("nvidia.dali.fn"), dali.types

        @dali.pipeline_def(
            batch_size=self.sampling.batch_size,
            num_threads=self.workers,
            device_id=(self.device.index or 0) if self._on_gpu else None,
            prefetch_queue_depth=2,
        )
        def pipeline() -> Any:
            paths, corners, sides, mirrors = fn.external_source(
                source=self._source,
                num_outputs=4,
                batch=True,
                batch_info=True,
                dtype=[types.UINT8, *[types.INT32] * 3],
                ndim=[1, 1, 1, 0],
            )
            images = fn.decoders.image_slice(
                fn.io.file.read(paths),
                corners,
                sides,
                axis_names="HW",
                device="mixed" if self._on_gpu else "cpu",
                output_type=types.RGB,
                # The chroma of nvJPEG then comes as close to the CPU's as it can.
                jpeg_fancy_upsampling=True,
            )
            images = fn.flip(images, horizontal=mirrors, vertical=0)
            if self._on_gpu:
                images = fn.resize(
                    images,
                    size=list(self.framing.size),
                    interp_type=types.INTERP_LINEAR,
                    antialias=True,
                )
            return images

        built = pipeline()
        built.build()
        return built


def _path(path: Any) -> np.ndarray:
    return np.frombuffer(os.fsencode(path), np.uint8)
