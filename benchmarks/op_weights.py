"""Define the cases of the op benchmark that change a network's weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from engine import kernels
from engine.kernels import reference

from . import op_eager
from .op_case import Case, close

SMALL_CNN = [
    (32, 1, 3, 3), (32,), (32, 32, 3, 3), (32,), (64, 32, 3, 3), (64,), (64, 64, 3, 3), (64,),
    (200, 1024), (200,), (200, 200), (200,), (10, 200), (10,),
]  # fmt: skip
FAST_AT = [(16, 1, 4, 4), (16,), (32, 16, 4, 4), (32,), (100, 1568), (100,), (10, 100), (10,)]


def _agree(
    lists: Sequence[list[Tensor]],
    step: Callable[..., object],
    exact: Callable[..., object],
    rest: tuple[Any, ...],
) -> None:
    """Check an optimiser's step against the reference in float64, on copies of `lists`.

    Args:
        rest: what `exact` takes after the lists.
    """
    narrow = [[t.clone() for t in ts] for ts in lists]
    wide = [[t.double() for t in ts] for ts in lists]
    step(*narrow)
    exact(*wide, *rest)
    for ours, theirs in zip(narrow, wide, strict=True):
        for a, e in zip(ours, theirs, strict=True):
            close(a, e)


def sgd_case(label: str, shapes: list[tuple[int, ...]]) -> Case:
    params, grads, momenta, averages = ([torch.randn(s) for s in shapes] for _ in range(4))
    lr, zero, decay = torch.tensor(0.1), torch.tensor(0.0), [5e-4] * len(shapes)
    count = sum(p.numel() for p in params)

    def step(*lists: list[Tensor]) -> None:
        kernels.sgd_ema_step(*lists, lr=lr, found_inf=zero, weight_decay=decay, ema_decay=0.999)

    def check() -> None:
        rest = (lr.double(), zero.double(), 0.9, decay, False, torch.tensor(0.999))
        _agree((params, grads, momenta, averages), step, reference.sgd_ema_step, rest)

    return Case(
        "sgd_ema_step",
        f"{label} ({count} parameters)",
        lambda: step(params, grads, momenta, averages),
        reference.sgd_ema_step,
        (params, grads, momenta, averages, lr, zero, 0.9, decay, False, torch.tensor(0.999)),
        check,
        28 * count,
    )


def adamw_case(label: str, shapes: list[tuple[int, ...]]) -> Case:
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
        scalars = (lr.double(), count.double(), zero.double(), 0.9, 0.999, 1e-8)
        rest = (*scalars, [decay] * len(shapes), torch.tensor(0.999))
        _agree((params, grads, first, second, averages), step, reference.adamw_ema_step, rest)

    return Case(
        "adamw_ema_step",
        f"{label} ({n} parameters)",
        lambda: step(params, grads, first, second, averages),
        eager,
        (),
        check,
        36 * n,
    )


def perturb_cases(label: str, shapes: list[tuple[int, ...]]) -> list[Case]:
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
            close(a, e)
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
