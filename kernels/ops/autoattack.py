"""The steps of APGD and FAB, the two gradient attacks of AutoAttack."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import Scalar, check_images, check_like, check_norm, check_scalar
from .define import define

_apgd_step = define(
    "apgd_step",
    "(Tensor x, Tensor z, Tensor last, Tensor grad, Tensor step, Tensor eps, float momentum, "
    "str norm) -> Tensor",
)
_fab_step = define(
    "fab_step", "(Tensor x, Tensor z, Tensor normal, Tensor gap, str norm) -> Tensor"
)


@torch.library.register_fake("engine::apgd_step")
def _(x, z, last, grad, step, eps, momentum, norm):
    return torch.empty_like(x)


@torch.library.register_fake("engine::fab_step")
def _(x, z, normal, gap, norm):
    return torch.empty_like(x)


def apgd_step(
    x: Tensor,
    z: Tensor,
    last: Tensor,
    grad: Tensor,
    step: Tensor,
    *,
    eps: Scalar,
    momentum: float,
    norm: str = "Linf",
) -> Tensor:
    """Take APGD's step with momentum, clipped to the ball and to [0, 1].

    With P the projection onto the ball: ahead = P(z + step direction), and the result is
    P(z + momentum (ahead - z) + (1 - momentum) (z - last)); equation 3 of Croce & Hein
    (arXiv 2003.01690). Under Linf the direction is the gradient's sign, where a NaN counts as 0.
    Under L2 it is grad / ||grad||; a sample with an infinite or NaN gradient has none.

    Args:
        x: [B, ...] float32, centre of the ball, in [0, 1].
        z, last: like `x`, the current point and the one before.
        grad: like `x`.
        step: [B], step sizes in pixel units, dtype of `x`.
        eps: radius in pixel units, >= 0.
        momentum: share of the new step, in [0, 1].
    Returns:
        The next point, shape, dtype and layout of `x`.
    Raises:
        TypeError, ValueError: for a wrong argument, which the message names.
    """
    x = check_images("x", x)
    z, last = _like("z", z, x), _like("last", last, x)
    grad, step = _like("grad", grad, x), _numbers("step", step, x)
    check_norm(norm)
    if not 0 <= momentum <= 1:
        raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
    return _apgd_step(x, z, last, grad, step, check_scalar("eps", eps, x), momentum, norm)


def fab_step(x: Tensor, z: Tensor, normal: Tensor, gap: Tensor, *, norm: str = "Linf") -> Tensor:
    """Take FAB's step past the linearised decision boundary, pulled towards the clean image.

    The boundary is the plane <normal, p - z> = -gap. With d(p) the shortest way from p to the plane
    within [0, 1], the result is (1 - a) (z + 1.05 d(z)) + a (x + 1.05 d(x)), clipped to [0, 1]. The
    pull a is min(||d(z)|| / (||d(z)|| + ||d(x)||), 0.1); algorithm 1 of Croce & Hein (arXiv
    1907.02044).

    Args:
        x: [B, ...] float32, clean images in [0, 1].
        z: like `x`, the current point.
        normal: like `x`, the gradient of z_target - z_label at `z`. Slopes of NaN, and under L2
            those up to 1e-8, count as 0.
        gap: [B], z_target - z_label at `z`, dtype of `x`.
    Returns:
        The next point, shape, dtype and layout of `x`.
    Raises:
        TypeError, ValueError: for a wrong argument, which the message names.
    """
    x = check_images("x", x)
    z, normal = _like("z", z, x), _like("normal", normal, x)
    check_norm(norm)
    return _fab_step(x, z, normal, _numbers("gap", gap, x), norm)


def _like(name: str, t: Tensor, x: Tensor) -> Tensor:
    t = check_like(name, t, x, "x")
    if t.dtype != x.dtype:
        raise TypeError(f"{name} is {t.dtype}, x is {x.dtype}")
    return t


def _numbers(name: str, t: Tensor, x: Tensor) -> Tensor:
    """Check for one number a sample, in the type and on the device of `x`."""
    if t.shape != x.shape[:1]:
        raise ValueError(f"{name} must have shape ({len(x)},), got {tuple(t.shape)}")
    if t.dtype != x.dtype:
        raise TypeError(f"{name} is {t.dtype}, x is {x.dtype}")
    if t.device != x.device:
        raise ValueError(f"{name} is on {t.device}, x on {x.device}")
    return t.contiguous()
