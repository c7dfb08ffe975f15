"""The backward pass of a network's first convolution, with and without the attack step."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import FLOATS, Scalar, check_images, check_like, check_norm, check_scalar
from .define import define, library

_input_grad_step = define(
    "input_grad_step",
    "(Tensor x, Tensor z, Tensor stem_grad, Tensor weight, int stride, int padding, Tensor eps, "
    "Tensor alpha, str norm) -> Tensor",
)


@torch.library.register_fake("engine::input_grad_step")
def _(x, z, stem_grad, weight, stride, padding, eps, alpha, norm):
    return torch.empty_like(x)


def input_grad_step(
    x: Tensor,
    z: Tensor,
    stem_grad: Tensor,
    weight: Tensor,
    *,
    stride: int,
    padding: int,
    eps: Scalar,
    alpha: Scalar,
    norm: str = "Linf",
) -> Tensor:
    """Compute the input gradient of a network's first convolution and take the attack step.

    The result equals `attack_step(x, z, stem_input_grad(stem_grad, weight, ...), ...)`.

    Args:
        x, z: [B, C, H, W] float32.
        stem_grad: [B, O, H', W'], gradient at the convolution's output.
        weight: [O, C, kh, kw], the convolution's weight (groups 1, dilation 1). If a normalisation
            precedes the convolution, divide the weight by the standard deviation.
        stride, padding: of the convolution, the same in both directions.
        eps, alpha, norm: as for `attack_step`.
    Returns:
        The next point, shape, dtype and layout of `x`.
    Raises:
        TypeError, ValueError: for a wrong argument, which the message names.
    """
    x = check_images("x", x)
    z = check_like("z", z, x, "x")
    if x.dim() != 4:
        raise ValueError(f"x must be [B, C, H, W], got {tuple(x.shape)}")
    if weight.dim() != 4:
        raise ValueError(f"weight must be [O, C, kh, kw], got {tuple(weight.shape)}")
    out_channels, channels, kh, kw = weight.shape
    b, c, h, w = x.shape
    if channels != c:
        raise ValueError(f"weight takes {channels} channels, x has {c}")
    _check_stem_grad(stem_grad, x, (out_channels, *_sides((h, w), (kh, kw), stride, padding)), b)
    if weight.device != x.device:
        raise ValueError(f"weight is on {weight.device}, x on {x.device}")
    check_norm(norm)
    eps, alpha = check_scalar("eps", eps, x), check_scalar("alpha", alpha, x)
    return _input_grad_step(x, z, stem_grad, weight, stride, padding, eps, alpha, norm)


_stem_input_grad = define(
    "stem_input_grad",
    "(Tensor stem_grad, Tensor weight, int h, int w, int stride, int padding) -> Tensor",
)


@torch.library.register_fake("engine::stem_input_grad")
def _(stem_grad, weight, h, w, stride, padding):
    return weight.new_empty(len(stem_grad), weight.shape[1], h, w)


def stem_input_grad(
    stem_grad: Tensor, weight: Tensor, *, size: tuple[int, int], stride: int, padding: int
) -> Tensor:
    """Compute the input gradient of a network's first convolution, differentiable in both tensors.

    Use it if no attack step follows: for attacks of other packages and for gradients of gradients.
    On a GPU the vendor's library is fast, and the op calls it.

    Args:
        stem_grad: [B, O, H', W'] float, gradient at the convolution's output.
        weight: [O, C, kh, kw] float32 or float64, the convolution's weight (groups 1, dilation 1).
        size: (H, W) of the convolution's input.
        stride, padding: of the convolution, the same in both directions.
    Returns:
        [B, C, H, W], dtype of `weight`.
    """
    if weight.dim() != 4:
        raise ValueError(f"weight must be [O, C, kh, kw], got {tuple(weight.shape)}")
    if weight.dtype not in FLOATS:
        raise TypeError(f"weight must be float32 (or float64), got {weight.dtype}")
    out, _, kh, kw = weight.shape
    _check_stem_grad(stem_grad, weight, (out, *_sides(size, (kh, kw), stride, padding)))
    return _stem_input_grad(stem_grad, weight, *size, stride, padding)


_stem_weight_grad = define(
    "stem_weight_grad",
    "(Tensor x, Tensor stem_grad, int kh, int kw, int stride, int padding) -> (Tensor, Tensor)",
)


@torch.library.register_fake("engine::stem_weight_grad")
def _(x, stem_grad, kh, kw, stride, padding):
    out = stem_grad.shape[1]
    return stem_grad.new_empty(out, x.shape[1], kh, kw), stem_grad.new_empty(out)


def stem_weight_grad(
    x: Tensor, stem_grad: Tensor, *, kernel: tuple[int, int], stride: int, padding: int
) -> tuple[Tensor, Tensor]:
    """Compute the weight and bias gradients of a network's first convolution.

    They are differentiable in both tensors. On a CPU, vendor libraries are slow for images of few
    channels. On a GPU the vendor's library is fast, and the op calls it.

    Args:
        x: [B, C, H, W] float, the convolution's input.
        stem_grad: [B, O, H', W'] float, gradient at the convolution's output.
        kernel: (kh, kw) of the weight.
        stride, padding: the same in both directions (groups 1, dilation 1).
    Returns:
        [O, C, kh, kw] and [O], dtype of `stem_grad`.
    """
    x = check_images("x", x)
    if x.dim() != 4:
        raise ValueError(f"x must be [B, C, H, W], got {tuple(x.shape)}")
    sides = _sides(x.shape[2:], kernel, stride, padding)
    _check_stem_grad(
        stem_grad, x, (stem_grad.shape[1] if stem_grad.dim() > 1 else 0, *sides), len(x)
    )
    return _stem_weight_grad(x, stem_grad, *kernel, stride, padding)


def _sides(size, kernel, stride: int, padding: int) -> tuple[int, int]:
    """Return (H', W') of a convolution's output."""
    if not (stride >= 1 and padding >= 0):
        raise ValueError(f"stride {stride} or padding {padding} out of range")
    h, w = ((n + 2 * padding - k) // stride + 1 for n, k in zip(size, kernel, strict=True))
    return h, w


def _check_stem_grad(stem_grad: Tensor, like: Tensor, shape, batch: int | None = None) -> None:
    """Check for a float tensor [B, *shape] on the device of `like`; B is `batch` unless None."""
    if not stem_grad.is_floating_point():
        raise TypeError(f"stem_grad must be a float tensor, got {stem_grad.dtype}")
    expected = (len(stem_grad) if batch is None else batch, *shape)
    if stem_grad.shape != expected:
        raise ValueError(f"stem_grad has shape {tuple(stem_grad.shape)}, expected {expected}")
    if stem_grad.device != like.device:
        raise ValueError(f"stem_grad is on {stem_grad.device}, not {like.device}")


# Both gradients are derivatives of the bilinear form <conv(x; weight), stem_grad>. So each one's
# derivative consists of the other gradient and the convolution.


def _input_grad_setup(ctx, inputs, output) -> None:
    stem_grad, weight, _, _, ctx.stride, ctx.padding = inputs
    ctx.save_for_backward(stem_grad, weight)


def _input_grad_backward(ctx, towards):
    stem_grad, weight = ctx.saved_tensors
    on_grad = on_weight = None
    if ctx.needs_input_grad[0]:
        on_grad = torch.conv2d(towards, weight, None, ctx.stride, ctx.padding).to(stem_grad.dtype)
    if ctx.needs_input_grad[1]:
        kernel = weight.shape[2:]
        on_weight, _ = _stem_weight_grad(
            towards, stem_grad.to(weight.dtype), *kernel, ctx.stride, ctx.padding
        )
    return on_grad, on_weight, None, None, None, None


def _weight_grad_setup(ctx, inputs, output) -> None:
    x, stem_grad, _, _, ctx.stride, ctx.padding = inputs
    ctx.save_for_backward(x, stem_grad)


def _weight_grad_backward(ctx, towards, towards_bias):
    x, stem_grad = ctx.saved_tensors
    on_x = on_grad = None
    if ctx.needs_input_grad[0]:
        on_x = _stem_input_grad(
            stem_grad, towards.contiguous(), *x.shape[2:], ctx.stride, ctx.padding
        ).to(x.dtype)
    if ctx.needs_input_grad[1]:
        on_grad = torch.conv2d(x.to(towards.dtype), towards, towards_bias, ctx.stride, ctx.padding)
    return on_x, on_grad, None, None, None, None


torch.library.register_autograd(
    "engine::stem_input_grad", _input_grad_backward, setup_context=_input_grad_setup, lib=library
)
torch.library.register_autograd(
    "engine::stem_weight_grad",
    _weight_grad_backward,
    setup_context=_weight_grad_setup,
    lib=library,
)
