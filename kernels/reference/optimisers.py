"""The optimiser ops in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


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
    # Select by arithmetic: a branch would make the host wait for the flag.
    go = found_inf == 0
    for p, g, m, decay in zip(params, grads, momenta, weight_decay, strict=True):
        d = g.to(p.dtype) + decay * p
        new_m = momentum * m + d
        step = d + momentum * new_m if nesterov else new_m
        new_p = p - lr.to(p.dtype) * step
        m.copy_(torch.where(go, new_m, m))
        p.copy_(torch.where(go, new_p, p))
    _average(params, averages, go, ema_decay)


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
    go = found_inf == 0
    # Use float64: 1 - beta^n cancels digits.
    corrections = [1.0 - beta ** count.double() for beta in (beta1, beta2)]
    for p, g, m, v, decay in zip(params, grads, exp_avgs, exp_avg_sqs, weight_decay, strict=True):
        d, rate = g.to(p.dtype), lr.to(p.dtype)
        new_m = m + (1.0 - beta1) * (d - m)
        new_v = beta2 * v + (1.0 - beta2) * d * d
        root = corrections[1].sqrt().to(p.dtype)
        size = (lr.double() / corrections[0]).to(p.dtype)
        new_p = (1.0 - rate * decay) * p - size * new_m / (new_v.sqrt() / root + adam_eps)
        m.copy_(torch.where(go, new_m, m))
        v.copy_(torch.where(go, new_v, v))
        p.copy_(torch.where(go, new_p, p))
    _average(params, averages, go, ema_decay)


# Wu et al.'s code adds it to the norm of the gradient.
TINY = 1e-20


def perturb_weights(
    params: list[Tensor], grads: list[Tensor], copies: list[Tensor], gamma: Tensor
) -> None:
    for p, g, c in zip(params, grads, copies, strict=True):
        c.copy_(p)
        g = g.to(p.dtype)
        step = gamma.to(p.dtype) * p.norm() / (g.norm() + TINY)
        # An infinite norm makes a step of 0, but the product with an infinite entry is NaN.
        go = step.isfinite() & g.norm().isfinite()
        p.copy_(torch.where(go, p + step * g, p))


def _average(params: list[Tensor], averages: list[Tensor], go: Tensor, ema_decay: Tensor) -> None:
    for p, e in zip(params, averages, strict=False):
        e.copy_(torch.where(go, e + (1.0 - ema_decay.to(p.dtype)) * (p - e), e))
