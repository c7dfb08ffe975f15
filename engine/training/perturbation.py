"""Adversarial weight perturbation: the gradient of training at the worst weights nearby.

Wu, Xia & Wang, "Adversarial Weight Perturbation Helps Robust Generalization" (NeurIPS 2020, arXiv
2004.05884).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from .. import kernels
from ..threat import Number


@dataclass(frozen=True)
class Weights:
    """Say how far, and from when on, the weights are perturbed."""

    perturb: Annotated[
        Number,
        Field(
            ge=0,
            lt=1,
            description="adversarial weight perturbation: gamma, the step of each layer's weights "
            "[share of their L2 norm]; 0: none",
        ),
    ] = 0.0
    from_epoch: Annotated[
        int, Field(ge=1, description="first epoch with perturbed weights, from 1 [count]")
    ] = 1


class Perturbation:
    """Move a model's weights up the loss, layer by layer, and undo this bit for bit.

    Only tensors of two or more dimensions move, as in the paper's code: biases and BatchNorm stay.

    Args:
        gamma: the step's L2 norm as a share of each tensor's.
        first: the number of the first step with a perturbation, from 0.
    """

    def __init__(self, model: nn.Module, gamma: float, first: int = 0) -> None:
        self.gamma, self.first = gamma, first
        self._model = model
        self._weights = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
        self._moved: list[tuple[Tensor, Tensor]] = []

    def keep_statistics(self) -> Callable[[], None]:
        """Return a function that sets the model's buffers to what they are now.

        The paper takes the perturbation on a copy of the network. So BatchNorm's statistics learn
        from the training pass alone.
        """
        buffers = list(self._model.buffers())
        before = [t.clone() for t in buffers]

        @torch.no_grad()
        def restore() -> None:
            for t, old in zip(buffers, before, strict=True):
                t.copy_(old)

        return restore

    @torch.no_grad()
    def ascend(self) -> None:
        """Move the weights along their gradients; a weight without a gradient stays."""
        moved: list[Tensor] = [p for p in self._weights if p.grad is not None]
        grads: list[Tensor] = [p.grad for p in moved]  # type: ignore[misc]
        copies = [torch.empty_like(p) for p in moved]
        self._moved = list(zip(moved, copies, strict=True))
        if moved:
            kernels.perturb_weights(moved, grads, copies, gamma=self.gamma)

    @torch.no_grad()
    def undo(self) -> None:
        """Set the weights to what they were before `ascend`."""
        if self._moved:
            kernels.restore_weights(*map(list, zip(*self._moved, strict=True)))  # type: ignore[arg-type]
        self._moved = []
