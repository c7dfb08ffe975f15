"""A uniform random point of the ball, drawn, added and clipped in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import philox
from .launch import flat_tile, on_device, row_tile
from .maths import box_muller, clip


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
            # A row may begin and end inside a block of four words.
            tile = row_tile(rows, max(columns, 4), elements=1024, widest=2048)
            l2_start_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
                x, out, eps, rng, stream, rows, columns, **tile
            )
    return out


@triton.jit(do_not_specialize=["stream"])
def linf_start_kernel(x_ptr, out_ptr, eps_ptr, rng_ptr, stream, n, BLOCK: tl.constexpr):
    """One Philox block for each four elements. Grid: (ceil(n / BLOCK),).

    Args:
        x_ptr, out_ptr: float32 or float64 [n], dense, one memory order.
        eps_ptr: one float; rng_ptr: int64 [2]; stream: second counter word.
        n: elements. 128-bit accesses need n % 16 == 0, which Triton specialises on.
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
    """Standard normals for elements 4 block .. 4 block + 3, side by side."""
    w0, w1, w2, w3 = philox.words(rng_ptr, stream, block)
    # By the reference's definition an odd last element is paired with the word 0.
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
    """Whole samples a program: a normal direction, a radius u^(1/D). Grid: (ceil(rows / ROWS),).

    The numbers are drawn twice, once for the length and once for the result: that costs less than
    parking them in memory.

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
