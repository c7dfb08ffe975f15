"""The labels of a batch: one for each sample, or two where images are mixed.

Every objective takes both kinds through these functions and through the loss ops of
`engine.kernels`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import Labels


def main_label(y: Labels) -> Tensor:
    """Return the label that counts as the right answer, int64 [B]."""
    return y if isinstance(y, Tensor) else y.first


def correct(logits: Tensor, y: Labels) -> Tensor:
    """Return the number of rows of logits [B, K] whose largest entry is at the main label, 0-d."""
    return (logits.detach().argmax(1) == main_label(y)).sum()


def probabilities(y: Labels, logits: Tensor) -> Tensor:
    """Return the labels as probabilities, like `logits` [B, K]."""
    found = torch.zeros_like(logits)
    if isinstance(y, Tensor):
        return found.scatter_(1, y[:, None], 1.0)
    share = y.share.to(logits.dtype)[:, None]
    return found.scatter_add_(1, y.first[:, None], share).scatter_add_(
        1, y.second[:, None], 1.0 - share
    )


def cross_entropy(logits: Tensor, y: Labels, label_smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy of each row of logits [B, K], [B], differentiable any times."""

    def to(labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)

    if isinstance(y, Tensor):
        return to(y)
    return y.share * to(y.first) + (1.0 - y.share) * to(y.second)
