"""The adversary memory: a sample's attack starts at the end of its last attack.

So weak adversaries become strong over the epochs without additional passes (ATTA, Zheng et al.,
arXiv 1912.11969; FGSM-EP, Jia et al., arXiv 2207.08859). The memory stores perturbations as int8
steps of eps / 127, one byte a pixel, on the training device. A perturbation follows the crop and
mirror of its image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import kernels
from ..device import distributed
from ..threat import ThreatModel


class AdversaryMemory:
    """Hold the last perturbation of every training sample.

    Args:
        samples: N, the size of the training set.
        shape: (C, H, W) of one image.
        threat: the threat model, whose eps is the unit of storage. A `Step` with a growing eps
            replaces it.
        seed: of the first perturbations, which are uniform in the ball.
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
        """Replace all perturbations by uniform random ones."""
        fill(self.deltas, self.threat.norm, seed)

    def recall(self, index: Tensor, x: Tensor, crops: Tensor | None = None) -> Tensor:
        """Return the attack's start for samples `index` int64 [B], like `x` float32 [B, C, H, W].

        `crops` int32 [B, 3] holds the (dy, dx, mirrored) of augmentation; default: no augmentation.
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
            # Another rank may get the sample in the next epoch: every rank stores all
            # perturbations.
            rows = distributed.gather(self.deltas.index_select(0, index))
            self.deltas.index_copy_(0, distributed.gather(index), rows)


def fill(deltas: Tensor, norm: str, seed: int) -> None:
    """Fill int8 [N, C, H, W] with uniform random points of the ball, in place.

    With random contents a sample's first attack has a random start, without a flag.
    """
    if deltas.is_meta:
        return
    draw = torch.Generator(device=deltas.device).manual_seed(seed)
    if norm == "Linf":
        deltas.random_(-127, 128, generator=draw)
        return
    for chunk in deltas.split(4096):
        normal = torch.randn(chunk.shape, generator=draw, device=deltas.device).flatten(1)
        radius = torch.rand(len(chunk), 1, generator=draw, device=deltas.device)
        radius = radius ** (1.0 / normal.shape[1])
        unit = normal / normal.norm(dim=1, keepdim=True)
        chunk.copy_((127.0 * radius * unit).round().view_as(chunk))


def _uncropped(index: Tensor) -> Tensor:
    return torch.zeros((len(index), 3), dtype=torch.int32, device=index.device)
