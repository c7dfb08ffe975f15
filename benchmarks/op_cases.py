"""Define the cases of the op benchmark: inputs, eager opponents, checks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from engine import kernels
from engine.kernels import backends, reference

from . import op_eager
from .op_case import Case, against_reference, close, name_of
from .op_eager import ALPHA, EPS
from .op_weights import FAST_AT, SMALL_CNN, adamw_case, perturb_cases, sgd_case

MNIST, CIFAR, LARGE = (256, 1, 28, 28), (128, 3, 32, 32), (2048, 3, 32, 32)


def _pixel_cases(shape: tuple[int, ...]) -> list[Case]:
    b, _, h, _ = shape
    x, name = torch.rand(shape), name_of(shape)
    z = (x + 0.1 * torch.randn(shape)).clamp(0, 1)
    grad, rng, size = torch.randn(shape), torch.tensor([1, 2]), 4 * x.numel()
    pad = 4 if h == 32 else 2
    n = 2 * b
    data = torch.randint(0, 256, (n, *shape[1:]), dtype=torch.uint8)
    memory = torch.randint(-127, 128, (n, *shape[1:]), dtype=torch.int8)
    index = torch.randperm(n)[:b]
    _, crops, *_ = kernels.augment(data, index, rng, pad=pad, flip=True)
    eps, alpha = torch.tensor(EPS), torch.tensor(ALPHA)
    sizes, gaps = torch.rand(b), 5 * torch.randn(b)

    def check_remember() -> None:
        stored, expected = memory.clone(), memory.clone()
        kernels.remember(stored, index, crops, x, z, EPS)
        reference.remember(expected, index, crops, x, z, eps)
        assert torch.equal(stored, expected)

    step = kernels.attack_step
    return [
        Case(
            "uniform_start",
            name,
            lambda: kernels.uniform_start(x, eps, rng),
            op_eager.start,
            (x, EPS),
            against_reference(kernels.uniform_start, x, eps, rng),
            2 * size,
        ),
        Case(
            "attack_step",
            name,
            lambda: step(x, z, grad, eps, alpha),
            op_eager.step,
            (x, z, grad, EPS, ALPHA),
            against_reference(step, x, z, grad, eps, alpha),
            4 * size,
        ),
        Case(
            "attack_step L2",
            name,
            lambda: step(x, z, grad, eps, alpha, norm="L2"),
            reference.attack_step,
            (x, z, grad, eps, alpha, "L2"),
            against_reference(step, x, z, grad, eps, alpha, norm="L2"),
            4 * size,
        ),
        Case(
            "apgd_step",
            name,
            lambda: kernels.apgd_step(x, z, x, grad, sizes, eps=eps, momentum=0.75),
            reference.apgd_step,
            (x, z, x, grad, sizes, eps, 0.75, "Linf"),
            against_reference(kernels.apgd_step, x, z, x, grad, sizes, eps=eps, momentum=0.75),
            5 * size,
        ),
        Case(
            "fab_step",
            name,
            lambda: kernels.fab_step(x, z, grad, gaps),
            reference.fab_step,
            (x, z, grad, gaps, "Linf"),
            against_reference(kernels.fab_step, x, z, grad, gaps),
            4 * size,
        ),
        Case(
            "recall",
            name,
            lambda: kernels.recall(memory, index, crops, x, eps),
            reference.recall,
            (memory, index, crops, x, eps, "Linf"),
            against_reference(kernels.recall, memory, index, crops, x, eps),
            2 * size + size // 4,
        ),
        Case(
            "remember",
            name,
            lambda: kernels.remember(memory, index, crops, x, z, eps),
            reference.remember,
            (memory, index, crops, x, z, eps),
            check_remember,
            2 * size + size // 4,
        ),
    ]


def _augment_cases(shape: tuple[int, ...]) -> list[Case]:
    b, c, h, _ = shape
    name, rng, size = name_of(shape), torch.tensor([1, 2]), 4 * math.prod(shape)
    pad, eps = 4 if h == 32 else 2, torch.tensor(EPS)
    data = torch.randint(0, 256, (2 * b, *shape[1:]), dtype=torch.uint8)
    memory = torch.randint(-127, 128, data.shape, dtype=torch.int8)
    index, x = torch.randperm(2 * b)[:b], torch.rand(shape)
    crops = kernels.augment(data, index, rng, pad=pad, flip=True).crops

    def case(label: str, eager: Callable, args: tuple, read: int, **options: Any) -> Case:
        def op() -> kernels.Augmented:
            return kernels.augment(data, index, rng, pad=pad, flip=True, **options)

        def check() -> None:
            made = op()
            with backends.use("reference"):
                expected = op()
            for ours, theirs in zip(made, expected, strict=True):
                assert (ours is None) == (theirs is None)
                if ours is not None:
                    close(ours, theirs)

        return Case(label, name, op, eager, (data, index, pad, *args), check, read)

    plain, most = size + size // 4, 0.4
    start = {"memory": memory, "eps": eps}
    cases = [
        case("augment", op_eager.augment, (), plain),
        case(
            "augment with start",
            op_eager.augment_with_start,
            (memory, crops, x, eps),
            2 * size + size // 2,
            **start,
        ),
        case("augment with cutmix", op_eager.cutmix, (), plain, cutmix=True),
        case("augment with erase", op_eager.erase, (0.25,), plain, erase=0.25),
    ]
    if c == 3:
        cases.append(case("augment with jitter", op_eager.jitter, (most,), plain, jitter=most))
    return cases


def _logit_cases(b: int, classes: int) -> list[Case]:
    adv, ball, clean = 3 * torch.randn(3, b, classes)
    target, name, size = torch.randint(0, classes, (b,)), f"{b}x{classes}", 4 * b * classes
    lam, mu, one = torch.tensor(2.0), torch.tensor(0.5), torch.tensor(1.0)
    loss_args = (adv, target, ball, clean, lam, mu, 0.0)
    second, share = torch.randint(0, classes, (b,)), 0.5 + 0.5 * torch.rand(b)
    mixed = kernels.MixedLabels(target, second, share)
    forward = torch.ops.engine.local_ball_loss.default
    backward = torch.ops.engine.local_ball_loss_backward.default
    return [
        Case(
            "cross_entropy_grad",
            name,
            lambda: kernels.cross_entropy_grad(adv, target),
            reference.cross_entropy_grad,
            (adv, target, 1.0),
            against_reference(kernels.cross_entropy_grad, adv, target),
            2 * size + 8 * b,
        ),
        Case(
            "cross_entropy_grad mixed",
            name,
            lambda: kernels.cross_entropy_grad(adv, mixed),
            reference.cross_entropy_grad,
            (adv, target, 1.0, second, share),
            against_reference(kernels.cross_entropy_grad, adv, mixed),
            2 * size + 20 * b,
        ),
        Case(
            "kl_grad",
            name,
            lambda: kernels.kl_grad(adv, ball),
            reference.kl_grad,
            (adv, ball, 1.0),
            against_reference(kernels.kl_grad, adv, ball),
            3 * size,
        ),
        Case(
            "local_ball_loss",
            name,
            lambda: kernels.local_ball_loss(adv, target, ball, clean, lam=lam, mu=mu),
            reference.local_ball_loss,
            loss_args,
            against_reference(forward, *loss_args),
            3 * size + 8 * b,
        ),
        Case(
            "local_ball_loss mixed",
            name,
            lambda: kernels.local_ball_loss(adv, mixed, ball, clean, lam=lam, mu=mu),
            reference.local_ball_loss,
            (*loss_args, second, share),
            against_reference(forward, *loss_args, second, share),
            3 * size + 20 * b,
        ),
        Case(
            "local_ball_loss_backward",
            name,
            lambda: backward(one, *loss_args),
            reference.local_ball_loss_backward,
            (one, *loss_args),
            against_reference(backward, one, *loss_args),
            6 * size + 8 * b,
        ),
    ]


def _stem_case(
    label: str, x_shape: tuple[int, ...], out: int, k: int, stride: int, pad: int
) -> Case:
    b, c, h, _ = x_shape
    side = (h + 2 * pad - k) // stride + 1
    x = torch.rand(x_shape)
    z = (x + 0.05 * torch.randn(x_shape)).clamp(0, 1)
    gy, weight = 1e-3 * torch.randn(b, out, side, side), 0.2 * torch.randn(out, c, k, k)
    geometry: dict[str, Any] = {"stride": stride, "padding": pad}

    def check() -> None:
        # L2 compares the gradient; Linf would compare signs, which rounding may flip near 0.
        against_reference(
            kernels.input_grad_step, x, z, gy, weight, **geometry, eps=1.0, alpha=0.5, norm="L2"
        )()

    return Case(
        "input_grad_step",
        f"{label} {name_of(x_shape)}",
        lambda: kernels.input_grad_step(x, z, gy, weight, **geometry, eps=EPS, alpha=ALPHA),
        op_eager.input_grad_step,
        (x, z, gy, weight, stride, pad),
        check,
        4 * (3 * x.numel() + gy.numel()),
    )


def _input_case(
    label: str, x_shape: tuple[int, ...], out: int, k: int, stride: int, pad: int
) -> Case:
    b, c, h, _ = x_shape
    side = (h + 2 * pad - k) // stride + 1
    gy = torch.randn(b, out, side, side).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(out, c, k, k)
    options: dict[str, Any] = {"size": (h, h), "stride": stride, "padding": pad}
    x = torch.rand(x_shape)
    return Case(
        "stem_input_grad",
        f"{label} {name_of(x_shape)}",
        lambda: kernels.stem_input_grad(gy, weight, **options),
        op_eager.input_grad,
        (x, gy, weight, stride, pad),
        against_reference(kernels.stem_input_grad, gy, weight, **options),
        4 * (x.numel() + gy.numel()),
    )


def _weight_case(
    label: str, x_shape: tuple[int, ...], out: int, k: int, stride: int, pad: int
) -> Case:
    b, _, h, _ = x_shape
    side = (h + 2 * pad - k) // stride + 1
    last = torch.channels_last
    x, gy = torch.rand(x_shape), torch.randn(b, out, side, side).contiguous(memory_format=last)
    options: dict[str, Any] = {"kernel": (k, k), "stride": stride, "padding": pad}
    return Case(
        "stem_weight_grad",
        f"{label} {name_of(x_shape)}",
        lambda: kernels.stem_weight_grad(x, gy, **options),
        reference.stem_weight_grad,
        (x, gy, k, k, stride, pad),
        against_reference(kernels.stem_weight_grad, x, gy, **options),
        4 * (x.numel() + gy.numel()),
    )


def cases_on(device: torch.device, quick: bool) -> list[Case]:
    """Every case, its tensors on the device."""
    with device:
        return _cases(quick)


def _cases(quick: bool) -> list[Case]:
    cases: list[Case] = []
    for shape in (MNIST, CIFAR):
        cases += _pixel_cases(shape) + _augment_cases(shape)
    cases += _logit_cases(256, 10)
    cases.append(_stem_case("Fast-AT", MNIST, 16, 4, 2, 1))
    cases.append(_stem_case("SmallCNN", MNIST, 32, 3, 1, 0))
    cases.append(_stem_case("ResNet", CIFAR, 64, 3, 1, 1))
    cases.append(_input_case("Fast-AT", MNIST, 16, 4, 2, 1))
    cases.append(_weight_case("Fast-AT", MNIST, 16, 4, 2, 1))
    cases.append(_input_case("SmallCNN", MNIST, 32, 3, 1, 0))
    cases.append(_weight_case("SmallCNN", MNIST, 32, 3, 1, 0))
    cases.append(_input_case("ResNet", CIFAR, 64, 3, 1, 1))
    cases.append(_weight_case("ResNet", CIFAR, 64, 3, 1, 1))
    cases.append(sgd_case("SmallCNN", SMALL_CNN))
    cases.append(adamw_case("SmallCNN", SMALL_CNN))
    cases += perturb_cases("SmallCNN", SMALL_CNN)
    if not quick:
        cases += _logit_cases(128, 100) + _logit_cases(256, 1000)
        cases.append(sgd_case("Fast-AT", FAST_AT))
        cases.append(sgd_case("beyond the cache", [(4096, 1024)] * 4))
    beyond = _pixel_cases(LARGE) + ([] if quick else _augment_cases(LARGE))
    return cases + (beyond[:2] if quick else beyond)
