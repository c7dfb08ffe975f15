"""The loss CE(adv) + lam KL(adv || ball) + mu KL(clean || adv), its counts and its gradients."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device, row_tile
from .maths import is_argmax, kl, log_softmax, number, softmax, wide

# One program sums up to this many tiles, in order. For more tiles, programs share the rows and a
# second kernel adds their partial sums, also in order: the result never depends on timing.
_TILES_IN_ONE_PROGRAM = 16
_MOST_PROGRAMS = 1024


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
    dtype = torch.float64 if adv.dtype == torch.float64 else torch.float32
    loss, stats = adv.new_empty((), dtype=dtype), adv.new_empty(6, dtype=dtype)
    tile = _tile(adv)
    tiles = triton.cdiv(adv.shape[0], tile["ROWS"])
    programs = 1 if tiles <= _TILES_IN_ONE_PROGRAM else min(tiles, _MOST_PROGRAMS)
    with on_device(adv):
        if programs == 1:
            loss_kernel[(1,)](
                adv, target, second, share, ball, clean, lam, mu, loss, stats, None,
                label_smoothing, *adv.shape, **tile,
            )  # fmt: skip
        else:
            partial = adv.new_empty((6, programs), dtype=dtype)
            loss_kernel[(programs,)](
                adv, target, second, share, ball, clean, lam, mu, loss, stats, partial,
                label_smoothing, *adv.shape, **tile,
            )  # fmt: skip
            finish_loss_kernel[(1,)](
                partial, lam, mu, loss, stats, adv.shape[0], programs,
                BLOCK=triton.next_power_of_2(programs), num_warps=4,
            )  # fmt: skip
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
    grad_adv = torch.empty_like(adv)
    grad_ball = adv.new_empty(0) if ball is None else torch.empty_like(ball)
    grad_clean = adv.new_empty(0) if clean is None else torch.empty_like(clean)
    tile = _tile(adv)
    with on_device(adv):
        loss_backward_kernel[(triton.cdiv(adv.shape[0], tile["ROWS"]),)](
            grad_loss, adv, target, second, share, ball, clean, lam, mu,
            grad_adv, grad_ball, grad_clean,
            label_smoothing, *adv.shape, **tile,
        )  # fmt: skip
    return grad_adv, grad_ball, grad_clean


def _tile(adv: Tensor) -> dict[str, int]:
    rows, classes = adv.shape
    # The logits of three passes are in registers at once.
    return row_tile(rows, classes, elements=2048, a_thread=4)


@triton.jit
def _write(loss_ptr, stats_ptr, lam_ptr, mu_ptr, ce, local, tie, right_a, right_b, right_c, rows):
    """Write the loss and its six statistics from the sums over the batch."""
    n = tl.maximum(tl.cast(rows, tl.int32), 1).to(ce.dtype)
    ce, local, tie = ce / n, local / n, tie / n
    lam, mu = tl.load(lam_ptr).to(ce.dtype), tl.load(mu_ptr).to(ce.dtype)
    tl.store(loss_ptr, ce + lam * local + mu * tie)
    tl.store(stats_ptr, ce)
    tl.store(stats_ptr + 1, local)
    tl.store(stats_ptr + 2, tie)
    tl.store(stats_ptr + 3, right_a)
    tl.store(stats_ptr + 4, right_b)
    tl.store(stats_ptr + 5, right_c)


@triton.jit
def _second(second_ptr, share_ptr, row, live, target, dtype: tl.constexpr):
    """Load the second labels of mixed ones, and the probability of the first; 1 if both are one."""
    second = tl.load(second_ptr + row, mask=live, other=0)
    part = tl.load(share_ptr + row, mask=live, other=1.0).to(dtype)
    return second, tl.where(second == target, 1.0, part)


@triton.jit
def loss_kernel(
    adv_ptr, target_ptr, second_ptr, share_ptr, ball_ptr, clean_ptr, lam_ptr, mu_ptr,
    loss_ptr, stats_ptr, partial_ptr,
    label_smoothing: tl.float64, rows, classes,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum the loss over tiles i, i + programs, ... of ROWS rows in program i. Grid: (programs,).

    Args:
        adv_ptr: any float type [rows, classes], row stride `classes`.
        ball_ptr, clean_ptr: like adv, or None without that term.
        target_ptr: int64 [rows]; second_ptr, share_ptr: for mixed labels int64 [rows] and float
            [rows], else None; lam_ptr, mu_ptr: one float each.
        loss_ptr: [1] and stats_ptr: [6], float32 (float64 for float64 logits).
        partial_ptr: [6, programs] sums for `finish_loss_kernel`, or None in a single program, which
            writes loss and stats itself.
        BLOCK: the next power of two of `classes`.
    """
    dtype: tl.constexpr = loss_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < classes
    smooth = number(label_smoothing, dtype)
    sharp = number(1.0 - label_smoothing, dtype)
    ce, local, tie = tl.zeros((ROWS,), dtype), tl.zeros((ROWS,), dtype), tl.zeros((ROWS,), dtype)
    right_a, right_b = tl.zeros((ROWS,), dtype), tl.zeros((ROWS,), dtype)
    right_c = tl.zeros((ROWS,), dtype)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        live = row < rows
        at = row.to(tl.int64)[:, None] * classes + column
        # Rows past the end read as zeros: their terms are finite, and the sums drop them.
        mask = live[:, None] & inside
        target = tl.load(target_ptr + row, mask=live, other=0)[:, None]
        adv = wide(tl.load(adv_ptr + at, mask=mask, other=0.0))
        log_a = log_softmax(adv, inside)
        nll = -tl.sum(tl.where(column == target, log_a, 0.0), axis=1)
        if second_ptr is not None:
            second, part = _second(
                second_ptr, share_ptr, row[:, None], live[:, None], target, dtype
            )
            rest = -tl.sum(tl.where(column == second, log_a, 0.0), axis=1)
            part = tl.sum(part, axis=1)
            nll = part * nll + (1.0 - part) * rest
        mean = tl.sum(tl.where(inside, log_a, 0.0), axis=1) / classes
        ce += tl.where(live, sharp * nll - smooth * mean, 0.0)
        right_a += tl.where(live, is_argmax(adv, column, target, inside), 0.0)
        if ball_ptr is not None:
            ball = wide(tl.load(ball_ptr + at, mask=mask, other=0.0))
            local += tl.where(live, kl(log_a, log_softmax(ball, inside), inside), 0.0)
            right_b += tl.where(live, is_argmax(ball, column, target, inside), 0.0)
        if clean_ptr is not None:
            clean = wide(tl.load(clean_ptr + at, mask=mask, other=0.0))
            tie += tl.where(live, kl(log_softmax(clean, inside), log_a, inside), 0.0)
            right_c += tl.where(live, is_argmax(clean, column, target, inside), 0.0)
    ce, local, tie = tl.sum(ce, axis=0), tl.sum(local, axis=0), tl.sum(tie, axis=0)
    right_a, right_b = tl.sum(right_a, axis=0), tl.sum(right_b, axis=0)
    right_c = tl.sum(right_c, axis=0)
    if partial_ptr is None:
        _write(
            loss_ptr, stats_ptr, lam_ptr, mu_ptr, ce, local, tie, right_a, right_b, right_c, rows
        )
    else:
        here, programs = partial_ptr + tl.program_id(0), tl.num_programs(0)
        tl.store(here, ce)
        tl.store(here + programs, local)
        tl.store(here + 2 * programs, tie)
        tl.store(here + 3 * programs, right_a)
        tl.store(here + 4 * programs, right_b)
        tl.store(here + 5 * programs, right_c)


@triton.jit
def _total(partial_ptr, term, programs, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    return tl.sum(tl.load(partial_ptr + term * programs + i, mask=i < programs, other=0.0), axis=0)


@triton.jit
def finish_loss_kernel(
    partial_ptr, lam_ptr, mu_ptr, loss_ptr, stats_ptr, rows, programs, BLOCK: tl.constexpr
):
    """Add the partial sums of `loss_kernel`. Grid: (1,).

    Args:
        partial_ptr: [6, programs]; loss_ptr: [1]; stats_ptr: [6]; all of one float type.
        lam_ptr, mu_ptr: one float each; rows: batch size.
    """
    ce = _total(partial_ptr, 0, programs, BLOCK)
    local = _total(partial_ptr, 1, programs, BLOCK)
    tie = _total(partial_ptr, 2, programs, BLOCK)
    right_a = _total(partial_ptr, 3, programs, BLOCK)
    right_b = _total(partial_ptr, 4, programs, BLOCK)
    right_c = _total(partial_ptr, 5, programs, BLOCK)
    _write(loss_ptr, stats_ptr, lam_ptr, mu_ptr, ce, local, tie, right_a, right_b, right_c, rows)


@triton.jit
def loss_backward_kernel(
    grad_loss_ptr, adv_ptr, target_ptr, second_ptr, share_ptr, ball_ptr, clean_ptr, lam_ptr, mu_ptr,
    grad_adv_ptr, grad_ball_ptr, grad_clean_ptr,
    label_smoothing: tl.float64, rows, classes,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute all three gradients from the logits. Grid: (ceil(rows / ROWS),).

    The forward pass saves only the logits.

    Args:
        grad_loss_ptr: one float, the gradient that reaches the loss.
        grad_adv_ptr, grad_ball_ptr, grad_clean_ptr: like the logits of the same name; nothing is
            written for logits that are None.
        The rest: as for `loss_kernel`.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < classes
    mask = (row < rows) & inside
    at = row.to(tl.int64) * classes + column
    target = tl.load(target_ptr + row, mask=row < rows, other=0)
    log_a = log_softmax(wide(tl.load(adv_ptr + at, mask=mask, other=0.0)), inside)
    a = tl.exp(log_a)
    dtype: tl.constexpr = log_a.dtype
    scale = tl.load(grad_loss_ptr).to(dtype) / rows
    smooth, sharp = number(label_smoothing, dtype), number(1.0 - label_smoothing, dtype)
    wanted = tl.where(column == target, sharp, 0.0)
    if second_ptr is not None:
        second, part = _second(second_ptr, share_ptr, row, row < rows, target, dtype)
        wanted = part * wanted + (1.0 - part) * tl.where(column == second, sharp, 0.0)
    grad_adv = a - (smooth / classes + wanted)
    if ball_ptr is not None:
        lam = tl.load(lam_ptr).to(dtype)
        log_b = log_softmax(wide(tl.load(ball_ptr + at, mask=mask, other=0.0)), inside)
        gap = log_a - log_b
        mean = tl.sum(tl.where(inside, a * gap, 0.0), axis=1, keep_dims=True)
        grad_adv += lam * a * (gap - mean)
        tl.store(grad_ball_ptr + at, scale * lam * (tl.exp(log_b) - a), mask=mask)
    if clean_ptr is not None:
        mu = tl.load(mu_ptr).to(dtype)
        log_c = log_softmax(wide(tl.load(clean_ptr + at, mask=mask, other=0.0)), inside)
        c, gap = tl.exp(log_c), log_c - log_a
        mean = tl.sum(tl.where(inside, c * gap, 0.0), axis=1, keep_dims=True)
        grad_adv += mu * (a - c)
        tl.store(grad_clean_ptr + at, scale * mu * c * (gap - mean), mask=mask)
    tl.store(grad_adv_ptr + at, scale * grad_adv, mask=mask)


def _gradient_tile(logits: Tensor) -> dict[str, int]:
    rows, classes = logits.shape
    return row_tile(rows, classes, elements=1024)


def cross_entropy_grad(
    logits: Tensor,
    target: Tensor,
    scale: float,
    second: Tensor | None = None,
    share: Tensor | None = None,
) -> Tensor:
    out, tile = torch.empty_like(logits), _gradient_tile(logits)
    with on_device(logits):
        cross_entropy_grad_kernel[(triton.cdiv(logits.shape[0], tile["ROWS"]),)](
            logits, target, second, share, out, scale, *logits.shape, **tile
        )
    return out


def kl_grad(p_logits: Tensor, q_logits: Tensor, scale: float) -> Tensor:
    out, tile = torch.empty_like(q_logits), _gradient_tile(q_logits)
    with on_device(q_logits):
        kl_grad_kernel[(triton.cdiv(q_logits.shape[0], tile["ROWS"]),)](
            p_logits, q_logits, out, scale, *q_logits.shape, **tile
        )
    return out


@triton.jit
def cross_entropy_grad_kernel(
    logits_ptr, target_ptr, second_ptr, share_ptr, out_ptr, scale: tl.float64, rows, classes,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute scale (softmax(logits) - onehot(target)). Grid: (ceil(rows / ROWS),).

    Args:
        logits_ptr, out_ptr: any float type [rows, classes], row stride `classes`.
        target_ptr: int64 [rows]; second_ptr, share_ptr: as for `loss_kernel`.
        BLOCK: the next power of two of `classes`.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < classes
    at = row.to(tl.int64) * classes + column
    logits = wide(tl.load(logits_ptr + at, mask=(row < rows) & inside, other=0.0))
    target = tl.load(target_ptr + row, mask=row < rows, other=0)
    label = tl.where(column == target, 1.0, 0.0).to(logits.dtype)
    if second_ptr is not None:
        second, part = _second(second_ptr, share_ptr, row, row < rows, target, logits.dtype)
        label = part * label + (1.0 - part) * tl.where(column == second, 1.0, 0.0)
    grad = softmax(logits, inside) - label
    tl.store(out_ptr + at, grad * number(scale, grad.dtype), mask=(row < rows) & inside)


@triton.jit
def kl_grad_kernel(
    p_ptr, q_ptr, out_ptr, scale: tl.float64, rows, classes,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute scale (softmax(q) - softmax(p)). Grid: (ceil(rows / ROWS),).

    Args:
        p_ptr, q_ptr, out_ptr: any float type [rows, classes], row stride `classes`.
        BLOCK: the next power of two of `classes`.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < classes
    at = row.to(tl.int64) * classes + column
    p = wide(tl.load(p_ptr + at, mask=(row < rows) & inside, other=0.0))
    q = wide(tl.load(q_ptr + at, mask=(row < rows) & inside, other=0.0))
    grad = softmax(q, inside) - softmax(p, inside)
    tl.store(out_ptr + at, grad * number(scale, grad.dtype), mask=(row < rows) & inside)
