"""Forms of a network for attacks: the same function up to rounding, in less time."""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ...models.foreign import one_line
from ...progress import announce_once

log = logging.getLogger(__name__)

# A form's logits may differ from the network's by rounding, relative to the largest logit.
_ROUNDING = 1e-4


@torch.no_grad()
def folded(model: nn.Module, example: Tensor) -> nn.Module:
    """Return a frozen copy of the network, each BatchNorm folded into the convolution before it.

    A BatchNorm stays where its input is not a convolution's output alone: after an addition, as at
    the start of a pre-activation block, and after the stem, whose output an attack reads. On the
    CPU the copy is channels_last.

    Measured on one core (AMD EPYC, AVX-512, batches of 128) at width 8: a gradient pass takes 0.64
    of its time in a PreActResNet-18 and 0.60 in a ResNet-18, a forward pass 0.75 and 0.72. Most of
    that is the layout. Of a network that is channels_last already, as every recipe's is, it is 0.94
    and 0.86, forward 0.95. At width 64 (batches of 32) all take 0.95 to 1.0.

    The network itself is returned where it has no BatchNorm. A line says so once where the network
    cannot be copied, or the copy gives other logits than rounding explains.

    Args:
        model: in evaluation mode; example: some images [B, C, H, W].
    """
    if not _norms(model):
        return model
    try:
        form: Any = copy.deepcopy(model).requires_grad_(False)
        for conv, norm in _pairs(form, example[:2]):
            together = fuse_conv_bn_eval(form.get_submodule(conv), form.get_submodule(norm))
            _replace(form, conv, together)
            _replace(form, norm, nn.Identity())
        if example.device.type == "cpu":
            form = form.to(memory_format=torch.channels_last)
        if same_logits(model(example), form(example)):
            return form
        reason = "the folded network gives other logits"
    except Exception as error:
        reason = one_line(error)
    announce_once(log, f"AutoAttack passes the network with its BatchNorms unfolded: {reason}")
    return model


def _norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def _pairs(model: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """Return the names of each convolution and the BatchNorm that reads its output unchanged."""
    # By a tensor's identity: the convolution that made it, the tensor and its version then. The
    # tensor is kept, so that no other tensor takes its identity.
    made: dict[int, tuple[str, Tensor, int]] = {}
    pairs: list[tuple[str, str]] = []
    stem = getattr(model, "stem_conv", None)
    hooks = []

    def note(name: str) -> Any:
        return lambda _, __, out: made.update({id(out): (name, out, out._version)})

    def match(name: str) -> Any:
        def matched(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found = made.get(id(inputs[0]))
            if found is not None and found[2] == inputs[0]._version:
                pairs.append((found[0], name))

        return matched

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module is not stem:
            hooks.append(module.register_forward_hook(note(name)))
        elif isinstance(module, nn.BatchNorm2d):
            hooks.append(module.register_forward_pre_hook(match(name)))
    model(example)
    for hook in hooks:
        hook.remove()
    return pairs


def _replace(model: nn.Module, name: str, by: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, by)


@torch.no_grad()
def prepared(model: nn.Module, example: Tensor) -> nn.Module:
    """Return a form of the network for inference on the CPU, or the network where there is none.

    Its weights are frozen and laid out for the vendor's library, and ReLU is folded into the
    convolutions. Measured on one core (AMD EPYC, AVX-512): 0.45 of the plain time on fast-at-mnist
    and 0.62 on small-cnn in batches of 256. A network that keeps a BatchNorm stays as it is: the
    library changes the layout around each, and a thin ResNet then takes 1.2 of its time.

    The network stays as it is, and a line says so once, where it is no plain function of tensors or
    its prepared form gives other logits than rounding explains.

    Args:
        model: in evaluation mode; example: some images [B, C, H, W].
    """
    if example.device.type != "cpu" or len(example) < 2 or _norms(model):
        return model
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # A network that looks at values on the host would be frozen on this example's way.
            warnings.simplefilter("error", torch.jit.TracerWarning)
            # The library chooses its layouts itself; channels_last weights would cost it time.
            plain: Any = copy.deepcopy(model)
            plain = plain.to(memory_format=torch.contiguous_format)
            traced = torch.jit.trace(plain, example[:2], check_trace=False)
            frozen = torch.jit.optimize_for_inference(torch.jit.freeze(traced))
        if same_logits(model(example), frozen(example)):
            return frozen
        reason = "its frozen form gives other logits"
    except Exception as error:
        # A tracer's warning within a conversion to a Python value arrives as its cause.
        reason = one_line(error.__cause__ or error)
    announce_once(log, f"AutoAttack makes its forward passes without a frozen form: {reason}")
    return model


def same_logits(plain: Tensor, fast: Tensor) -> bool:
    """Tell whether logits [B, K] of two forms of a network differ by rounding alone."""
    return plain.shape == fast.shape and bool(
        ((plain - fast).abs().max() <= _ROUNDING * plain.abs().max()).item()
    )
