"""Random state as one device tensor (seed, step); `kernels.reference` has the draws from it."""

from __future__ import annotations

import torch
from torch import Tensor

# One stream for each place that draws within a step.
START, LOCAL, AUGMENT, RESTART = 0, 1, 2, 3
# The first of as many streams as a network has dropout layers.
DROPOUT = 64


def state(seed: int, device: torch.device | str = "cpu", step: int = 0) -> Tensor:
    """int64 [2] (seed, step) on `device`; advance with `rng[1] += 1` once a step."""
    return torch.tensor([seed, step], dtype=torch.int64, device=device)


def of_rank(seed: int, rank: int) -> int:
    """The seed that process `rank` draws with; rank 0's is the run's own."""
    return (seed + rank * 0x9E3779B97F4A7C15) & ((1 << 63) - 1)
