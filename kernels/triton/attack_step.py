"""One projected ascent step, in place of the 8 to 21 launches that separate tensor ops would take."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import flat_tile, on_device, row_tile
from .maths import clip, into_ball, linf_step


def attack_step(
    x: Tensor, z: Tensor, grad: Tensor, eps: Tensor, alpha: Tensor, norm: str
) -> Tensor:
    out = torch.empty_like(x)
    with on_device(x):
        if norm == "Linf":
            n, tile = x.numel(), flat_tile(x.numel())
            linf_step_kernel[(triton.cdiv(n, tile["BLOCK"]),)](
                x, z, grad, out, eps, alpha, n, **tile, enable_fp_fusion=False
            )
        else:
            launch_l2_step(x, z, grad, out, eps, alpha)
    return out


def launch_l2_step(
    x: Tensor, z: Tensor, grad: Tensor, out: Tensor, eps: Tensor, alpha: Tensor
) -> None:
    rows, columns = x.shape[0], x.numel() // max(x.shape[0], 1)
    tile = row_tile(rows, columns, elements=1024, widest=4096, a_thread=16)
    l2_step_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
        x, z, grad, out, eps, alpha, rows, columns, **tile
    )


@triton.jit
def linf_step_kernel(x_ptr, z_ptr, grad_ptr, out_ptr, eps_ptr, alpha_ptr, n, BLOCK: tl.constexpr):
    """One element a lane, all operands in one memory order. Grid: (ceil(n / BLOCK),).

    Args:
        x_ptr, z_ptr, out_ptr: float32 or float64 [n], dense. x: centre; z: iterate; out: next iterate.
        grad_ptr: any float type [n].
        eps_ptr, alpha_ptr: one float each.
        n: elements. 128-bit accesses need n % 16 == 0, which Triton specialises on.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    x = tl.load(x_ptr + offsets, mask=inside)
    z = tl.load(z_ptr + offsets, mask=inside)
    grad = tl.load(grad_ptr + offsets, mask=inside).to(x.dtype)
    eps, alpha = tl.load(eps_ptr).to(x.dtype), tl.load(alpha_ptr).to(x.dtype)
    tl.store(out_ptr + offsets, linf_step(x, z, grad, eps, alpha), mask=inside)


@triton.jit
def l2_step_kernel(
    x_ptr, z_ptr, grad_ptr, out_ptr, eps_ptr, alpha_ptr, rows, columns,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Whole samples a program, BLOCK columns at a time. Grid: (ceil(rows / ROWS),).

    Three walks over the sample: the gradient's length, the perturbation's length, the result. The
    second and third find their operands in cache.

    Args:
        x_ptr, z_ptr, out_ptr: float32 or float64 [rows, columns], row stride `columns`.
        grad_ptr: any float type, the same shape and strides. out may be grad.
        eps_ptr, alpha_ptr: one float each.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    base = row.to(tl.int64) * columns
    lane = tl.arange(0, BLOCK)[None, :]
    dtype = x_ptr.dtype.element_ty
    eps, alpha = tl.load(eps_ptr).to(dtype), tl.load(alpha_ptr).to(dtype)

    squares = tl.zeros((ROWS, BLOCK), dtype)
    for start in range(0, columns, BLOCK):
        inside = (row < rows) & (start + lane < columns)
        grad = tl.load(grad_ptr + base + start + lane, mask=inside, other=0.0).to(dtype)
        squares += grad * grad
    length = tl.sqrt(tl.sum(squares, axis=1, keep_dims=True))
    # A zero, infinite or NaN gradient gives no direction: that sample stays where it is.
    usable = (length > 0) & (length < float("inf"))
    scale = alpha / tl.where(usable, length, 1.0)

    squares = tl.zeros((ROWS, BLOCK), dtype)
    for start in range(0, columns, BLOCK):
        inside = (row < rows) & (start + lane < columns)
        at = base + start + lane
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        z = tl.load(z_ptr + at, mask=inside, other=0.0)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(dtype)
        delta = z + tl.where(usable, grad, 0.0) * scale - x
        squares += delta * delta
    factor = into_ball(tl.sum(squares, axis=1, keep_dims=True), eps)

    for start in range(0, columns, BLOCK):
        inside = (row < rows) & (start + lane < columns)
        at = base + start + lane
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        z = tl.load(z_ptr + at, mask=inside, other=0.0)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(dtype)
        delta = z + tl.where(usable, grad, 0.0) * scale - x
        tl.store(out_ptr + at, clip(x + delta * factor, 0.0, 1.0), mask=inside)
