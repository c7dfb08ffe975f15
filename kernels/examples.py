"""One launch of every Triton kernel at CIFAR-10's size, for the audit.

The batch is 128 images of 3x32x32 with 10 classes; the stem is a 3x3 convolution to 64 channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import ops

_BATCH, _CHANNELS, _SIDE, _CLASSES, _STEM = 128, 3, 32, 10, 64
_SHAPE = (_BATCH, _CHANNELS, _SIDE, _SIDE)
_SAMPLE = _CHANNELS * _SIDE * _SIDE
_PIXELS, _LOGITS = _BATCH * _SAMPLE, _BATCH * _CLASSES
# A batch whose loss needs a second launch.
_MANY = 4096


@dataclass(frozen=True)
class Example:
    """Hold one kernel at one size.

    Attributes:
        kernel: name of the row.
        op: the op that the kernel serves.
        launch: runs that op; the kernel is launch number `position` of the op, from 0.
        elements: number of results of the whole launch (outputs; for the loss, logits of one pass).
        min_bytes: bytes an element, if every operand passes through memory once.
        flat: whether each lane has one element and the kernel does not gather; then the audit
            demands 128-bit accesses and `min_bytes`.
        branches: whether the kernel has a second, narrow path for the tail; then only the widest
            accesses count.
        counted: whether a static count of instructions is the number that runs; inner loops repeat
            instructions.
    """

    kernel: str
    op: str
    launch: Callable[[], object]
    elements: int
    min_bytes: float
    flat: bool = False
    branches: bool = False
    counted: bool = True
    position: int = 0


def examples() -> list[Example]:
    """Return an example of every kernel."""
    return [*_attack(), *_autoattack(), *_logits(), *_stem(), *_loss(), *_data(), *_optimisers()]


def _attack() -> list[Example]:
    x, rng, one = torch.zeros(_SHAPE), torch.zeros(2, dtype=torch.int64), torch.ones(())
    z, half = torch.zeros_like(x), x.bfloat16()

    def start(norm: str) -> Callable[[], object]:
        return lambda: ops.uniform_start(x, one, rng, norm=norm)

    def step(grad: Tensor, norm: str = "Linf") -> Callable[[], object]:
        return lambda: ops.attack_step(x, x, grad, one, one, norm=norm)

    def in_place() -> None:
        ops.attack_step_(x, z, x, one, one)

    return [
        Example("linf_start", "uniform_start", start("Linf"), _PIXELS, 8, flat=True),
        Example("l2_start", "uniform_start", start("L2"), _PIXELS, 8, counted=False),
        Example("linf_step", "attack_step", step(x), _PIXELS, 16, flat=True),
        Example("linf_step_bf16_grad", "attack_step", step(half), _PIXELS, 14, flat=True),
        Example("l2_step", "attack_step", step(x, "L2"), _PIXELS, 16),
        Example("linf_step_in_place", "attack_step_", in_place, _PIXELS, 16, flat=True),
    ]


def _autoattack() -> list[Example]:
    x, one, numbers = torch.zeros(_SHAPE), torch.ones(()), torch.zeros(_BATCH)

    def apgd(norm: str) -> Callable[[], object]:
        return lambda: ops.apgd_step(x, x, x, x, numbers, eps=one, momentum=0.75, norm=norm)

    def fab(norm: str) -> Callable[[], object]:
        return lambda: ops.fab_step(x, x, x, numbers, norm=norm)

    sample = 4 / _SAMPLE
    return [
        Example("linf_apgd", "apgd_step", apgd("Linf"), _PIXELS, 20 + sample, counted=False),
        Example("l2_apgd", "apgd_step", apgd("L2"), _PIXELS, 20 + sample, counted=False),
        Example("linf_fab", "fab_step", fab("Linf"), _PIXELS, 16 + sample, counted=False),
        Example("l2_fab", "fab_step", fab("L2"), _PIXELS, 16 + sample, counted=False),
    ]


def _logits() -> list[Example]:
    p, target = torch.zeros(_BATCH, _CLASSES), torch.zeros(_BATCH, dtype=torch.int64)

    mixed = ops.MixedLabels(target, target, torch.ones(_BATCH))

    def cross_entropy(labels: ops.Labels = target) -> object:
        return ops.cross_entropy_grad(p, labels)

    labels = 8 / _CLASSES
    return [
        Example("cross_entropy_grad", "cross_entropy_grad", cross_entropy, _LOGITS, 8 + labels),
        Example(
            "cross_entropy_grad_mixed",
            "cross_entropy_grad",
            lambda: cross_entropy(mixed),
            _LOGITS,
            8 + 20 / _CLASSES,
        ),
        Example("kl_grad", "kl_grad", lambda: ops.kl_grad(p, p), _LOGITS, 12),
    ]


def _stem() -> list[Example]:
    x, one = torch.zeros(_SHAPE), torch.ones(())
    grad, weight = torch.zeros(_BATCH, _STEM, _SIDE, _SIDE), torch.zeros(_STEM, _CHANNELS, 3, 3)
    # A channels_last network in bf16 has the gradient and the weight in that order, and the images
    # in the loader's order.
    last = torch.channels_last
    half_grad = grad.bfloat16().contiguous(memory_format=last)
    last_weight = weight.contiguous(memory_format=last)
    whole = 4 * grad.numel() / _PIXELS
    half = whole / 2

    def example(name: str, norm: str, grad: Tensor, weight: Tensor, min_bytes: float) -> Example:
        def launch() -> object:
            return ops.input_grad_step(
                x, x, grad, weight, stride=1, padding=1, eps=one, alpha=one, norm=norm
            )

        return Example(name, "input_grad_step", launch, _PIXELS, min_bytes, counted=False)

    bf16 = "input_grad_bf16_channels_last"
    return [
        example("linf_input_grad", "Linf", grad, weight, 12 + whole),
        example("l2_input_grad", "L2", grad, weight, 4 + whole),
        example(f"linf_{bf16}", "Linf", half_grad, last_weight, 12 + half),
        example(f"l2_{bf16}", "L2", half_grad, last_weight, 4 + half),
    ]


def _loss() -> list[Example]:
    p, target = torch.zeros(_BATCH, _CLASSES), torch.zeros(_BATCH, dtype=torch.int64)
    many, labels_of_many = torch.zeros(_MANY, _CLASSES), torch.zeros(_MANY, dtype=torch.int64)
    one, labels, elements = torch.ones(()), 8 / _CLASSES, _MANY * _CLASSES
    both = 20 / _CLASSES

    mixed = ops.MixedLabels(target, target, torch.ones(_BATCH))

    def small(labels: ops.Labels = target) -> object:
        return ops.local_ball_loss(p, labels, p, p)

    def large() -> object:
        return ops.local_ball_loss(many, labels_of_many, many, many)

    def backward(*labels: Tensor) -> object:
        return torch.ops.engine.local_ball_loss_backward(
            one, p, target, p, p, one, one, 0.0, *labels
        )

    return [
        Example("loss", "local_ball_loss", small, _LOGITS, 12 + labels),
        Example("loss_partial", "local_ball_loss", large, elements, 12 + labels),
        Example("loss_finish", "local_ball_loss", large, elements, 0, position=1),
        Example("loss_backward", "local_ball_loss_backward", backward, _LOGITS, 24 + labels),
        Example("loss_mixed", "local_ball_loss", lambda: small(mixed), _LOGITS, 12 + both),
        Example(
            "loss_backward_mixed",
            "local_ball_loss_backward",
            lambda: backward(*mixed[1:]),
            _LOGITS,
            24 + both,
        ),
    ]


def _data() -> list[Example]:
    x, one = torch.zeros(_SHAPE), torch.ones(())
    rng, index = torch.zeros(2, dtype=torch.int64), torch.zeros(_BATCH, dtype=torch.int64)
    images = torch.zeros(_SHAPE, dtype=torch.uint8)
    memory, crops = images.to(torch.int8), torch.zeros(_BATCH, 3, dtype=torch.int32)
    # Index and crop offsets, bytes an element.
    offsets = (8 + 12) / _SAMPLE

    def augment(memory: Tensor | None = None, **changes: Any) -> Callable[[], object]:
        eps = None if memory is None else one
        return lambda: ops.augment(
            images, index, rng, pad=4, flip=True, memory=memory, eps=eps, **changes
        )

    # A pixel's colours change together: three bytes for each.
    changed = augment(cutmix=True, erase=0.5, jitter=0.4)

    def recall(norm: str) -> Callable[[], object]:
        return lambda: ops.recall(memory, index, crops, x, one, norm=norm)

    def remember() -> None:
        ops.remember(memory, index, crops, x, x, one)

    return [
        Example("augment", "augment", augment(), _PIXELS, 5 + offsets),
        Example("augment_changed", "augment", changed, _PIXELS, 7 + offsets),
        Example("augment_linf_start", "augment", augment(memory), _PIXELS, 10 + offsets),
        Example("linf_recall", "recall", recall("Linf"), _PIXELS, 9 + offsets),
        Example("l2_recall", "recall", recall("L2"), _PIXELS, 9 + offsets),
        Example("remember", "remember", remember, _PIXELS, 9 + offsets),
    ]


def _optimisers() -> list[Example]:
    one = torch.ones(())
    # Nothing runs, so one tensor serves as parameter, gradient, moments and average.
    state = [torch.zeros(_PIXELS)]
    common: dict[str, Any] = {"lr": one, "found_inf": one, "ema_decay": one}

    def sgd() -> None:
        ops.sgd_ema_step(state, state, state, state, weight_decay=[5e-4], **common)

    def adamw() -> None:
        ops.adamw_ema_step(
            state, state, state, state, state, count=one, weight_decay=[5e-4], **common
        )

    def perturb() -> None:
        ops.perturb_weights(state, state, state, gamma=one)

    return [
        Example("perturb", "perturb_weights", perturb, _PIXELS, 16, flat=True, branches=True),
        Example("sgd_ema", "sgd_ema_step", sgd, _PIXELS, 28, flat=True, branches=True),
        Example("adamw_ema", "adamw_ema_step", adamw, _PIXELS, 36, flat=True, branches=True),
    ]
