"""The network under attack: logits, and input gradients that end at the stem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import cast

import torch
from torch import Tensor, nn

from ... import kernels
from ...device.precision import passes
from ...models import Network, stem_of
from .forms import folded, prepared
from .windowed import windowed

TowardsLogits = Callable[[Tensor], Tensor]

# The C library gives blocks above 32 MiB back to the system at once, and the pages of fresh ones
# cost time. The maps of so many images stay below in the small networks: measured on SmallCNN, 0.52
# ms an image and gradient, against 0.72 ms with 512 images.
_AT_ONCE = 250


class Oracle:
    """Answer an attack's questions about a network, and count them.

    Args:
        model: in evaluation mode, [0, 1] images to logits [B, K].
        example: some images [B, C, H, W], to prepare the network with; left out: it stays as it is.
        precision: of `logits` and `gradient`: "fp32" or "bf16".
    Attributes:
        forward_images, gradient_images: images of all forward passes without a gradient, and of all
            passes with one [count].
        windowed: the form of the network for points that differ in a window, or None.
    """

    def __init__(
        self, model: nn.Module, example: Tensor | None = None, precision: str = "fp32"
    ) -> None:
        self.model, self._precision = model, precision
        self._forward = self._climbed = model
        self.windowed = None
        if example is not None:
            self._climbed = folded(model, example)
            self._forward = prepared(self._climbed, example)
            self.windowed = windowed(self._climbed, example)
        self._stem = stem_of(self._climbed)
        self.forward_images = self.gradient_images = 0

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Return the logits [B, K] at images x [B, C, H, W], up to rounding, as fast as can be."""
        self.forward_images += len(x)
        with passes(self._precision, x.device):
            return _joined([self._forward(part).float() for part in _parts(x)])

    @torch.no_grad()
    def exact_logits(self, x: Tensor) -> Tensor:
        """Return the logits [B, K] of the network itself, not of its prepared form."""
        self.forward_images += len(x)
        return _joined([self.model(part) for part in _parts(x)])

    def is_wrong(self, x: Tensor, y: Tensor) -> Tensor:
        """Return where the network itself, not its prepared form, misses the labels: bool [B]."""
        if len(x) == 0:  # which not every network takes
            return torch.zeros(0, dtype=torch.bool, device=x.device)
        return self.exact_logits(x).argmax(1) != y

    def gradient(self, x: Tensor, towards: TowardsLogits) -> tuple[Tensor, Tensor]:
        """Return the logits at x and the input gradient of a loss, up to rounding.

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
        with torch.enable_grad():
            passed = [self._pass(part) for part in _parts(x)]
        logits = _joined([logits.detach() for _, logits in passed])
        seen = logits.float()
        slopes = towards(seen).to(logits.dtype).split([len(logits) for _, logits in passed])
        size = (x.shape[2], x.shape[3])
        grads = [self._back(*one, slope, size) for one, slope in zip(passed, slopes, strict=True)]
        return seen, _joined(grads)

    def _pass(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the tensor at which the backward pass ends, and the logits."""
        with passes(self._precision, x.device):
            if self._stem is None:
                point = x.detach().requires_grad_()
                return point, self._climbed(point)
            network = cast(Network, self._climbed)
            point = network.stem(x).detach().requires_grad_()
            return point, network.body(point)

    def _back(self, point: Tensor, logits: Tensor, slope: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the input gradient for images of `size`, from the gradient at the logits."""
        (grad,) = torch.autograd.grad(logits, point, slope)
        stem = self._stem
        if stem is None:
            return grad.float()
        return kernels.stem_input_grad(
            grad.float(), stem.weight, size=size, stride=stem.stride, padding=stem.padding
        )


class Nearby:
    """Answer for points near known images, which move at times.

    Args:
        x: the known images [B, C, H, W].
    """

    def __init__(self, oracle: Oracle, x: Tensor) -> None:
        self._oracle, self._form = oracle, oracle.windowed
        self._maps = [] if self._form is None else self._form.maps(x)

    def keep(self, rows: Tensor) -> None:
        """Drop all known images but `rows`, bool [B]."""
        self._maps = [maps[rows] for maps in self._maps]

    def move(self, rows: Tensor, x: Tensor) -> None:
        """Replace the known images at `rows`, bool [B], by those of x [B, C, H, W]."""
        if self._form is not None and rows.any():
            for maps, moved in zip(self._maps, self._form.maps(x[rows]), strict=True):
                maps[rows] = moved

    def logits(self, points: Tensor, row: Tensor, corner: Sequence[Tensor], side: int) -> Tensor:
        """Return the logits [N, K] at points that differ from known images in one window each.

        Args:
            points: [N, C, H, W]; row: int64 [N], the known image of each.
            corner, side: of the windows, as in `Windowed.logits`.
        """
        if self._form is None or not self._form.worthwhile(side):
            return self._oracle.logits(points)
        self._oracle.forward_images += len(points)
        return self._form.logits(points, self._maps, row, corner, side)


@dataclass
class Attacked:
    """Hold the images under attack: every field of a subclass is a tensor [B, ...]."""

    def keep(self, rows: Tensor) -> None:
        """Drop all images but `rows`, bool [B]."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name)[rows])


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


def _parts(x: Tensor) -> Sequence[Tensor]:
    """Return the parts of a batch that pass the network one after the other."""
    return [x] if x.device.type != "cpu" else x.split(_AT_ONCE)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
