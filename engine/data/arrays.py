"""Bring arrays and tensors from the host to a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import EngineError


def pair(data: Any, device: torch.device) -> tuple[Tensor, Tensor] | None:
    """Return (images, labels) as tensors; None where `data` is no pair of arrays or tensors.

    An array becomes a tensor on `device`: floats as float32, uint8 as uint8, other integers as
    int64. A tensor is returned unchanged, but labels of another integer type become int64.
    """
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        return None
    if not all(isinstance(part, (Tensor, np.ndarray)) for part in data):
        return None
    images, labels = (_tensor(part, device) for part in data)
    whole = not labels.is_floating_point() and labels.dtype != torch.bool
    return images, labels.long() if whole or isinstance(data[1], np.ndarray) else labels


def to_device(t: Tensor, device: torch.device | str) -> Tensor:
    """Return `t` on `device`. The host does not wait for a copy to a GPU.

    The host waits for every copy from memory that is not pinned, so `t` is pinned first.
    """
    if torch.device(device).type == "cuda" and t.device.type == "cpu":
        t = t.pin_memory()
    return t.to(device, non_blocking=True)


def _tensor(array: Tensor | np.ndarray, device: torch.device) -> Tensor:
    if isinstance(array, Tensor):
        return array
    if array.dtype.kind not in "iuf":
        raise EngineError(f"an array of {array.dtype}: images are uint8 or floats, labels integers")
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
    elif array.dtype != np.uint8:
        array = array.astype(np.int64)
    return torch.from_numpy(np.ascontiguousarray(array)).to(device)
