"""The ops on logits on the CPU, in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from .binding import DTYPES, address, native


def _logits_served(*logits: Tensor | None) -> bool:
    return all(t is None or (t.dtype in DTYPES and t.is_contiguous()) for t in logits)


def _labels(target: Tensor, second: Tensor | None, share: Tensor | None) -> tuple[int, int, int]:
    """Return the addresses of the labels; 0 for those that are not given."""
    if second is None or share is None:
        return target.data_ptr(), 0, 0
    return target.data_ptr(), second.data_ptr(), share.data_ptr()


def cross_entropy_grad(
    logits: Tensor,
    target: Tensor,
    scale: float,
    second: Tensor | None = None,
    share: Tensor | None = None,
) -> Tensor:
    if not _logits_served(logits):
        return reference.cross_entropy_grad(logits, target, scale, second, share)
    out = torch.empty_like(logits)
    native.cross_entropy_grad(
        *address(logits), *_labels(target, second, share), out.data_ptr(), *logits.shape, scale
    )
    return out


def kl_grad(p_logits: Tensor, q_logits: Tensor, scale: float) -> Tensor:
    if not _logits_served(p_logits, q_logits):
        return reference.kl_grad(p_logits, q_logits, scale)
    out = torch.empty_like(q_logits)
    native.kl_grad(*address(p_logits), *address(q_logits), out.data_ptr(), *q_logits.shape, scale)
    return out


def local_ball_loss(
    adv: Tensor,
    target: Tensor,
    ball: Tensor | None,
    clean: Tensor | None,
    lam: Tensor,
    mu: Tensor,
    label_smoothing: float,
    second: Tensor | None = None,
    share: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if not _logits_served(adv, ball, clean):
        return reference.local_ball_loss(
            adv, target, ball, clean, lam, mu, label_smoothing, second, share
        )
    loss = adv.new_empty((), dtype=torch.float32)
    stats = adv.new_empty(6, dtype=torch.float32)
    native.local_ball_loss(
        *address(adv),
        *_labels(target, second, share),
        *address(ball),
        *address(clean),
        lam.item(),
        mu.item(),
        label_smoothing,
        *adv.shape,
        loss.data_ptr(),
        stats.data_ptr(),
    )
    return loss, stats


def local_ball_loss_backward(
    grad_loss: Tensor,
    adv: Tensor,
    target: Tensor,
    ball: Tensor | None,
    clean: Tensor | None,
    lam: Tensor,
    mu: Tensor,
    label_smoothing: float,
    second: Tensor | None = None,
    share: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if not _logits_served(adv, ball, clean):
        return reference.local_ball_loss_backward(
            grad_loss, adv, target, ball, clean, lam, mu, label_smoothing, second, share
        )
    grad_adv = torch.empty_like(adv)
    grad_ball = adv.new_empty(0) if ball is None else torch.empty_like(ball)
    grad_clean = adv.new_empty(0) if clean is None else torch.empty_like(clean)
    native.local_ball_loss_backward(
        grad_loss.item(),
        *address(adv),
        *_labels(target, second, share),
        *address(ball),
        *address(clean),
        lam.item(),
        mu.item(),
        label_smoothing,
        *adv.shape,
        grad_adv.data_ptr(),
        grad_ball.data_ptr(),
        grad_clean.data_ptr(),
    )
    return grad_adv, grad_ball, grad_clean
