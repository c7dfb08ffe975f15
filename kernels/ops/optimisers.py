"""Optimiser steps that also update the weights' moving average, and steps that are undone."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import Scalar, check_scalar
from .define import define

_sgd_ema_step = define(
    "sgd_ema_step",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momenta, Tensor(c!)[] averages, Tensor lr, "
    "Tensor found_inf, float momentum, float[] weight_decay, bool nesterov, "
    "Tensor ema_decay) -> ()",
)
_adamw_ema_step = define(
    "adamw_ema_step",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] averages, Tensor lr, Tensor count, Tensor found_inf, float beta1, float beta2, "
    "float adam_eps, float[] weight_decay, Tensor ema_decay) -> ()",
)


_perturb_weights = define(
    "perturb_weights",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] copies, Tensor gamma) -> ()",
)


@torch.library.register_fake("engine::perturb_weights")
@torch.library.register_fake("engine::sgd_ema_step")
@torch.library.register_fake("engine::adamw_ema_step")
def _(*args):
    return None


def sgd_ema_step(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    averages: list[Tensor],
    *,
    lr: Scalar,
    found_inf: Tensor,
    momentum: float = 0.9,
    weight_decay: list[float],
    nesterov: bool = False,
    ema_decay: Scalar = 0.0,
) -> None:
    """Update weights by momentum SGD, and their moving average, in place, in one pass.

    d = g + wd p;  m = momentum m + d;  p -= lr (d + momentum m if nesterov else m);
    e += (1 - ema_decay) (p - e). If `found_inf` is not 0, nothing changes. This is PyTorch's SGD
    (Sutskever et al., ICML 2013, for Nesterov's form) and an exponential moving average.

    Args:
        params, momenta: float32 tensors; grads: the same shapes, any float dtype. At least one.
        averages: like `params`, or empty for no moving average.
        lr: learning rate, >= 0.
        found_inf: float32 0-d or [1] on the device, the overflow flag of a gradient scaler.
        weight_decay: one number per parameter.
        ema_decay: in [0, 1).
    """
    _check_lists(params, weight_decay, averages, grads=grads, momenta=momenta)
    _sgd_ema_step(
        params,
        grads,
        momenta,
        averages,
        check_scalar("lr", lr, params[0]),
        check_scalar("found_inf", found_inf, params[0]),
        float(momentum),
        [float(d) for d in weight_decay],
        bool(nesterov),
        check_scalar("ema_decay", ema_decay, params[0]),
    )


def adamw_ema_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    averages: list[Tensor],
    *,
    lr: Scalar,
    count: Tensor,
    found_inf: Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    adam_eps: float = 1e-8,
    weight_decay: list[float],
    ema_decay: Scalar = 0.0,
) -> None:
    """Update weights by AdamW, and their moving average, in place, in one pass.

    AdamW is Loshchilov & Hutter's (arXiv 1711.05101), in PyTorch's form:

    m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2;
    p = (1 - lr wd) p - lr / (1 - beta1^n) m / (sqrt(v) / sqrt(1 - beta2^n) + adam_eps);
    e += (1 - ema_decay) (p - e). If `found_inf` is not 0, nothing changes.

    Args:
        params, exp_avgs (m), exp_avg_sqs (v), averages, grads: as for `sgd_ema_step`.
        lr, found_inf, weight_decay, ema_decay: as for `sgd_ema_step`.
        count: float32 0-d on the device, read only: n, the number of this update, from 1.
        betas: (beta1, beta2), each in [0, 1).
    """
    _check_lists(
        params, weight_decay, averages, grads=grads, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs
    )
    first = params[0]
    _adamw_ema_step(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        averages,
        check_scalar("lr", lr, first),
        check_scalar("count", count, first),
        check_scalar("found_inf", found_inf, first),
        float(betas[0]),
        float(betas[1]),
        float(adam_eps),
        [float(d) for d in weight_decay],
        check_scalar("ema_decay", ema_decay, first),
    )


def perturb_weights(
    params: list[Tensor], grads: list[Tensor], copies: list[Tensor], *, gamma: Scalar
) -> None:
    """Copy the weights, then move each tensor along its gradient by a share of its norm, in place.

    c = p;  p += gamma ||p|| / (||g|| + 1e-20) g. This is the ascent step of adversarial weight
    perturbation (Wu, Xia & Wang, arXiv 2004.05884, equation 10, with gamma as in their code). A
    tensor whose step is not finite is copied and stays. `restore_weights` undoes the step.

    Args:
        params, copies: float32 tensors; grads: the same shapes, any float dtype. At least one.
        gamma: size of the step [share of each tensor's L2 norm], >= 0.
    """
    _check_lists(params, [0.0] * len(params), [], grads=grads, copies=copies)
    _perturb_weights(params, grads, copies, check_scalar("gamma", gamma, params[0]))


def restore_weights(params: list[Tensor], copies: list[Tensor]) -> None:
    """Set the weights to their copies, bit for bit, in place.

    PyTorch's own copy of lists serves every device: one launch, at the speed of memory.
    """
    _check_lists(params, [0.0] * len(params), [], copies=copies)
    torch._foreach_copy_(params, copies)


def _check_lists(
    params: list[Tensor],
    weight_decay: list[float],
    averages: list[Tensor],
    **tensors: list[Tensor],
) -> None:
    if not (len(params) > 0):
        raise ValueError("params is empty")
    if averages:
        tensors["averages"] = averages
    lengths = {name: len(values) for name, values in tensors.items()}
    for name, length in (*lengths.items(), ("weight_decay", len(weight_decay))):
        if length != len(params):
            raise ValueError(f"{name} has {length} for {len(params)} params")
    for name, values in tensors.items():
        for p, t in zip(params, values, strict=True):
            if t.shape != p.shape:
                raise ValueError(f"{name}: {tuple(t.shape)} for a {tuple(p.shape)} parameter")
            if t.device != p.device:
                raise ValueError(f"{name}: on {t.device}, parameter on {p.device}")
