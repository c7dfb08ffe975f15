"""Count the kernels that an operator launches on a GPU, and name what their fusion would save."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import ceil
from typing import Any

from torch import Tensor

from ..device import phases
from .dispatch import Call

# Tensors that one launch of PyTorch's lists of tensors takes, by the number of lists.
_IN_A_LAUNCH = {1: 110, 2: 64, 3: 48, 4: 36}


def kernels_of(call: Call) -> int:
    """Return how many kernels a call launches on a GPU; 1 for operators without a rule."""
    name = call.short_name
    if name.startswith("_foreach_"):
        lists = [a for a in call.args if isinstance(a, list) and a and isinstance(a[0], Tensor)]
        return ceil(max(map(len, lists)) / _IN_A_LAUNCH.get(len(lists), 36)) if lists else 1
    rule = _RULES.get(name)
    return rule(call.args) if rule else 1


def _convolution_backward(args: tuple[Any, ...]) -> int:
    """Return one kernel for each gradient that is asked for."""
    return sum(args[-1])


def _input_grad_step(args: tuple[Any, ...]) -> int:
    """Return the kernels of `kernels.triton.stem`: under L2 the step has its own."""
    return 2 if args[-1] == "L2" else 1


_RULES: dict[str, Callable[[tuple[Any, ...]], int]] = {
    "convolution_backward": _convolution_backward,
    "engine::input_grad_step": _input_grad_step,
}

_FORWARD = {phases.ATTACK_FORWARD: "attack", phases.TRAIN_FORWARD: "trained"}
_BACKWARD = {phases.ATTACK_BACKWARD: "attack", phases.TRAIN_BACKWARD: "trained"}
_RELU = {"aten::relu": _FORWARD, "aten::relu_": _FORWARD, "aten::threshold_backward": _BACKWARD}
_ADD = {"aten::add": _FORWARD | _BACKWARD, "aten::add_": _FORWARD | _BACKWARD}
# An addition that the next kernel makes saves a write and a read of three transfers.
_OF_AN_ADDITION = 2 / 3


def fusions(ops: Iterable[tuple[str, str, bool, float]]) -> dict[str, float]:
    """Return the time that each fusion would save, by its name [the unit of the times].

    The fusions are those that torch.compile makes: ReLU inside the kernel before
    it, additions of images inside the next kernel. Folding a BatchNorm into a convolution or a
    fused kernel of the engine's own would save no more.

    Args:
        ops: of each operator its name, its phase, whether its result is a batch of images [B, C,
            H, W], and its time.
    """
    saved: dict[str, float] = {}
    for name, phase, images, seconds in ops:
        if images and (kind := _RELU.get(name, {}).get(phase)):
            key, share = f"ReLU in the kernel before it, {kind} passes", 1.0
        elif images and (kind := _ADD.get(name, {}).get(phase)):
            key, share = f"additions in the kernel after them, {kind} passes", _OF_AN_ADDITION
        else:
            continue
        saved[key] = saved.get(key, 0.0) + share * seconds
    return saved
