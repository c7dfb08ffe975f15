"""The data ops on the CPU, in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .binding import native, served


def augment(
    images: Tensor,
    index: Tensor,
    rng: Tensor,
    pad: int,
    flip: bool,
    cutout: int,
    stream: int,
    memory: Tensor | None,
    eps: Tensor | None,
    norm: str,
    cutmix: bool,
    erase: int,
    jitter: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b = index.shape[0]
    x = images.new_empty((b, *images.shape[1:]), dtype=torch.float32)
    crops = images.new_empty((b, 3), dtype=torch.int32)
    start = x.new_empty(0) if memory is None else torch.empty_like(x)
    share = x.new_empty(b if cutmix else 0)
    seed, step = rng.tolist()
    native.augment(
        images.data_ptr(),
        index.data_ptr(),
        *images.shape,
        x.data_ptr(),
        crops.data_ptr(),
        b,
        seed,
        step,
        stream,
        pad,
        flip,
        cutout,
        0 if memory is None else memory.data_ptr(),
        start.data_ptr(),
        0.0 if eps is None else eps.item(),
        norm == "L2",
        share.data_ptr() if cutmix else 0,
        erase,
        jitter,
    )
    return x, crops, start, share


def recall(
    memory: Tensor, index: Tensor, crops: Tensor, x: Tensor, eps: Tensor, norm: str
) -> Tensor:
    if not served(x):
        return reference.recall(memory, index, crops, x, eps, norm)
    out = torch.empty_like(x)
    native.recall(
        memory.data_ptr(),
        index.data_ptr(),
        crops.data_ptr(),
        *memory.shape,
        x.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        not x.is_contiguous(),
        eps.item(),
        norm == "L2",
    )
    return out


def remember(
    memory: Tensor, index: Tensor, crops: Tensor, x: Tensor, z: Tensor, eps: Tensor
) -> None:
    if not served(x, z) or z.dtype is not x.dtype:
        return reference.remember(memory, index, crops, x, z, eps)
    native.remember(
        memory.data_ptr(),
        index.data_ptr(),
        crops.data_ptr(),
        *memory.shape,
        x.data_ptr(),
        z.data_ptr(),
        x.shape[0],
        not x.is_contiguous(),
        eps.item(),
    )
    return None
