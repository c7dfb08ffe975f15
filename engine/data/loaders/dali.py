"""NVIDIA DALI: one pipeline for the CPU and the GPU; its batches are a pure function of the step.

The host gathers the images and draws crops, mirrors and holes (`Sampling`). DALI crops, mirrors,
scales and cuts out in its own threads, two batches ahead. So the batches equal those of every other
loader, and one number says where to resume. DALI stays outside CUDA graphs: its batches are copied
into the tensors that a captured step reads.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import EngineError
from .base import Batch, Loader, Sampling, blank, check_images


def unavailable() -> str | None:
    """Return why DALI cannot be used here, in a sentence, or None."""
    try:
        import nvidia.dali.fn  # noqa: F401
    except ImportError as error:
        return (
            f"NVIDIA DALI is not installed ({error}): pip install nvidia-dali-cuda130, or -cuda120 "
            "(Linux only)"
        )
    return None


class DaliLoader(Loader):
    """Give batches through a DALI pipeline.

    Args:
        images: uint8 [N, C, H, W]; labels: int64 [N]; both on the host.
        workers: DALI's own threads.
        sampling: options as `Sampling` has them.
    Raises:
        EngineError: where DALI is missing; for a set smaller than a batch, or of another type.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        device: torch.device | str = "cpu",
        workers: int = 1,
        **sampling: Any,
    ) -> None:
        if missing := unavailable():
            raise EngineError(missing)
        check_images(images, labels)
        shape = tuple(images.shape[1:])
        self.sampling = Sampling(len(images), shape, batch_size, **sampling)  # type: ignore[arg-type]
        self.device, self.workers = torch.device(device), max(1, workers)
        pad = self.sampling.pad
        # Padded and channels last once, so that a batch is one gather and one operator.
        self._images = np.pad(
            images.permute(0, 2, 3, 1).numpy(), ((0, 0), (pad, pad), (pad, pad), (0, 0))
        )
        self._labels = labels.numpy()
        self._pipeline: Any = None
        # The step at which the pipeline was built, and the next step to hand over.
        self._base = self._next = 0
        self._order: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.sampling)

    def example(self) -> Batch:
        return blank(self.sampling, self.device)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        step = epoch * len(self) + first
        if self._pipeline is None or step != self._next:
            # The batches that were read ahead belong to other steps.
            self.close()
            self._base = self._next = step
            self._pipeline = self._build()
        for _ in range(first, len(self)):
            batch = self._run()
            self._next += 1
            yield batch

    def close(self) -> None:
        self._pipeline = None

    def _run(self) -> Batch:
        # Outputs made on the stream that reads them need no wait for the device.
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        outputs = self._pipeline.run(stream)
        x, y, samples, crops = (torch.from_dlpack(out.as_tensor()) for out in outputs)
        return Batch(x, y.view(-1), samples.view(-1), crops)

    def _source(self, info: Any) -> list[np.ndarray]:
        """Return one batch of arguments for DALI; they hold all its random choices."""
        options = self.sampling
        step = self._base + info.iteration
        epoch, position = divmod(step, len(self))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, options.order(epoch)
        index = self._order[1][position // options.replays].numpy()
        drawn = options.crops(step).numpy()
        sides = max(1, 2 * options.pad)
        corner = ((drawn[:, :2] + options.pad) / sides).astype(np.float32)
        arrays = [
            self._images[index],
            np.ascontiguousarray(corner[:, 0]),
            np.ascontiguousarray(corner[:, 1]),
            np.ascontiguousarray(drawn[:, 2]),
            self._labels[index],
            index,
            np.ascontiguousarray(drawn[:, :3]),
        ]
        if options.cutout:
            arrays.append((drawn[:, 3:] - options.cutout // 2).astype(np.float32))
        return arrays

    def _build(self) -> Any:
        # Any: DALI makes its enumerations at run time, and its stubs have no pipeline without a
        # GPU.
        dali: Any = importlib.import_module("nvidia.dali")
        fn, types = importlib.import_module("nvidia.dali.fn"), dali.types

        options = self.sampling
        channels, height, width = options.shape
        kinds = [types.UINT8, types.FLOAT, types.FLOAT, types.INT32, types.INT64, types.INT64]
        kinds.append(types.INT32)
        ndim, layout = [3, 0, 0, 0, 0, 0, 1], ["HWC", *[""] * 6]
        if options.cutout:
            kinds, ndim, layout = [*kinds, types.FLOAT], [*ndim, 1], [*layout, ""]
        on_gpu = self.device.type == "cuda"

        @dali.pipeline_def(
            batch_size=options.batch_size,
            num_threads=self.workers,
            device_id=(self.device.index or 0) if on_gpu else None,
            seed=options.seed,
            prefetch_queue_depth=2,
        )
        def pipeline() -> Any:
            images, down, across, mirrored, *rest = fn.external_source(
                source=self._source,
                num_outputs=len(kinds),
                batch=True,
                batch_info=True,
                dtype=kinds,
                ndim=ndim,
                layout=layout,
            )
            if on_gpu:
                images = images.gpu()
            x = fn.crop_mirror_normalize(
                images,
                crop=(height, width),
                crop_pos_y=down,
                crop_pos_x=across,
                mirror=mirrored,
                mean=[0.0] * channels,
                std=[255.0] * channels,
                dtype=types.FLOAT,
                output_layout="CHW",
            )
            if options.cutout:
                x = fn.erase(
                    x,
                    anchor=rest.pop(),
                    shape=[float(options.cutout)] * 2,
                    axis_names="HW",
                    fill_value=0.0,
                )
            return (x, *(out.gpu() if on_gpu else out for out in rest))

        built = pipeline()
        built.build()
        return built
