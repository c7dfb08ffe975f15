"""Projected gradient steps that compute input gradients and no weight gradients."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from .. import kernels, rng
from ..device.phases import (
    ATTACK_BACKWARD,
    ATTACK_FORWARD,
    ATTACK_START,
    ATTACK_STEP,
    TRAIN_FORWARD,
    phase,
)
from ..kernels import Labels
from ..labels import probabilities
from ..models import Network, Stem, stem_of
from ..threat import Ball
from .held import once

BatchNorm = nn.modules.batchnorm._BatchNorm
LogitsGrad = Callable[[Tensor], Tensor]
# Take an ascent step in a ball with a step size [pixel units], from a point whose gradient is
# known.
AscentStep = Callable[[Ball, float | Tensor], Tensor]
# Scale gradients by 128 so that small ones survive float16.
_SCALE = {torch.float16: 128.0}


def towards_errors(y: Labels, label_smoothing: float = 0.0) -> LogitsGrad:
    """Return the cross-entropy's gradient at labels `y` [B], a function of logits [B, K].

    The gradient's scale is arbitrary: an ascent step uses its sign or direction only.
    """

    def gradient(logits: Tensor) -> Tensor:
        scale = _SCALE.get(logits.dtype, 1.0)
        hard = kernels.cross_entropy_grad(logits, y, scale=scale)
        if not label_smoothing:
            return hard
        # softmax - smoothed label = (softmax - label) + smoothing (label - 1 / K)
        label = probabilities(y, hard)
        return hard + scale * label_smoothing * (label - 1 / logits.shape[1])

    return gradient


def towards_runner_up(y: Tensor) -> LogitsGrad:
    """Return the gradient of the margin: the best wrong logit minus the logit of label `y`.

    Unlike the cross-entropy's it does not shrink where the network is sure of its answer (Carlini &
    Wagner, arXiv 1608.04644, their loss f6).
    """

    def grad(logits: Tensor) -> Tensor:
        label = torch.zeros_like(logits).scatter_(1, y[:, None], 1.0)
        best_wrong = logits.masked_fill(label > 0, -torch.inf).argmax(1, keepdim=True)
        return torch.zeros_like(logits).scatter_(1, best_wrong, 1.0) - label

    return grad


def away_from(anchor: Tensor) -> LogitsGrad:
    """Return the gradient of KL(softmax(anchor) || softmax(logits)), a function of logits [B, K].

    The gradient's scale is arbitrary: an ascent step uses its sign or direction only.
    """
    return lambda logits: kernels.kl_grad(anchor, logits, scale=_SCALE.get(logits.dtype, 1.0))


def random_point(ball: Ball, state: Tensor, *, stream: int = rng.START) -> Tensor:
    """Draw a uniform random point of the ball, like its centre.

    Args:
        state: int64 [2] random state (see `engine.rng`), read only.
        stream: separates the draws within a training step; a constant of `engine.rng`.
    """
    with phase(ATTACK_START):
        return kernels.uniform_start(ball.centre, ball.eps, state, norm=ball.norm, stream=stream)


@dataclass(frozen=True)
class ForwardPass:
    """Hold a forward pass from which an ascent step can start.

    Attributes:
        stem: the network's stem if it exposes one.
        z: float32 [B, ...], the images.
        point: the tensor whose gradient the step needs: the stem's output, or the images without a
            stem.
        logits: [B, K], with the graph from `point`.
    """

    stem: Stem | None
    z: Tensor
    point: Tensor
    logits: Tensor

    @classmethod
    def of_attack(cls, model: nn.Module, stem: Stem | None, z: Tensor) -> ForwardPass:
        """Run a pass whose graph starts at `point`: it gives no weight gradient of the stem."""
        with phase(ATTACK_FORWARD):
            if stem is None:
                point = z.detach().requires_grad_()
                return cls(stem, z, point, model(point))
            network = cast(Network, model)
            # Detach, not no_grad: under no_grad autocast caches a cast of the weight without its
            # history, and the training pass would use that cast.
            point = network.stem(z).detach().requires_grad_()
            return cls(stem, z, point, network.body(point))

    @classmethod
    def of_training(cls, model: nn.Module, z: Tensor) -> ForwardPass:
        """Run a pass that the training loss is differentiated through."""
        stem = stem_of(model)
        with phase(TRAIN_FORWARD):
            if stem is None:
                point = z.detach().requires_grad_()
                return cls(stem, z, point, model(point))
            network = cast(Network, model)
            point = network.stem(z)
            return cls(stem, z, point, network.body(point))

    def gradient(self, logits_grad: LogitsGrad, *, retain_graph: bool = False) -> Tensor:
        """Return the gradient at `point` of the loss whose gradient at the logits is given."""
        with phase(ATTACK_STEP):
            towards = logits_grad(self.logits.detach())
        with phase(ATTACK_BACKWARD):
            (grad,) = torch.autograd.grad(
                self.logits, self.point, towards, retain_graph=retain_graph
            )
        return grad

    def step(self, grad: Tensor, ball: Ball, alpha: float | Tensor) -> Tensor:
        """Take the attack step from `z` along the gradient at `point`; `alpha` in pixel units."""
        with phase(ATTACK_STEP):
            if self.stem is None:
                return kernels.attack_step(
                    ball.centre, self.z, grad, ball.eps, alpha, norm=ball.norm
                )
            return kernels.input_grad_step(
                ball.centre,
                self.z,
                grad,
                self.stem.weight,
                stride=self.stem.stride,
                padding=self.stem.padding,
                eps=ball.eps,
                alpha=alpha,
                norm=ball.norm,
            )


def climb(
    model: nn.Module,
    ball: Ball,
    z: Tensor,
    logits_grad: LogitsGrad,
    *,
    steps: int,
    alpha: float | Tensor,
    batch_norm: str = "eval",
) -> tuple[Tensor, Tensor]:
    """Take `steps` >= 1 ascent steps, as `ascend` does, without changing the model's state.

    Args:
        z: float32 [B, ...], the first point of the ball.
        alpha: step size in pixel units.
        batch_norm: as for `passes_without_training`.
    Returns:
        The last point, like `z`, and the detached logits [B, K] at the first.
    """

    def find() -> tuple[Tensor, Tensor]:
        point, stem, first = z, stem_of(model), None
        with passes_without_training(model, batch_norm):
            for _ in range(steps):
                point, logits = ascend(model, ball, point, logits_grad, alpha=alpha, stem=stem)
                first = logits if first is None else first
        assert first is not None
        return point, first

    return once(find)


def ascend(
    model: nn.Module,
    ball: Ball,
    z: Tensor,
    logits_grad: LogitsGrad,
    *,
    alpha: float | Tensor,
    stem: Stem | None,
) -> tuple[Tensor, Tensor]:
    """Take one step of projected ascent from `z` in `ball`: one forward pass, one input gradient.

    The backward pass starts at `logits_grad(logits)`, so no loss is formed. With a stem, the
    backward pass ends at the stem's output, and one op does the rest. No weight gradient is
    computed.

    Args:
        z: float32 [B, ...], a point of the ball.
        alpha: step size in pixel units.
        stem: `stem_of(model)`, asked for after the last change of the weights.
    Returns:
        The next point, like `z`, and the detached logits [B, K] at `z`.
    """
    with torch.enable_grad():
        forward = ForwardPass.of_attack(model, stem, z)
        grad = forward.gradient(logits_grad)
    return forward.step(grad, ball, alpha), forward.logits.detach()


def ascend_from_training(
    model: nn.Module, z: Tensor, y: Labels, *, label_smoothing: float = 0.0
) -> tuple[Tensor, AscentStep]:
    """Run a training pass at `z` and compute the input gradient of its cross-entropy.

    Returns:
        The logits [B, K] with their graph, and the ascent step along that gradient.
    """
    forward = ForwardPass.of_training(model, z)
    # Retain the graph: the training backward pass runs through it too.
    grad = once(lambda: forward.gradient(towards_errors(y, label_smoothing), retain_graph=True))
    return forward.logits, lambda ball, alpha: once(lambda: forward.step(grad, ball, alpha))


def ascend_after_training(model: nn.Module, z: Tensor) -> tuple[Tensor, AscentStep]:
    """Run a training pass at `z` that keeps the input gradient of the training loss.

    The ascent step along that gradient costs no pass, as in Free-AT (Shafahi et al., arXiv
    1904.12843). Take the step after the loss's backward pass and before the weights change.

    Returns:
        The logits [B, K] with their graph, and the ascent step.
    """
    forward = ForwardPass.of_training(model, z)
    forward.point.retain_grad()
    return forward.logits, lambda ball, alpha: forward.step(
        cast(Tensor, forward.point.grad), ball, alpha
    )


@contextlib.contextmanager
def passes_without_training(model: nn.Module, batch_norm: str = "eval") -> Iterator[None]:
    """Run passes that neither update BatchNorm statistics nor apply dropout.

    Every module's own mode is restored afterwards.

    Args:
        batch_norm: "eval" for BatchNorm's running statistics, "batch" for those of the batch.
    """
    modes = [(m, m.training) for m in model.modules()]
    tracked: list[nn.Module] = []
    frozen: list[nn.Parameter] = []
    if getattr(model, "freeze_in_attacks", False):
        frozen = [p for p in model.parameters() if p.requires_grad]
    model.eval()
    if batch_norm == "batch":
        for module, _ in modes:
            if isinstance(module, BatchNorm) and module.track_running_stats:
                # Without tracking, a BatchNorm in training mode reads the batch and writes nothing.
                module.training, module.track_running_stats = True, False
                tracked.append(module)
    try:
        for p in frozen:
            p.requires_grad_(False)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(True)
        for module, mode in modes:
            module.training = mode
        for module in tracked:
            module.track_running_stats = True  # type: ignore[assignment]
