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
import sys
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
from ..photos import Photos, Sample, scale_into, shifted
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


class _Recycled:
    """Give float32 arrays again as soon as nobody else holds them.

    The C library returns large freed blocks to the system. The pages of a fresh block then cost as
    much time as scaling the pictures into it.
    """

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = []

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """Return an array of `shape` with any contents."""
        for array in self._arrays:
            # The list, this name and the argument of the call; a tensor on the array is one more.
            if array.shape == shape and sys.getrefcount(array) <= 3:
                return array
        self._arrays.append(np.empty(shape, np.float32))
        return self._arrays[-1]


class DaliPhotoLoader(PhotoLoader):
    """Give batches through a DALI pipeline that reads three batches ahead.

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
        self._outputs = _Recycled()

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
        scaled = self._scaled_on_gpu if self._on_gpu else self._scaled
        pixels = scaled(images, asked, samples)
        positions = asked.positions.clone()
        for row, sample in samples.items():
            positions[row] = sample.position
        faults = [fault for sample in samples.values() for fault in sample.faults]
        return self.batch(asked.epoch, pixels, positions, asked.crops, faults)

    def _decoded(self) -> Any:
        # Outputs made on the stream that reads them need no wait for the device.
        stream = torch.cuda.current_stream(self.device) if self._on_gpu else None
        return self._pipeline.run(stream)[0]

    def _scaled_on_gpu(self, images: Any, asked: _Asked, samples: dict[int, Sample]) -> Tensor:
        """Return uint8 [B, 3, H, W], shifted and mirrored, on the GPU."""
        pixels = torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2)
        rows = torch.arange(len(pixels), device=self.device)
        pixels = reference.crop(pixels, rows, asked.crops.to(self.device))
        for row, sample in samples.items():
            pixels[row] = torch.from_numpy(np.ascontiguousarray(sample.pixels)).to(self.device)
        return pixels

    def _scaled(self, images: Any, asked: _Asked, samples: dict[int, Sample]) -> Tensor:
        """Return float32 [B, 3, H, W] in [0, 1], shifted and mirrored."""
        out = self._outputs.take((len(asked.positions), 3, *self.framing.size))
        crops = asked.crops.tolist()

        def scale(rows: range) -> None:
            for row in rows:
                if row in samples:
                    scale_into(out[row], samples[row].pixels)
                    continue
                image = torch.from_dlpack(images[row]).permute(2, 0, 1)[None]
                scaled = F.interpolate(image, self.framing.size, mode="bilinear", antialias=True)
                scale_into(out[row], shifted(scaled[0].numpy(), crops[row]))

        # Each thread takes its share of the rows at once: a task a row costs more than it balances.
        list(self._pool.map(scale, [range(k, len(out), self.workers) for k in range(self.workers)]))
        return torch.from_numpy(out)

    def _source(self, info: Any) -> list[Any]:
        """Return DALI's arguments for one batch: paths, and the corners and sides of windows."""
        epoch, step = divmod(self._base + info.iteration, len(self))
        positions, photos = self.positions(epoch, step), self.photos
        frames = self.frames(epoch, positions)
        windows, crops = frames.windows.numpy().copy(), frames.crops
        folder = os.fspath(photos.index.folder)
        paths, by_hand = [], {}
        rows = photos.rows[positions].tolist()
        for row, (position, place) in enumerate(zip(positions.tolist(), rows, strict=True)):
            path = f"{folder}/{photos.index.names[place]}"
            if self._fits_dali(position, place, path):
                paths.append(_path(path))
                continue
            frame = windows[row].tolist(), crops[row].tolist()
            by_hand[row] = self._pool.submit(photos.sample, position, *frame, epoch)
            paths.append(self._stand_in)
            windows[row] = 0, 0, 1, 1
        self._asked.append(_Asked(epoch, positions, crops, by_hand))
        return [paths, *(np.ascontiguousarray(windows[:, k : k + 2]) for k in (0, 2))]

    def _fits_dali(self, position: int, row: int, path: str) -> bool:
        index = self.photos.index
        if position in self._refused or not index.plain[row]:
            return False
        try:
            return os.stat(path).st_size == int(index.bytes[row])
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
            # Pictures differ in size, so batches differ in time: a third keeps the threads busy.
            prefetch_queue_depth=3,
        )
        def pipeline() -> Any:
            paths, corners, sides = fn.external_source(
                source=self._source,
                num_outputs=3,
                batch=True,
                batch_info=True,
                dtype=[types.UINT8, types.INT32, types.INT32],
                ndim=[1, 1, 1],
            )
            images = fn.decoders.image_slice(
                # Plain reads: mapping these small files into memory costs more than copying them.
                fn.io.file.read(paths, dont_use_mmap=True),
                corners,
                sides,
                axis_names="HW",
                device="mixed" if self._on_gpu else "cpu",
                output_type=types.RGB,
                # The chroma of nvJPEG then comes as close to the CPU's as it can.
                jpeg_fancy_upsampling=True,
            )
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
