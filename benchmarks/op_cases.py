"""Define the cases of the op benchmark: inputs, eager opponents, checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine import kernels
from engine.kernels import backends, reference

from . import op_eager
from .op_eager import ALPHA, EPS

MNIST, CIFAR, LARGE = (256, 1, 28, 28), (128, 3, 32, 32), (2048, 3, 32, 32)


@dataclass
class Case:
    """Hold one op at one shape.

    Attributes:
        op, eager: the same work by the engine's op and by plain PyTorch; `op` takes no arguments,
            `eager` takes `args`.
        check: raises AssertionError unless the op agrees with the reference in float64.
        bytes: the least that must be read and written.
    """

    name: str
    shape: str
    op: Callable[[], object]
    eager: Callable[..., object]
    args: tuple
    check: Callable[[], None]
    bytes: int


def _close(actual: object, expected: object, tolerance: float = 2e-5) -> None:
    actual = actual if isinstance(actual, tuple) else (actual,)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for a, e in zip(actual, expected, strict=True):
        scale = max(1e-6, float(e.abs().max())) if e.numel() else 1.0
        error = float((a.double() - e.double()).abs().max()) if e.numel() else 0.0
        assert error <= tolerance * scale, f"error {error:.2e} against a value of {scale:.2e}"


def _wide(value: object) -> object:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return value


def _against_reference(op: Callable, *args: object, **options: object) -> Callable[[], None]:
    def check() -> None:
        out = op(*args, **options)
        with backends.use("reference"):
            expected = op(*map(_wide, args), **options)
        _close(out, expected)

    return check


def _name(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _pixel_cases(shape: tuple[int, ...]) -> list[Case]:
    b, _, h, _ = shape
    x, name = torch.rand(shape), _name(shape)
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

    def check_augment() -> None:
        out = kernels.augment(data, index, rng, pad=pad, flip=True)[:2]
        with backends.use("reference"):
            expected = kernels.augment(data, index, rng, pad=pad, flip=True)[:2]
        _close(out, expected)

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
            _against_reference(kernels.uniform_start, x, eps, rng),
            2 * size,
        ),
        Case(
            "attack_step",
            name,
            lambda: step(x, z, grad, eps, alpha),
            op_eager.step,
            (x, z, grad, EPS, ALPHA),
            _against_reference(step, x, z, grad, eps, alpha),
            4 * size,
        ),
        Case(
            "attack_step L2",
            name,
            lambda: step(x, z, grad, eps, alpha, norm="L2"),
            reference.attack_step,
            (x, z, grad, eps, alpha, "L2"),
            _against_reference(step, x, z, grad, eps, alpha, norm="L2"),
            4 * size,
        ),
        Case(
            "apgd_step",
            name,
            lambda: kernels.apgd_step(x, z, x, grad, sizes, eps=eps, momentum=0.75),
            reference.apgd_step,
            (x, z, x, grad, sizes, eps, 0.75, "Linf"),
            _against_reference(kernels.apgd_step, x, z, x, grad, sizes, eps=eps, momentum=0.75),
            5 * size,
        ),
        Case(
            "fab_step",
            name,
            lambda: kernels.fab_step(x, z, grad, gaps),
            reference.fab_step,
            (x, z, grad, gaps, "Linf"),
            _against_reference(kernels.fab_step, x, z, grad, gaps),
            4 * size,
        ),
        Case(
            "augment",
            name,
            lambda: kernels.augment(data, index, rng, pad=pad, flip=True),
            op_eager.augment,
            (data, index, pad),
            check_augment,
            size + size // 4,
        ),
        Case(
            "augment with start",
            name,
            lambda: kernels.augment(data, index, rng, pad=pad, flip=True, memory=memory, eps=eps),
            op_eager.augment_with_start,
            (data, index, pad, memory, crops, x, eps),
            check_augment,
            2 * size + size // 2,
        ),
        Case(
            "recall",
            name,
            lambda: kernels.recall(memory, index, crops, x, eps),
            reference.recall,
            (memory, index, crops, x, eps, "Linf"),
            _against_reference(kernels.recall, memory, index, crops, x, eps),
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


def _logit_cases(b: int, classes: int) -> list[Case]:
    adv, ball, clean = 3 * torch.randn(3, b, classes)
    target, name, size = torch.randint(0, classes, (b,)), f"{b}x{classes}", 4 * b * classes
    lam, mu, one = torch.tensor(2.0), torch.tensor(0.5), torch.tensor(1.0)
    loss_args = (adv, target, ball, clean, lam, mu, 0.0)
    forward = torch.ops.engine.local_ball_loss.default
    backward = torch.ops.engine.local_ball_loss_backward.default
    return [
        Case(
            "cross_entropy_grad",
            name,
            lambda: kernels.cross_entropy_grad(adv, target),
            reference.cross_entropy_grad,
            (adv, target, 1.0),
            _against_reference(kernels.cross_entropy_grad, adv, target),
            2 * size + 8 * b,
        ),
        Case(
            "kl_grad",
            name,
            lambda: kernels.kl_grad(adv, ball),
            reference.kl_grad,
            (adv, ball, 1.0),
            _against_reference(kernels.kl_grad, adv, ball),
            3 * size,
        ),
        Case(
            "local_ball_loss",
            name,
            lambda: kernels.local_ball_loss(adv, target, ball, clean, lam=lam, mu=mu),
            reference.local_ball_loss,
            loss_args,
            _against_reference(forward, *loss_args),
            3 * size + 8 * b,
        ),
        Case(
            "local_ball_loss_backward",
            name,
            lambda: backward(one, *loss_args),
            reference.local_ball_loss_backward,
            (one, *loss_args),
            _against_reference(backward, one, *loss_args),
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
        _against_reference(
            kernels.input_grad_step, x, z, gy, weight, **geometry, eps=1.0, alpha=0.5, norm="L2"
        )()

    return Case(
        "input_grad_step",
        f"{label} {_name(x_shape)}",
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
        f"{label} {_name(x_shape)}",
        lambda: kernels.stem_input_grad(gy, weight, **options),
        op_eager.input_grad,
        (x, gy, weight, stride, pad),
        _against_reference(kernels.stem_input_grad, gy, weight, **options),
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
        f"{label} {_name(x_shape)}",
        lambda: kernels.stem_weight_grad(x, gy, **options),
        reference.stem_weight_grad,
        (x, gy, k, k, stride, pad),
        _against_reference(kernels.stem_weight_grad, x, gy, **options),
        4 * (x.numel() + gy.numel()),
    )


def _sgd_case(label: str, shapes: list[tuple[int, ...]]) -> Case:
    params, grads, momenta, averages = ([torch.randn(s) for s in shapes] for _ in range(4))
    lr, zero, decay = torch.tensor(0.1), torch.tensor(0.0), [5e-4] * len(shapes)
    count = sum(p.numel() for p in params)

    def step(*lists: list[Tensor]) -> None:
        kernels.sgd_ema_step(*lists, lr=lr, found_inf=zero, weight_decay=decay, ema_decay=0.999)

    def check() -> None:
        lists = (params, grads, momenta, averages)
        narrow = [[t.clone() for t in ts] for ts in lists]
        wide = [[t.double() for t in ts] for ts in lists]
        step(*narrow)
        rest = (lr.double(), zero.double(), 0.9, decay, False, torch.tensor(0.999))
        arguments: tuple[Any, ...] = (*wide, *rest)
        reference.sgd_ema_step(*arguments)
        for ours, exact in zip(narrow, wide, strict=True):
            for a, e in zip(ours, exact, strict=True):
                _close(a, e)

    return Case(
        "sgd_ema_step",
        f"{label} ({count} parameters)",
        lambda: step(params, grads, momenta, averages),
        reference.sgd_ema_step,
        (params, grads, momenta, averages, lr, zero, 0.9, decay, False, torch.tensor(0.999)),
        check,
        28 * count,
    )


def _adamw_case(label: str, shapes: list[tuple[int, ...]]) -> Case:
    params, grads, first, averages = ([torch.randn(s) for s in shapes] for _ in range(4))
    second = [t.square() for t in first]
    lr, zero, count, decay = torch.tensor(0.01), torch.tensor(0.0), torch.tensor(5.0), 5e-4
    n = sum(p.numel() for p in params)
    foreign = [p.clone().requires_grad_() for p in params]
    for p, g in zip(foreign, grads, strict=True):
        p.grad = g
    optimiser = torch.optim.AdamW(foreign, lr=0.01, weight_decay=decay, fused=True)
    followed = [p.detach().clone() for p in foreign]

    def step(*lists: list[Tensor]) -> None:
        kernels.adamw_ema_step(
            *lists,
            lr=lr,
            count=count,
            found_inf=zero,
            weight_decay=[decay] * len(shapes),
            ema_decay=0.999,
        )

    def eager() -> None:
        optimiser.step()
        torch._foreach_lerp_(followed, [p.detach() for p in foreign], 0.001)

    def check() -> None:
        lists = (params, grads, first, second, averages)
        narrow = [[t.clone() for t in ts] for ts in lists]
        wide = [[t.double() for t in ts] for ts in lists]
        step(*narrow)
        rest = (lr.double(), count.double(), zero.double(), 0.9, 0.999, 1e-8)
        decays = [decay] * len(shapes)
        arguments: tuple[Any, ...] = (*wide, *rest, decays, torch.tensor(0.999))
        reference.adamw_ema_step(*arguments)
        for ours, exact in zip(narrow, wide, strict=True):
            for a, e in zip(ours, exact, strict=True):
                _close(a, e)

    return Case(
        "adamw_ema_step",
        f"{label} ({n} parameters)",
        lambda: step(params, grads, first, second, averages),
        eager,
        (),
        check,
        36 * n,
    )


def _perturb_cases(label: str, shapes: list[tuple[int, ...]]) -> list[Case]:
    params, grads = ([torch.randn(s) for s in shapes] for _ in range(2))
    copies = [torch.empty_like(p) for p in params]
    # No step of this size changes a float32, so the weights stay what they are from call to call.
    gamma, count = torch.tensor(1e-12), sum(p.numel() for p in params)

    def check_perturb() -> None:
        wide = [[t.double() for t in ts] for ts in (params, grads, copies)]
        narrow = [[t.clone() for t in ts] for ts in (params, grads, copies)]
        kernels.perturb_weights(*narrow, gamma=0.01)
        reference.perturb_weights(
            wide[0], wide[1], wide[2], torch.tensor(0.01, dtype=torch.float64)
        )
        for a, e in zip(narrow[0], wide[0], strict=True):
            _close(a, e)
        kernels.restore_weights(narrow[0], narrow[2])
        assert all(torch.equal(a, p) for a, p in zip(narrow[0], params, strict=True))

    name = f"{label} ({count} parameters)"
    return [
        Case(
            "perturb_weights",
            name,
            lambda: kernels.perturb_weights(params, grads, copies, gamma=gamma),
            reference.perturb_weights,
            (params, grads, copies, gamma),
            check_perturb,
            # The norms are read first.
            24 * count,
        ),
        Case(
            "restore_weights",
            name,
            lambda: kernels.restore_weights(params, copies),
            op_eager.restore_weights,
            (params, copies),
            check_perturb,
            8 * count,
        ),
    ]


SMALL_CNN = [
    (32, 1, 3, 3), (32,), (32, 32, 3, 3), (32,), (64, 32, 3, 3), (64,), (64, 64, 3, 3), (64,),
    (200, 1024), (200,), (200, 200), (200,), (10, 200), (10,),
]  # fmt: skip
FAST_AT = [(16, 1, 4, 4), (16,), (32, 16, 4, 4), (32,), (100, 1568), (100,), (10, 100), (10,)]


def cases_on(device: torch.device, quick: bool) -> list[Case]:
    """Every case, its tensors on the device."""
    with device:
        return _cases(quick)


def _cases(quick: bool) -> list[Case]:
    cases = [*_pixel_cases(MNIST), *_pixel_cases(CIFAR), *_logit_cases(256, 10)]
    cases.append(_stem_case("Fast-AT", MNIST, 16, 4, 2, 1))
    cases.append(_stem_case("SmallCNN", MNIST, 32, 3, 1, 0))
    cases.append(_stem_case("ResNet", CIFAR, 64, 3, 1, 1))
    cases.append(_input_case("Fast-AT", MNIST, 16, 4, 2, 1))
    cases.append(_weight_case("Fast-AT", MNIST, 16, 4, 2, 1))
    cases.append(_input_case("SmallCNN", MNIST, 32, 3, 1, 0))
    cases.append(_weight_case("SmallCNN", MNIST, 32, 3, 1, 0))
    cases.append(_input_case("ResNet", CIFAR, 64, 3, 1, 1))
    cases.append(_weight_case("ResNet", CIFAR, 64, 3, 1, 1))
    cases.append(_sgd_case("SmallCNN", SMALL_CNN))
    cases.append(_adamw_case("SmallCNN", SMALL_CNN))
    cases += _perturb_cases("SmallCNN", SMALL_CNN)
    if not quick:
        cases += _logit_cases(128, 100) + _logit_cases(256, 1000)
        cases.append(_sgd_case("Fast-AT", FAST_AT))
        cases.append(_sgd_case("beyond the cache", [(4096, 1024)] * 4))
    beyond = _pixel_cases(LARGE)
    return cases + (beyond[:2] if quick else beyond)
