"""Gradients of the attack's losses with respect to the logits, with no loss formed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device, row_tile
from .maths import number, softmax, wide


def _tile(logits: Tensor) -> dict[str, int]:
    rows, classes = logits.shape
    return row_tile(rows, classes, elements=1024)


def cross_entropy_grad(logits: Tensor, target: Tensor, scale: float) -> Tensor:
    out, tile = torch.empty_like(logits), _tile(logits)
    with on_device(logits):
        cross_entropy_grad_kernel[(triton.cdiv(logits.shape[0], tile["ROWS"]),)](
            logits, target, out, scale, *logits.shape, **tile
        )
    return out


def kl_grad(p_logits: Tensor, q_logits: Tensor, scale: float) -> Tensor:
    out, tile = torch.empty_like(q_logits), _tile(q_logits)
    with on_device(q_logits):
        kl_grad_kernel[(triton.cdiv(q_logits.shape[0], tile["ROWS"]),)](
            p_logits, q_logits, out, scale, *q_logits.shape, **tile
        )
    return out


@triton.jit
def cross_entropy_grad_kernel(
    logits_ptr, target_ptr, out_ptr, scale: tl.float64, rows, classes,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """scale (softmax(logits) - onehot(target)). Grid: (ceil(rows / ROWS),).

    Args:
        logits_ptr, out_ptr: any float type [rows, classes], row stride `classes`.
        target_ptr: int64 [rows].
        BLOCK: the next power of two of `classes`.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < classes
    at = row.to(tl.int64) * classes + column
    logits = wide(tl.load(logits_ptr + at, mask=(row < rows) & inside, other=0.0))
    target = tl.load(target_ptr + row, mask=row < rows, other=0)
    grad = softmax(logits, inside) - tl.where(column == target, 1.0, 0.0)
    tl.store(out_ptr + at, grad * number(scale, grad.dtype), mask=(row < rows) & inside)


@triton.jit
def kl_grad_kernel(
    p_ptr, q_ptr, out_ptr, scale: tl.float64, rows, classes,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """scale (softmax(q) - softmax(p)). Grid: (ceil(rows / ROWS),).

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
