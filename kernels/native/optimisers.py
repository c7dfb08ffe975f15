"""The optimiser ops on the CPU, in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..layout import same_order
from .binding import DTYPES, address, is_channels_last, native


def sgd_ema_step(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    averages: list[Tensor],
    lr: Tensor,
    found_inf: Tensor,
    momentum: float,
    weight_decay: list[float],
    nesterov: bool,
    ema_decay: Tensor,
) -> None:
    rows, kept = _parameters(params, grads, (momenta,), averages, weight_decay)
    if rows is None:
        return reference.sgd_ema_step(
            params,
            grads,
            momenta,
            averages,
            lr,
            found_inf,
            momentum,
            weight_decay,
            nesterov,
            ema_decay,
        )
    if found_inf.item() == 0:
        native.sgd_ema_step(rows, lr.item(), momentum, 1.0 - ema_decay.item(), nesterov)
    del kept
    return None


def adamw_ema_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    averages: list[Tensor],
    lr: Tensor,
    count: Tensor,
    found_inf: Tensor,
    beta1: float,
    beta2: float,
    adam_eps: float,
    weight_decay: list[float],
    ema_decay: Tensor,
) -> None:
    rows, kept = _parameters(params, grads, (exp_avgs, exp_avg_sqs), averages, weight_decay)
    if rows is None:
        return reference.adamw_ema_step(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            averages,
            lr,
            count,
            found_inf,
            beta1,
            beta2,
            adam_eps,
            weight_decay,
            ema_decay,
        )
    if found_inf.item() == 0:
        rate, n = lr.item(), count.item()
        native.adamw_ema_step(
            rows,
            rate,
            1.0 - beta1,
            beta2,
            1.0 - beta2,
            rate / (1.0 - beta1**n),
            (1.0 - beta2**n) ** 0.5,
            adam_eps,
            1.0 - ema_decay.item(),
        )
    del kept
    return None


def perturb_weights(
    params: list[Tensor], grads: list[Tensor], copies: list[Tensor], gamma: Tensor
) -> None:
    rows, kept = _parameters(params, grads, (copies,), [], [0.0] * len(params))
    if rows is None:
        return reference.perturb_weights(params, grads, copies, gamma)
    native.perturb_weights(rows, gamma.item(), reference.TINY)
    del kept
    return None


def _parameters(
    params: list[Tensor],
    grads: list[Tensor],
    moments: tuple[list[Tensor], ...],
    averages: list[Tensor],
    weight_decay: list[float],
) -> tuple[list[tuple] | None, list[Tensor]]:
    """Return the C++ arguments of each parameter, or None if it does not serve a type or layout.

    The second result holds gradients that were copied into another layout. They must live until the
    kernel has run.
    """
    float32 = torch.float32
    rows: list[tuple] = []
    kept: list[Tensor] = []
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        state = [m[i] for m in moments]
        e = averages[i] if averages else None
        if (
            not (p.is_contiguous() or is_channels_last(p))
            or p.dtype is not float32
            or g.dtype not in DTYPES
            or any(m.dtype is not float32 or not same_order(m, p) for m in state)
            or (e is not None and (e.dtype is not float32 or not same_order(e, p)))
        ):
            return None, kept
        if not same_order(g, p):
            g = torch.empty_like(p, dtype=g.dtype).copy_(g)
            kept.append(g)
        first, second = state[0].data_ptr(), state[1].data_ptr() if len(state) > 1 else 0
        average = 0 if e is None else e.data_ptr()
        rows.append((p.data_ptr(), *address(g), first, second, average, p.numel(), weight_decay[i]))
    return rows, kept
