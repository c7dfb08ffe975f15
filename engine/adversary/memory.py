"""The adversary memory: a sample's attack starts where its last one ended.

Weak adversaries then grow strong over the epochs at no cost in passes (ATTA, arXiv 1912.11969;
FGSM-PGI, arXiv 2207.08859). Stored as int8 steps of eps / 127, one byte a pixel, on the training
device; a crop or mirror of the image moves the perturbation along with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import kernels
from ..device import distributed
from ..threat import ThreatModel


class AdversaryMemory:
    """The last perturbation of every training sample.

    Args:
        samples: N, the size of the training set.
        shape: (C, H, W) of one image.
        threat: the ball; its radius is the unit of storage (a `Step` whose radius grows puts its own here).
        seed: for the first, uniform random, perturbations.
    """

    def __init__(
        self,
        samples: int,
        shape: Sequence[int],
        threat: ThreatModel,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.threat = threat
        self.deltas = torch.empty((samples, *shape), dtype=torch.int8, device=device)
        self.forget(seed)

    def forget(self, seed: int) -> None:
        """Fill with uniform random perturbations."""
        if self.deltas.is_meta:
            return
        device, threat = self.deltas.device, self.threat
        draw = torch.Generator(device=device).manual_seed(seed)
        # Random contents make the first visit a random start, with no flag to test for it.
        if threat.norm == "Linf":
            self.deltas.random_(-127, 128, generator=draw)
        else:
            for chunk in self.deltas.split(4096):
                normal = torch.randn(chunk.shape, generator=draw, device=device).flatten(1)
                radius = torch.rand(len(chunk), 1, generator=draw, device=device)
                radius = radius ** (1.0 / normal.shape[1])
                unit = normal / normal.norm(dim=1, keepdim=True)
                chunk.copy_((127.0 * radius * unit).round().view_as(chunk))

    def recall(self, index: Tensor, x: Tensor, crops: Tensor | None = None) -> Tensor:
        """The attack's start for the samples `index` int64 [B], like `x` float32 [B, C, H, W].

        `crops` int32 [B, 3] is the (dy, dx, mirrored) that augmentation applied; left out: none.
        """
        crops = _uncropped(index) if crops is None else crops
        return kernels.recall(self.deltas, index, crops, x, self.threat.eps, norm=self.threat.norm)

    def remember(
        self, index: Tensor, x: Tensor, adversary: Tensor, crops: Tensor | None = None
    ) -> None:
        """Store `adversary` - `x` for the samples `index`."""
        crops = _uncropped(index) if crops is None else crops
        kernels.remember(self.deltas, index, crops, x, adversary, self.threat.eps)
        if distributed.active():
            # A sample may be another rank's next time: every rank remembers for all, one byte a pixel.
            rows = distributed.gather(self.deltas.index_select(0, index))
            self.deltas.index_copy_(0, distributed.gather(index), rows)


def _uncropped(index: Tensor) -> Tensor:
    return torch.zeros((len(index), 3), dtype=torch.int32, device=index.device)
