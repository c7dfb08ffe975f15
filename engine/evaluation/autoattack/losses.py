"""The losses that APGD climbs: their values, and their gradients with respect to the logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ... import kernels


@dataclass(frozen=True)
class CrossEntropy:
    """Hold the cross-entropy at labels y int64 [B]."""

    y: Tensor

    def value(self, logits: Tensor) -> Tensor:
        """Return the loss, [B]."""
        return F.cross_entropy(logits, self.y, reduction="none")

    def gradient(self, logits: Tensor) -> Tensor:
        """Return the gradient of the summed loss, [B, K]."""
        return kernels.cross_entropy_grad(logits, self.y)

    def take(self, rows: Tensor) -> CrossEntropy:
        """Return the loss of some samples: `rows` is bool [B] or int64."""
        return CrossEntropy(self.y[rows])


@dataclass(frozen=True)
class TargetedDLR:
    """Hold the targeted difference-of-logits ratio (Croce & Hein, arXiv 2003.01690, equation 6).

    -(z_y - z_t) / (z_1 - (z_3 + z_4) / 2), where z_1 >= z_2 >= ... are the sorted logits. It needs
    four classes.

    Attributes:
        y, target: labels and target classes, int64 [B].
    """

    y: Tensor
    target: Tensor

    def value(self, logits: Tensor) -> Tensor:
        """Return the loss, [B]."""
        above, below, _ = self._ratio(logits)
        return above / below

    def gradient(self, logits: Tensor) -> Tensor:
        """Return the gradient of the summed loss, [B, K]."""
        above, below, ranks = self._ratio(logits)
        inverse = below.reciprocal()
        slope = -above * inverse * inverse
        gradient = torch.zeros_like(logits)
        gradient.scatter_add_(1, ranks[:, 0:1], slope[:, None])
        gradient.scatter_add_(1, ranks[:, 2:4], (-0.5 * slope)[:, None].expand(-1, 2))
        gradient.scatter_add_(1, self.target[:, None], inverse[:, None])
        return gradient.scatter_add_(1, self.y[:, None], -inverse[:, None])

    def take(self, rows: Tensor) -> TargetedDLR:
        """Return the loss of some samples: `rows` is bool [B] or int64."""
        return TargetedDLR(self.y[rows], self.target[rows])

    def _ratio(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        top, ranks = logits.topk(4, dim=1)
        label, target = logits.gather(1, torch.stack([self.y, self.target], 1)).unbind(1)
        # The 1e-12 is theirs: it guards the division where all logits are equal.
        return target - label, top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12, ranks


@dataclass(frozen=True)
class LogitDifference:
    """Hold max_{k != y} z_k - z_y, for networks of two or three classes, where DLR is undefined."""

    y: Tensor

    def value(self, logits: Tensor) -> Tensor:
        """Return the loss, [B]."""
        label, other = self._ends(logits)
        return logits.gather(1, other).squeeze(1) - logits.gather(1, label).squeeze(1)

    def gradient(self, logits: Tensor) -> Tensor:
        """Return the gradient of the summed loss, [B, K]."""
        label, other = self._ends(logits)
        return torch.zeros_like(logits).scatter_(1, other, 1.0).scatter_(1, label, -1.0)

    def take(self, rows: Tensor) -> LogitDifference:
        """Return the loss of some samples: `rows` is bool [B] or int64."""
        return LogitDifference(self.y[rows])

    def _ends(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        label = self.y[:, None]
        return label, logits.scatter(1, label, float("-inf")).argmax(1, keepdim=True)


Loss = CrossEntropy | TargetedDLR | LogitDifference
