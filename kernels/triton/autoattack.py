"""The steps of APGD and FAB, one launch each; a program holds whole samples."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device, row_tile
from .maths import clip, divide, number


def apgd_step(
    x: Tensor,
    z: Tensor,
    last: Tensor,
    grad: Tensor,
    step: Tensor,
    eps: Tensor,
    momentum: float,
    norm: str,
) -> Tensor:
    out = torch.empty_like(x)
    rows, columns = x.shape[0], x.numel() // max(x.shape[0], 1)
    tile = row_tile(rows, columns, elements=1024, widest=4096, a_thread=16)
    with on_device(x):
        kernel = apgd_l2_kernel if norm == "L2" else apgd_linf_kernel
        kernel[(triton.cdiv(rows, tile["ROWS"]),)](
            x, z, last, grad, step, out, eps, momentum, rows, columns, **tile,
            enable_fp_fusion=False,
        )  # fmt: skip
    return out


def fab_step(x: Tensor, z: Tensor, normal: Tensor, gap: Tensor, norm: str) -> Tensor:
    out = torch.empty_like(x)
    rows, columns = x.shape[0], x.numel() // max(x.shape[0], 1)
    tile = row_tile(rows, columns, elements=1024, widest=4096, a_thread=16)
    with on_device(x):
        fab_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
            x, z, normal, gap, out, rows, columns, L2=norm == "L2", **tile
        )
    return out


@triton.jit(do_not_specialize=["momentum"])
def apgd_linf_kernel(
    x_ptr, z_ptr, last_ptr, grad_ptr, step_ptr, out_ptr, eps_ptr, momentum, rows, columns,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Take APGD's Linf step. Grid: (ceil(rows / ROWS),).

    Args:
        x_ptr, z_ptr, last_ptr, grad_ptr, out_ptr: float32 or float64 [rows, columns], row stride
            `columns`.
        step_ptr: [rows], the same type; eps_ptr: one float; momentum: in [0, 1].
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    base = row.to(tl.int64) * columns
    lane = tl.arange(0, BLOCK)[None, :]
    dtype = x_ptr.dtype.element_ty
    eps, share = tl.load(eps_ptr).to(dtype), number(momentum, dtype)
    step = tl.load(step_ptr + row, mask=row < rows, other=0.0)
    for start in range(0, columns, BLOCK):
        inside = (row < rows) & (start + lane < columns)
        at = base + start + lane
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        z = tl.load(z_ptr + at, mask=inside, other=0.0)
        last = tl.load(last_ptr + at, mask=inside, other=0.0)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
        low, high = tl.maximum(x - eps, 0.0), tl.minimum(x + eps, 1.0)
        sign = tl.where(grad > 0, 1.0, tl.where(grad < 0, -1.0, 0.0)).to(dtype)
        ahead = clip(z + step * sign, low, high)
        moved = z + share * (ahead - z) + (1 - share) * (z - last)
        tl.store(out_ptr + at, clip(moved, low, high), mask=inside)


@triton.jit
def _shrink(squares, eps):
    """Return the factor [ROWS, 1] that brings perturbations into the ball, from their squares."""
    size = tl.sqrt(tl.sum(squares, axis=1, keep_dims=True))
    return tl.minimum(size, eps) / (size + 1e-12)


@triton.jit
def _apgd_delta(x, z, last, grad, scale, usable, shrink, share):
    """Return the step's perturbation before its projection: the step, projected, and momentum."""
    delta = z + tl.where(usable, grad, 0.0) * scale - x
    ahead = clip(x + shrink * delta, 0.0, 1.0)
    return z + share * (ahead - z) + (1 - share) * (z - last) - x


@triton.jit(do_not_specialize=["momentum"])
def apgd_l2_kernel(
    x_ptr, z_ptr, last_ptr, grad_ptr, step_ptr, out_ptr, eps_ptr, momentum, rows, columns,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Take APGD's L2 step. Grid: (ceil(rows / ROWS),).

    Four passes over a sample: the gradient's length, the lengths of both perturbations, and the
    result. The later passes find their operands in cache. Arguments as for `apgd_linf_kernel`.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    base = row.to(tl.int64) * columns
    lane = tl.arange(0, BLOCK)[None, :]
    dtype = x_ptr.dtype.element_ty
    eps, share = tl.load(eps_ptr).to(dtype), number(momentum, dtype)
    step = tl.load(step_ptr + row, mask=row < rows, other=0.0)

    squares = tl.zeros((ROWS, BLOCK), dtype)
    for start in range(0, columns, BLOCK):
        inside = (row < rows) & (start + lane < columns)
        grad = tl.load(grad_ptr + base + start + lane, mask=inside, other=0.0)
        squares += grad * grad
    length = tl.sqrt(tl.sum(squares, axis=1, keep_dims=True)) + 1e-12
    usable = length < float("inf")
    scale = step / tl.where(usable, length, 1.0)

    squares = tl.zeros((ROWS, BLOCK), dtype)
    for start in range(0, columns, BLOCK):
        inside = (row < rows) & (start + lane < columns)
        at = base + start + lane
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        z = tl.load(z_ptr + at, mask=inside, other=0.0)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
        delta = z + tl.where(usable, grad, 0.0) * scale - x
        squares += delta * delta
    first = _shrink(squares, eps)

    squares = tl.zeros((ROWS, BLOCK), dtype)
    for start in range(0, columns, BLOCK):
        inside = (row < rows) & (start + lane < columns)
        at = base + start + lane
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        z = tl.load(z_ptr + at, mask=inside, other=0.0)
        last = tl.load(last_ptr + at, mask=inside, other=0.0)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
        delta = _apgd_delta(x, z, last, grad, scale, usable, first, share)
        squares += delta * delta
    second = _shrink(squares, eps)

    for start in range(0, columns, BLOCK):
        inside = (row < rows) & (start + lane < columns)
        at = base + start + lane
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        z = tl.load(z_ptr + at, mask=inside, other=0.0)
        last = tl.load(last_ptr + at, mask=inside, other=0.0)
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0)
        delta = _apgd_delta(x, z, last, grad, scale, usable, first, share)
        tl.store(out_ptr + at, clip(x + second * delta, 0.0, 1.0), mask=inside)


@triton.jit
def _slope(normal, L2: tl.constexpr):
    """Return |normal|, and 0 for slopes that count as none."""
    slope = tl.abs(normal)
    least: tl.constexpr = 1e-8 if L2 else 0.0
    return tl.where((slope > least) & (slope < float("inf")), slope, 0.0)


@triton.jit
def _room(p, normal, turn):
    """Return the way from p to the edge of [0, 1] in the direction of normal * turn."""
    return tl.where(normal * turn > 0, 1 - p, p)


@triton.jit
def _way(p, normal, turn, s, L2: tl.constexpr):
    """Return the way to the plane at the solution s of Newton's method."""
    slope, direction = _slope(normal, L2), normal * turn
    ahead = s * slope if L2 else s + 0.0 * slope
    moved = tl.minimum(ahead, _room(p, normal, turn))
    signed = tl.where(direction > 0, moved, tl.where(direction < 0, -moved, 0.0))
    return tl.where(slope > 0, signed, 0.0)


@triton.jit
def _turn(height):
    """Return minus the sign of the height, in its type."""
    return tl.where(height > 0, -1.0, tl.where(height < 0, 1.0, 0.0)).to(height.dtype)


@triton.jit
def _solve(
    p_ptr, normal_ptr, base, alive, lane, columns, turn, goal, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, L2: tl.constexpr,
):  # fmt: skip
    """Solve sum slope min(s speed, room) = goal for s [ROWS, 1], as `reference._newton`."""
    dtype = p_ptr.dtype.element_ty
    rates, reaches = tl.zeros((ROWS, BLOCK), dtype), tl.zeros((ROWS, BLOCK), dtype)
    for start in range(0, columns, BLOCK):
        inside = alive & (start + lane < columns)
        at = base + start + lane
        p = tl.load(p_ptr + at, mask=inside, other=0.0)
        normal = tl.load(normal_ptr + at, mask=inside, other=0.0)
        slope = _slope(normal, L2)
        rates += slope * slope if L2 else slope
        reaches += slope * _room(p, normal, turn)
    whole = tl.sum(reaches, axis=1, keep_dims=True)
    s = divide(goal, tl.sum(rates, axis=1, keep_dims=True))
    moving, count = 1, 0
    while (moving > 0) & (count < 50):
        rates, reaches = tl.zeros((ROWS, BLOCK), dtype), tl.zeros((ROWS, BLOCK), dtype)
        for start in range(0, columns, BLOCK):
            inside = alive & (start + lane < columns)
            at = base + start + lane
            p = tl.load(p_ptr + at, mask=inside, other=0.0)
            normal = tl.load(normal_ptr + at, mask=inside, other=0.0)
            slope, room = _slope(normal, L2), _room(p, normal, turn)
            free = (s * slope if L2 else s + 0.0 * slope) < room
            rates += tl.where(free, slope * slope if L2 else slope, 0.0)
            reaches += tl.where(free, slope * room, 0.0)
        growth = tl.sum(rates, axis=1, keep_dims=True)
        left = goal - (whole - tl.sum(reaches, axis=1, keep_dims=True))
        # With nothing left that can move, the box does not reach the plane.
        following = divide(left, tl.where(growth > 0, growth, 1.0))
        following = tl.where(growth > 0, tl.where(following > s, following, s), float("inf"))
        moving = tl.max(tl.where(alive & (following != s), 1, 0))
        s = following
        count += 1
    return s


@triton.jit
def fab_kernel(
    x_ptr, z_ptr, normal_ptr, gap_ptr, out_ptr, rows, columns,
    L2: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Take FAB's step. Grid: (ceil(rows / ROWS),).

    Newton's method passes over a sample about five times for each of its two planes. After the
    first pass the operands are in cache.

    Args:
        x_ptr, z_ptr, normal_ptr, out_ptr: float32 or float64 [rows, columns], row stride `columns`.
        gap_ptr: [rows], the same type.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    alive, base = row < rows, row.to(tl.int64) * columns
    lane = tl.arange(0, BLOCK)[None, :]
    dtype = x_ptr.dtype.element_ty

    products = tl.zeros((ROWS, BLOCK), dtype)
    for start in range(0, columns, BLOCK):
        inside = alive & (start + lane < columns)
        at = base + start + lane
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        z = tl.load(z_ptr + at, mask=inside, other=0.0)
        normal = tl.load(normal_ptr + at, mask=inside, other=0.0)
        products += tl.where(tl.abs(normal) < float("inf"), normal, 0.0) * (z - x)
    gap = tl.load(gap_ptr + row, mask=alive, other=0.0)
    height = gap - tl.sum(products, axis=1, keep_dims=True)
    turn_z, turn_x = _turn(gap), _turn(height)
    s_z = _solve(
        z_ptr, normal_ptr, base, alive, lane, columns, turn_z, tl.abs(gap), ROWS, BLOCK, L2
    )
    s_x = _solve(
        x_ptr, normal_ptr, base, alive, lane, columns, turn_x, tl.abs(height), ROWS, BLOCK, L2
    )

    nears, fars = tl.zeros((ROWS, BLOCK), dtype), tl.zeros((ROWS, BLOCK), dtype)
    for start in range(0, columns, BLOCK):
        inside = alive & (start + lane < columns)
        at = base + start + lane
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        z = tl.load(z_ptr + at, mask=inside, other=0.0)
        normal = tl.load(normal_ptr + at, mask=inside, other=0.0)
        way_z, way_x = _way(z, normal, turn_z, s_z, L2), _way(x, normal, turn_x, s_x, L2)
        if L2:
            nears += way_z * way_z
            fars += way_x * way_x
        else:
            nears = tl.maximum(nears, tl.abs(way_z))
            fars = tl.maximum(fars, tl.abs(way_x))
    if L2:
        near = tl.sqrt(tl.sum(nears, axis=1, keep_dims=True))
        far = tl.sqrt(tl.sum(fars, axis=1, keep_dims=True))
    else:
        near = tl.max(nears, axis=1, keep_dims=True)
        far = tl.max(fars, axis=1, keep_dims=True)
    near, far = tl.maximum(near, 1e-8), tl.maximum(far, 1e-8)
    pull = tl.minimum(divide(near, near + far), 0.1)

    for start in range(0, columns, BLOCK):
        inside = alive & (start + lane < columns)
        at = base + start + lane
        x = tl.load(x_ptr + at, mask=inside, other=0.0)
        z = tl.load(z_ptr + at, mask=inside, other=0.0)
        normal = tl.load(normal_ptr + at, mask=inside, other=0.0)
        ahead = z + 1.05 * _way(z, normal, turn_z, s_z, L2)
        around = x + 1.05 * _way(x, normal, turn_x, s_x, L2)
        tl.store(out_ptr + at, clip(ahead * (1 - pull) + around * pull, 0.0, 1.0), mask=inside)
