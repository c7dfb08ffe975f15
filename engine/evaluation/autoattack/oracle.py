"""The network under attack: logits, and input gradients that end at the stem."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from ... import kernels
from ...models import Network, stem_of

TowardsLogits = Callable[[Tensor], Tensor]


class Oracle:
    """Answer an attack's questions about a network, and count them.

    Args:
        model: in evaluation mode, [0, 1] images to logits [B, K].
    Attributes:
        forward_images, gradient_images: images of all forward passes without a gradient, and of all
            passes with one [count].
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self._stem = model, stem_of(model)
        self.forward_images = self.gradient_images = 0

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Return the logits [B, K] at images x [B, C, H, W]."""
        self.forward_images += len(x)
        return self.model(x)

    def gradient(self, x: Tensor, towards: TowardsLogits) -> tuple[Tensor, Tensor]:
        """Return the logits at x and the input gradient of a loss.

        The backward pass starts at the loss's gradient with respect to the logits, so no loss is
        formed. In a network that exposes its stem, the pass ends at the stem's output, and
        `kernels.stem_input_grad` does the rest.

        Args:
            x: float32 [B, C, H, W].
            towards: from logits [B, K] to the loss's gradient there, [B, K].
        Returns:
            Logits [B, K] and the gradient, like `x`; both detached.
        """
        self.gradient_images += len(x)
        stem = self._stem
        with torch.enable_grad():
            if stem is None:
                point = x.detach().requires_grad_()
                logits = self.model(point)
            else:
                network = cast(Network, self.model)
                point = network.stem(x).detach().requires_grad_()
                logits = network.body(point)
            seen = logits.detach()
            (grad,) = torch.autograd.grad(logits, point, towards(seen))
        if stem is not None:
            h, w = x.shape[2:]
            grad = kernels.stem_input_grad(
                grad, stem.weight, size=(h, w), stride=stem.stride, padding=stem.padding
            )
        return seen, grad


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """Return the logit of the label minus the largest other logit, [B]; <= 0 where it is wrong."""
    label = y[:, None]
    others = logits.scatter(1, label, float("-inf"))
    return logits.gather(1, label).squeeze(1) - others.amax(1)


def lengths(delta: Tensor, norm: str) -> Tensor:
    """Return each sample's Linf or L2 norm, [B], of perturbations [B, ...]."""
    flat = delta.flatten(1)
    return flat.abs().amax(1) if norm == "Linf" else flat.norm(dim=1)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """Return values [B] in a shape that broadcasts over `like` [B, ...]."""
    return values.view(-1, *[1] * (like.dim() - 1))
