"""Take projected gradient steps that compute input gradients and nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor, nn

from .. import kernels
from ..device.phases import (
    ATTACK_BACKWARD,
    ATTACK_FORWARD,
    ATTACK_STEP,
    TRAIN_FORWARD,
    phase,
)
from ..models import Network, Stem, stem_of

BatchNorm = nn.modules.batchnorm._BatchNorm
LogitsGrad = Callable[[Tensor], Tensor]
# A sum over the batch starts at values of about one; float16 keeps what is 1e-7 of that after this.
_RANGE = {torch.float16: 128.0}


def towards_errors(y: Tensor, label_smoothing: float = 0.0) -> LogitsGrad:
    """The gradient of the cross-entropy at labels `y` int64 [B], from logits [B, K]; its scale is free."""

    def grad(logits: Tensor) -> Tensor:
        scale = _RANGE.get(logits.dtype, 1.0)
        found = kernels.cross_entropy_grad(logits, y, scale=scale)
        if label_smoothing:
            # softmax - smoothed label = (softmax - label) + smoothing (label - 1 / K)
            label = torch.zeros_like(found).scatter_(1, y[:, None], 1.0)
            found = found + scale * label_smoothing * (label - 1 / logits.shape[1])
        return found

    return grad


def away_from(anchor: Tensor) -> LogitsGrad:
    """The gradient of KL(softmax(anchor) || softmax(logits)), from logits [B, K]; its scale is free."""
    return lambda logits: kernels.kl_grad(anchor, logits, scale=_RANGE.get(logits.dtype, 1.0))


def climb(
    model: nn.Module,
    centre: Tensor,
    z: Tensor,
    logits_grad: LogitsGrad,
    *,
    steps: int,
    eps: float | Tensor,
    alpha: float | Tensor,
    norm: str,
    batch_norm: str = "eval",
) -> tuple[Tensor, Tensor]:
    """`steps` >= 1 times `ascend`, under `passes_without_training(model, batch_norm)`.

    Returns:
        The last point, like `z`, and the detached logits at the first: its forward pass was made anyway.
    """
    stem, first = stem_of(model), None
    with passes_without_training(model, batch_norm):
        for _ in range(steps):
            z, logits = _ascend(model, stem, centre, z, logits_grad, eps, alpha, norm)
            first = logits if first is None else first
    assert first is not None
    return z, first


def ascend(
    model: nn.Module,
    centre: Tensor,
    z: Tensor,
    logits_grad: LogitsGrad,
    *,
    eps: float | Tensor,
    alpha: float | Tensor,
    norm: str,
) -> tuple[Tensor, Tensor]:
    """One step of projected ascent from `z` in the ball around `centre`: one forward pass, one input gradient.

    The backward pass starts at `logits_grad(logits)`: no loss is formed. In a network that exposes its
    stem it ends at the stem's output, and one op does the rest. No weight gradient is computed.

    Returns:
        The next point, like `z`, and the detached logits at `z`.
    """
    return _ascend(model, stem_of(model), centre, z, logits_grad, eps, alpha, norm)


def _ascend(
    model: nn.Module,
    stem: Stem | None,
    centre: Tensor,
    z: Tensor,
    logits_grad: LogitsGrad,
    eps: float | Tensor,
    alpha: float | Tensor,
    norm: str,
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        with phase(ATTACK_FORWARD):
            if stem is None:
                point = z.detach().requires_grad_()
                logits = model(point)
            else:
                network = cast(Network, model)
                # Detached, not under no_grad: autocast would keep a cast of the weight without its
                # history, and hand it to the training pass.
                point = network.stem(z).detach().requires_grad_()
                logits = network.body(point)
        with phase(ATTACK_STEP):
            towards = logits_grad(logits.detach())
        with phase(ATTACK_BACKWARD):
            (grad,) = torch.autograd.grad(logits, point, towards)
    with phase(ATTACK_STEP):
        z = step_along(stem, centre, z, grad, eps=eps, alpha=alpha, norm=norm)
    return z, logits.detach()


# A point at which a gradient is known takes its ascent step in the ball (centre, eps) by alpha.
Along = Callable[[Tensor, float | Tensor, float | Tensor], Tensor]


def ascend_from_training(
    model: nn.Module, z: Tensor, y: Tensor, norm: str, *, label_smoothing: float = 0.0
) -> tuple[Tensor, Along]:
    """A pass to train through that serves ascent too: one forward pass and one input gradient.

    Returns:
        The logits at `z` with their graph, and the step along the cross-entropy's gradient there.
    """
    logits, point, stem = _open_pass(model, z)
    with phase(ATTACK_STEP):
        towards = towards_errors(y, label_smoothing)(logits.detach())
    with phase(ATTACK_BACKWARD):
        # Retained: the training backward pass runs through the same graph.
        (grad,) = torch.autograd.grad(logits, point, towards, retain_graph=True)
    return logits, _along(stem, z, lambda: grad, norm)


def ascend_after_training(model: nn.Module, z: Tensor, norm: str) -> tuple[Tensor, Along]:
    """A pass to train through, and the ascent step along the gradient that training leaves at `z`: free.

    As Free-AT does it (Shafahi et al., arXiv 1904.12843). The step may be taken once the loss's backward
    pass has run, and before the weights change.
    """
    logits, point, stem = _open_pass(model, z)
    point.retain_grad()
    return logits, _along(stem, z, lambda: cast(Tensor, point.grad), norm)


def _along(stem: Stem | None, z: Tensor, grad: Callable[[], Tensor], norm: str) -> Along:
    def step(centre: Tensor, eps: float | Tensor, alpha: float | Tensor) -> Tensor:
        with phase(ATTACK_STEP):
            return step_along(stem, centre, z, grad(), eps=eps, alpha=alpha, norm=norm)

    return step


def _open_pass(model: nn.Module, z: Tensor) -> tuple[Tensor, Tensor, Stem | None]:
    """Logits at `z` with their graph, and the tensor on the way whose gradient an attack step takes."""
    stem = stem_of(model)
    with phase(TRAIN_FORWARD):
        if stem is None:
            point = z.detach().requires_grad_()
            return model(point), point, None
        network = cast(Network, model)
        point = network.stem(z)
        return network.body(point), point, stem


def step_along(
    stem: Stem | None,
    centre: Tensor,
    z: Tensor,
    grad: Tensor,
    *,
    eps: float | Tensor,
    alpha: float | Tensor,
    norm: str,
) -> Tensor:
    """The attack step from `z` along a gradient: at the stem's output, or at the pixels without a stem."""
    if stem is None:
        return kernels.attack_step(centre, z, grad, eps, alpha, norm=norm)
    return kernels.input_grad_step(
        centre,
        z,
        grad,
        stem.weight,
        stride=stem.stride,
        padding=stem.padding,
        eps=eps,
        alpha=alpha,
        norm=norm,
    )


@contextlib.contextmanager
def passes_without_training(model: nn.Module, batch_norm: str = "eval") -> Iterator[None]:
    """Passes in the block change no BatchNorm statistics and drop nothing out.

    With "eval" BatchNorm uses its running statistics, with "batch" those of the batch at hand. Every
    module's own mode comes back afterwards.
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
                # With tracking off a training-mode BatchNorm reads the batch and writes nothing.
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
