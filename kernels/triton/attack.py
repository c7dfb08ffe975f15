"""The random start of an attack and its projected step, one launch each.

Separate tensor ops would need 8 to 21 launches for a step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import philox
from .launch import flat_tile, on_device, row_tile
from .maths import box_muller, clip, into_ball, linf_step


def attack_step(
    x: Tensor, z: Tensor, grad: Tensor, eps: Tensor, alpha: Tensor, norm: str
) -> Tensor:
    out = torch.empty_like(x)
    _launch(x, z, grad, out, eps, alpha, norm)
    return out


def attack_step_(x: Tensor, z: Tensor, grad: Tensor, eps: Tensor, alpha: Tensor, norm: str) -> None:
    _launch(x, z, grad, z, eps, alpha, norm)


def _launch(
    x: Tensor, z: Tensor, grad: Tensor, out: Tensor, eps: Tensor, alpha: Tensor, norm: str
) -> None:
    with on_device(x):
        if norm == "L2":
            launch_l2_step(x, z, grad, out, eps, alpha)
            return
        n, tile = x.numel(), flat_tile(x.numel())
        linf_step_kernel[(triton.cdiv(n, tile["BLOCK"]),)](
            x, z, grad, out, eps, alpha, n, **tile, enable_fp_fusion=False
        )


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
    """Take the Linf step: one element a lane. Grid: (ceil(n / BLOCK),).

    All operands have one memory order.

    Args:
        x_ptr, z_ptr, out_ptr: float32 or float64 [n], dense. x: centre; z: point; out: next point,
            may be z.
        grad_ptr: any float type [n].
        eps_ptr, alpha_ptr: one float each.
        n: elements. Triton specialises on n % 16 == 0, which 128-bit accesses need.
    """
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    x = tl.load(x_ptr + offsets, mask=inside)
    z = tl.load(z_ptr + offsets, mask=inside)
    grad = tl.load(grad_ptr + offsets, mask=inside).to(x.dtype)
    eps, alpha = tl.load(eps_ptr).to(x.dtype), tl.load(alpha_ptr).to(x.dtype)
    moved = linf_step(x, z, grad, eps, alpha)
    tl.store(out_ptr + offsets, moved, mask=inside)


@triton.jit
def l2_step_kernel(
    x_ptr, z_ptr, grad_ptr, out_ptr, eps_ptr, alpha_ptr, rows, columns,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Take the L2 step. Grid: (ceil(rows / ROWS),).

    A program holds whole samples, BLOCK columns at a time. It passes over the sample three times,
    for the gradient's length, the perturbation's length and the result. The second and third pass
    find their operands in cache.

    Args:
        x_ptr, z_ptr, out_ptr: float32 or float64 [rows, columns], row stride `columns`.
        grad_ptr: any float type, the same shape and strides. out may be grad, or z.
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
    # A zero, infinite or NaN gradient gives no direction: that sample does not move.
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
        moved = clip(x + delta * factor, 0.0, 1.0)
        tl.store(out_ptr + at, moved, mask=inside)


def uniform_start(x: Tensor, eps: Tensor, rng: Tensor, norm: str, stream: int) -> Tensor:
    out, n = torch.empty_like(x), x.numel()
    with on_device(x):
        if norm == "Linf":
            tile = flat_tile(n)
            linf_start_kernel[(triton.cdiv(n, tile["BLOCK"]),)](
                x, out, eps, rng, stream, n, **tile, enable_fp_fusion=False
            )
        else:
            rows, columns = x.shape[0], n // max(x.shape[0], 1)
            # A row may begin and end within a block of four words.
            tile = row_tile(rows, max(columns, 4), elements=1024, widest=2048)
            l2_start_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
                x, out, eps, rng, stream, rows, columns, **tile
            )
    return out


@triton.jit(do_not_specialize=["stream"])
def linf_start_kernel(x_ptr, out_ptr, eps_ptr, rng_ptr, stream, n, BLOCK: tl.constexpr):
    """Draw from the Linf ball, one Philox block for each four elements. Grid: (ceil(n / BLOCK),).

    Args:
        x_ptr, out_ptr: float32 or float64 [n], dense, one memory order.
        eps_ptr: one float; rng_ptr: int64 [2]; stream: second counter word.
        n: elements. Triton specialises on n % 16 == 0, which 128-bit accesses need.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK
    block = first // 4 + tl.arange(0, BLOCK // 4)
    w0, w1, w2, w3 = philox.words(rng_ptr, stream, block)
    offsets = first + tl.arange(0, BLOCK)
    inside = offsets < n
    x = tl.load(x_ptr + offsets, mask=inside)
    u = philox.uniform(philox.in_order(w0, w1, w2, w3), x.dtype)
    delta = (2.0 * u - 1.0) * tl.load(eps_ptr).to(x.dtype)
    tl.store(out_ptr + offsets, clip(x + delta, 0.0, 1.0), mask=inside)


@triton.jit
def _normals(rng_ptr, stream, block, n, dtype: tl.constexpr):
    """Return standard normals for elements 4 block .. 4 block + 3, side by side."""
    w0, w1, w2, w3 = philox.words(rng_ptr, stream, block)
    # In the reference, an odd last element is paired with the word 0.
    w1 = tl.where(4 * block + 1 < n, w1, 0)
    w3 = tl.where(4 * block + 3 < n, w3, 0)
    a, b = box_muller(philox.uniform(w0, dtype), philox.uniform(w1, dtype))
    c, d = box_muller(philox.uniform(w2, dtype), philox.uniform(w3, dtype))
    return philox.in_order(a, b, c, d)


@triton.jit(do_not_specialize=["stream"])
def l2_start_kernel(
    x_ptr, out_ptr, eps_ptr, rng_ptr, stream, rows, columns,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Draw from the L2 ball: a normal direction, a radius u^(1/D). Grid: (ceil(rows / ROWS),).

    A program holds whole samples. It draws the numbers twice, for the length and for the result:
    that costs less than storing them.

    Args:
        x_ptr, out_ptr: float32 or float64 [rows, columns], row stride `columns`.
        eps_ptr: one float; rng_ptr: int64 [2]; stream: second counter word.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    begin = row.to(tl.int64) * columns
    n = tl.cast(rows, tl.int64) * columns
    block = begin // 4 + tl.arange(0, BLOCK // 4)[None, :]
    element = (begin // 4) * 4 + tl.arange(0, BLOCK)[None, :]
    dtype = x_ptr.dtype.element_ty

    squares = tl.zeros((ROWS, BLOCK), dtype)
    for start in range(0, columns + 3, BLOCK):
        at = element + start
        inside = (row < rows) & (at >= begin) & (at < begin + columns)
        normal = _normals(rng_ptr, stream, block + start // 4, n, dtype)
        squares += tl.where(inside, normal * normal, 0.0)
    length = tl.maximum(tl.sqrt(tl.sum(squares, axis=1, keep_dims=True)), 1e-12)

    r0, r1, r2, r3 = philox.words(rng_ptr, tl.cast(stream, tl.uint32) + 0x80000000, row // 4)
    pick = row % 4
    word = tl.where(pick == 0, r0, tl.where(pick == 1, r1, tl.where(pick == 2, r2, r3)))
    radius = tl.exp2(tl.log2(philox.uniform(word, dtype)) / columns)
    scale = radius * tl.load(eps_ptr).to(dtype) / length

    for start in range(0, columns + 3, BLOCK):
        at = element + start
        inside = (row < rows) & (at >= begin) & (at < begin + columns)
        normal = _normals(rng_ptr, stream, block + start // 4, n, dtype)
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        tl.store(out_ptr + at, clip(x + normal * scale, 0.0, 1.0), mask=inside)
