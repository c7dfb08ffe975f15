"""The random state, one device tensor (seed, step); `kernels.reference` defines the draws."""

from __future__ import annotations

import torch
from torch import Tensor

# One stream for each draw within a step.
START, LOCAL, AUGMENT, RESTART, MASK, COINS, FRAME, EXTRA = 0, 1, 2, 3, 4, 5, 6, 7
# The first stream of dropout; each dropout layer of a network takes the next one.
DROPOUT = 64


def state(seed: int, device: torch.device | str = "cpu", step: int = 0) -> Tensor:
    """Return int64 [2] (seed, step) on `device`; advance it with `rng[1] += 1` once a step."""
    return torch.tensor([seed, step], dtype=torch.int64, device=device)


def of_rank(seed: int, rank: int) -> int:
    """Return the seed of process `rank`; rank 0 has the run's seed."""
    return (seed + rank * 0x9E3779B97F4A7C15) & ((1 << 63) - 1)
