"""Shared by all tests: small thread counts, quiet progress, tiny networks."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from engine.models import Network

if not torch.cuda.is_available():
    # Triton reads this when it is imported, and PyTorch's FLOP counter imports Triton: so it is set
    # before any test. Without a GPU the kernels run in the interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Two test processes on two cores must not spin for each other's threads.
torch.set_num_threads(1)


class Tiny(Network):
    """A stem, a hidden layer, logits: for [B, 1, 6, 6] images and 4 classes."""

    def __init__(self, classes: int = 4, batch_norm: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 5, 3, stride=1, padding=1)
        self.bn = nn.BatchNorm2d(5) if batch_norm else nn.Identity()
        self.fc = nn.Linear(5 * 36, classes)

    def body(self, h):
        return self.fc(torch.tanh(self.bn(h)).flatten(1))


class Foreign(nn.Module):
    """A module that is not ours: no stem to see."""

    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(36, 12), nn.Tanh(), nn.Linear(12, classes))

    def forward(self, x):
        return self.net(x)


@pytest.fixture(params=["stem", "foreign"])
def model(request):
    torch.manual_seed(0)
    return Tiny() if request.param == "stem" else Foreign()


@pytest.fixture
def batch():
    draw = torch.Generator().manual_seed(1)
    x = torch.rand(16, 1, 6, 6, generator=draw)
    return x, torch.randint(0, 4, (16,), generator=draw)


def blobs(n: int = 256, seed: int = 0, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """An easy problem of at most 4 classes: uint8 [n, 1, 6, 6], one bright quadrant each."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (n,), generator=draw)
    images = torch.randint(0, 60, (n, 1, 6, 6), generator=draw)
    for quadrant in range(4):
        y, x = 3 * (quadrant // 2), 3 * (quadrant % 2)
        images[labels == quadrant, :, y : y + 3, x : x + 3] += 160
    return images.to(torch.uint8), labels
