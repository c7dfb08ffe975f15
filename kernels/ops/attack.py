"""The random start of an attack and its projected step."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import same_order
from .checks import Scalar, check_images, check_like, check_norm, check_rng, check_scalar
from .define import define

_uniform_start = define(
    "uniform_start",
    "(Tensor x, Tensor eps, Tensor rng, str norm, int stream) -> Tensor",
)


@torch.library.register_fake("engine::uniform_start")
def _(x, eps, rng, norm, stream):
    return torch.empty_like(x)


def uniform_start(
    x: Tensor, eps: Scalar, rng: Tensor, *, norm: str = "Linf", stream: int = 0
) -> Tensor:
    """Draw a uniform random point of the ball of radius `eps` around `x`, clipped to [0, 1].

    The source of the random numbers is Philox-4x32-10 (see `kernels.reference`).

    Args:
        x: [B, ...] in [0, 1].
        eps: radius in pixel units, >= 0.
        rng: int64 [2], (seed, step); the op does not advance it.
        norm: "Linf" or "L2".
        stream: separates the draws within one step, in [0, 2^31).
    Returns:
        Shape, dtype and layout of `x`.
    Raises:
        TypeError, ValueError: for a wrong argument, which the message names.
    """
    x = check_images("x", x)
    check_norm(norm)
    check_rng(rng, x)
    if not (0 <= stream < 1 << 31):
        raise ValueError(f"stream must lie in [0, 2^31), got {stream}")
    return _uniform_start(x, check_scalar("eps", eps, x), rng, norm, stream)


_attack_step = define(
    "attack_step",
    "(Tensor x, Tensor z, Tensor grad, Tensor eps, Tensor alpha, str norm) -> Tensor",
)


@torch.library.register_fake("engine::attack_step")
def _(x, z, grad, eps, alpha, norm):
    return torch.empty_like(x)


def attack_step(
    x: Tensor, z: Tensor, grad: Tensor, eps: Scalar, alpha: Scalar, *, norm: str = "Linf"
) -> Tensor:
    """Take one projected ascent step from `z` along `grad`, in the ball around `x` and in [0, 1].

    Linf: clip z + alpha sign(grad) to [x - eps, x + eps], a gradient value of NaN counting as 0.
    L2: project z + alpha grad / ||grad|| radially into the ball; a sample whose gradient is zero,
    infinite or NaN does not move. This is one step of PGD (Madry et al., arXiv 1706.06083).

    Args:
        x: [B, ...] float32, centre of the ball, in [0, 1].
        z: like `x`, the current point.
        grad: shape of `x`, any float dtype.
        eps, alpha: radius and step size in pixel units, >= 0.
    Returns:
        The next point, shape, dtype and layout of `x`.
    Raises:
        TypeError, ValueError: for a wrong argument, which the message names.
    """
    x = check_images("x", x)
    z, grad = check_like("z", z, x, "x"), check_like("grad", grad, x, "x")
    if z.dtype != x.dtype:
        raise TypeError(f"z is {z.dtype}, x is {x.dtype}")
    if not grad.is_floating_point():
        raise TypeError(f"grad must be a float tensor, got {grad.dtype}")
    check_norm(norm)
    return _attack_step(
        x, z, grad, check_scalar("eps", eps, x), check_scalar("alpha", alpha, x), norm
    )


_attack_step_ = define(
    "attack_step_",
    "(Tensor x, Tensor(a!) z, Tensor grad, Tensor eps, Tensor alpha, str norm) -> ()",
)


@torch.library.register_fake("engine::attack_step_")
def _(x, z, grad, eps, alpha, norm):
    return None


def attack_step_(
    x: Tensor, z: Tensor, grad: Tensor, eps: Scalar, alpha: Scalar, *, norm: str = "Linf"
) -> None:
    """Take `attack_step` in place.

    Args:
        x, grad, eps, alpha, norm: as for `attack_step`.
        z: the current point, replaced by the next; dtype and memory order of `x`. It must share no
            memory with `x`.
    Raises:
        TypeError, ValueError: for a wrong argument, which the message names.
    """
    x = check_images("x", x)
    if isinstance(z, Tensor) and z.shape == x.shape and not same_order(x, z):
        raise ValueError(f"z must lie in memory as x does, {x.stride()}: strides {z.stride()}")
    z, grad = check_like("z", z, x, "x"), check_like("grad", grad, x, "x")
    if z.dtype != x.dtype:
        raise TypeError(f"z is {z.dtype}, x is {x.dtype}")
    if z.data_ptr() == x.data_ptr() and z.numel() > 0:
        raise ValueError("z is x itself: the step would move the centre of the ball")
    if not grad.is_floating_point():
        raise TypeError(f"grad must be a float tensor, got {grad.dtype}")
    check_norm(norm)
    eps, alpha = check_scalar("eps", eps, x), check_scalar("alpha", alpha, x)
    _attack_step_(x, z, grad, eps, alpha, norm)
    if not z.is_inference():
        # A backward pass that still needs the old values then fails; it would silently be wrong.
        torch.autograd.graph.increment_version([z])
