"""The ops on logits in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def cross_entropy_grad(
    logits: Tensor,
    target: Tensor,
    scale: float,
    second: Tensor | None = None,
    share: Tensor | None = None,
) -> Tensor:
    grad = torch.softmax(_wide(logits), dim=1)
    for labels, part in _parts(target, second, share, grad):
        grad.scatter_add_(1, labels, -part)
    return (grad * scale).to(logits.dtype)


def _parts(
    target: Tensor, second: Tensor | None, share: Tensor | None, like: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of labels int64 [B, 1] and their probabilities [B, 1], in the type of `like`."""
    if second is None or share is None:
        return [(target.view(-1, 1), torch.ones_like(like[:, :1]))]
    # One label twice has the probability 1, without a rounded sum.
    part = torch.where(target == second, 1.0, share.to(like.dtype)).view(-1, 1)
    return [(target.view(-1, 1), part), (second.view(-1, 1), 1.0 - part)]


def kl_grad(p_logits: Tensor, q_logits: Tensor, scale: float) -> Tensor:
    q, p = torch.softmax(_wide(q_logits), dim=1), torch.softmax(_wide(p_logits), dim=1)
    return ((q - p) * scale).to(q_logits.dtype)


def _wide(t: Tensor) -> Tensor:
    """Return `t` in float32 at least: no loss is computed in 16 bits."""
    return t if t.dtype == torch.float64 else t.float()


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
    n = max(adv.shape[0], 1)
    log_a = torch.log_softmax(_wide(adv), dim=1)
    dtype = log_a.dtype
    zero = torch.zeros((), dtype=dtype, device=adv.device)

    def correct(logits: Tensor | None) -> Tensor:
        if logits is None:
            return zero
        return (logits.argmax(dim=1) == target).sum().to(dtype)

    parts = _parts(target, second, share, log_a)
    nll = -sum((part * log_a.gather(1, labels)).sum() for labels, part in parts)
    ce = ((1.0 - label_smoothing) * nll - label_smoothing * log_a.mean(dim=1).sum()) / n
    local = zero if ball is None else _kl(log_a, torch.log_softmax(_wide(ball), dim=1)) / n
    tie = zero if clean is None else _kl(torch.log_softmax(_wide(clean), dim=1), log_a) / n
    loss = ce + lam.to(dtype) * local + mu.to(dtype) * tie
    stats = torch.stack([ce, local, tie, correct(adv), correct(ball), correct(clean)]).detach()
    return loss, stats


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the sum over the batch of KL(p || q)."""
    return (log_p.exp() * (log_p - log_q)).sum()


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
    classes = adv.shape[1]
    log_a = torch.log_softmax(_wide(adv), dim=1)
    a, dtype = log_a.exp(), log_a.dtype
    scale = grad_loss.to(dtype) / max(adv.shape[0], 1)
    wanted = torch.full_like(a, label_smoothing / classes)
    for labels, part in _parts(target, second, share, a):
        wanted.scatter_add_(1, labels, (1.0 - label_smoothing) * part)
    grad_adv = a - wanted
    grad_ball, grad_clean = adv.new_empty(0), adv.new_empty(0)
    if ball is not None:
        log_b = torch.log_softmax(_wide(ball), dim=1)
        gap = log_a - log_b
        grad_adv = grad_adv + lam.to(dtype) * a * (gap - (a * gap).sum(dim=1, keepdim=True))
        grad_ball = (scale * lam.to(dtype) * (log_b.exp() - a)).to(ball.dtype)
    if clean is not None:
        log_c = torch.log_softmax(_wide(clean), dim=1)
        c, gap = log_c.exp(), log_c - log_a
        grad_adv = grad_adv + mu.to(dtype) * (a - c)
        gap = gap - (c * gap).sum(dim=1, keepdim=True)
        grad_clean = (scale * mu.to(dtype) * c * gap).to(clean.dtype)
    return (scale * grad_adv).to(adv.dtype), grad_ball, grad_clean
