"""The base class of the networks, and the stem that an attack differentiates separately."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from .. import kernels


class Network(nn.Module):
    """Classify images in two parts, `forward(x) = body(stem(x))`.

    The stem is the normalisation and the first convolution only. So an attack can end its backward
    pass at the stem's output and leave the rest to `kernels.ops.input_grad_step`. For this, `body`
    must not write into its argument, which is then a leaf of autograd's graph.

    Input [B, C, H, W], float in [0, 1]; output logits [B, K]. A subclass implements `body`, and
    sets `stem_name` if its first convolution is not called `conv1`. With None, the stem is the
    normalisation alone, and attacks differentiate the network down to the pixels.
    """

    stem_name: str | None = "conv1"
    mu: Tensor | None
    sigma: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        # A buffer that is None has no key in the state dict. So a network without normalisation
        # loads a checkpoint without `mu` and `sigma`, and a network with it one with them.
        self.register_buffer("mu", None)
        self.register_buffer("sigma", None)

    def normalise(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Start the stem with (x - mean) / std, with the buffers `mu` and `sigma` [1, C, 1, 1].

        Args:
            mean, std: one number a channel, in pixel units; std > 0.
        Raises:
            ValueError: for another number of values than input channels, or a std <= 0.
        """
        weight = next(self.parameters())
        channels = self.in_channels
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != channels:
                raise ValueError(f"{name} has {len(values)} values, the images {channels} channels")
        if not all(s > 0 for s in std):
            raise ValueError(f"std must be positive, got {tuple(std)}")
        shape = (1, channels, 1, 1)
        self.mu = torch.tensor(mean, dtype=weight.dtype, device=weight.device).view(shape)
        self.sigma = torch.tensor(std, dtype=weight.dtype, device=weight.device).view(shape)

    @property
    def stem_conv(self) -> nn.Conv2d | None:
        """The first convolution, or None in a network without a stem."""
        if self.stem_name is None:
            return None
        return cast(nn.Conv2d, self.get_submodule(self.stem_name))

    @property
    def in_channels(self) -> int:
        """The number of channels of an image."""
        return cast(nn.Conv2d, self.stem_conv).in_channels

    def scaled(self, x: Tensor) -> Tensor:
        """Return the normalised images, or the images themselves without `mu` and `sigma`."""
        if self.mu is None or self.sigma is None:
            return x
        return (x - self.mu) / self.sigma

    def stem(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] in [0, 1] to the first convolution's output [B, O, H', W']."""
        x = self.scaled(x)
        conv = self.stem_conv
        if conv is None:
            return x
        if _ours(conv, x):
            return _StemConvolution.apply(
                x, conv.weight, conv.bias, conv.stride[0], conv.padding[0]
            )
        return conv(x)

    def body(self, h: Tensor) -> Tensor:
        """Map [B, O, H', W'] to logits [B, K], without a change of `h`."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.stem(x))


def _ours(conv: nn.Conv2d, x: Tensor) -> bool:
    """Tell whether to use this package's backward pass: on a CPU the library's is slow.

    The library's backward pass is slow there for images of few channels.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == conv.weight.dtype == torch.float32
        and torch.is_grad_enabled()
        and (x.requires_grad or conv.weight.requires_grad)
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        # torch.func has no rules for these ops, so the library's convolution serves it.
        and not torch._C._are_functorch_transforms_active()
        and is_plain(conv)
    )


class _StemConvolution(torch.autograd.Function):
    """Convolve, with the gradients of `kernels.stem_input_grad` and `kernels.stem_weight_grad`."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return torch.conv2d(x, weight, bias, stride, padding)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        geometry = {"stride": ctx.stride, "padding": ctx.padding}
        on_x = on_weight = on_bias = None
        if ctx.needs_input_grad[0]:
            on_x = kernels.stem_input_grad(grad, weight, size=tuple(x.shape[2:]), **geometry)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            on_weight, on_bias = kernels.stem_weight_grad(
                x, grad, kernel=tuple(weight.shape[2:]), **geometry
            )
        biased = ctx.needs_input_grad[2]
        return on_x, on_weight, on_bias if biased else None, None, None


@dataclass(frozen=True, eq=False)
class Stem:
    """Hold the linear part of a stem, for `kernels.ops.input_grad_step`.

    Attributes:
        weight: [O, C, kh, kw], detached; the convolution's weight over the standard deviation of
            its input channel. It is valid until the weights change.
        stride, padding: the same in both directions.
    """

    weight: Tensor
    stride: int
    padding: int


def stem_of(model: nn.Module) -> Stem | None:
    """Return the stem of a network that exposes one, else None.

    Without a stem, an attack differentiates the network down to the pixels. Besides the networks
    here the function serves any module with `stem`, `body` and `stem_conv` (and a buffer `sigma` if
    it divides its input) that follows the rules of `Network`. The convolution must be plain: no
    groups, no dilation, zero padding, the same stride and padding in both directions.
    """
    conv = getattr(model, "stem_conv", None)
    exposed = callable(getattr(model, "stem", None)) and callable(getattr(model, "body", None))
    if not exposed or not isinstance(conv, nn.Conv2d):
        return None
    if not is_plain(conv):
        return None
    weight = conv.weight.detach()
    if weight.is_cuda:
        # Once here, and not in every attack step.
        weight = kernels.outputs_innermost(weight)
    sigma = getattr(model, "sigma", None)
    stride, padding = conv.stride[0], cast(int, conv.padding[0])
    return Stem(weight if sigma is None else weight / sigma, stride, padding)


class Opening(nn.Conv2d):
    """A convolution that returns `given` where there is one: the stem has convolved already."""

    given: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if self.given is None else self.given


def is_plain(conv: nn.Conv2d) -> bool:
    """Tell whether a convolution is one that a `Stem` describes."""
    return (
        # Neither another forward pass, of a subclass or an instance, nor one with hooks around it.
        getattr(conv.forward, "__func__", None) in (nn.Conv2d.forward, Opening.forward)
        and not conv._forward_pre_hooks
        and not conv._forward_hooks
        and not isinstance(conv.padding, str)
        and conv.groups == 1
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and conv.stride[0] == conv.stride[1]
        and conv.padding[0] == conv.padding[1]
    )
