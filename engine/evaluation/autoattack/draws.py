"""Random numbers from a CPU generator, whatever PyTorch's default device and type are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def uniform(shape: Sequence[int], draw: torch.Generator) -> Tensor:
    """Draw float32 numbers from [0, 1) on the CPU."""
    return torch.rand(shape, generator=draw, dtype=torch.float32, device="cpu")


def normal(shape: Sequence[int], draw: torch.Generator) -> Tensor:
    """Draw float32 numbers from the standard normal distribution on the CPU."""
    return torch.randn(shape, generator=draw, dtype=torch.float32, device="cpu")
