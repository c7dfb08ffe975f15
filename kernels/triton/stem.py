"""The first convolution's input gradient and the attack step.

For Linf, one kernel does both, and the gradient is never in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import outputs_innermost
from .attack import launch_l2_step
from .launch import INTERPRETING, flat_tile, on_device
from .maths import linf_step

_WARPS = 4
# Lanes over pixels, four a thread: each loaded weight serves four products.
_PIXELS = 512
# Lanes over output channels too, if the channels are innermost: 16 channels of a pixel in 16 bits
# are one sector of memory, which two threads read. Two pixels a thread: four need 200 registers.
_CHANNELS, _TILE = 16, 2048


def input_grad_step(
    x: Tensor,
    z: Tensor,
    stem_grad: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    eps: Tensor,
    alpha: Tensor,
    norm: str,
) -> Tensor:
    out = torch.empty_like(x)
    b, c, h, w = x.shape
    o, _, kh, kw = weight.shape
    fused = norm == "Linf"
    pixels = b * triton.cdiv(h, stride) * triton.cdiv(w, stride)
    group = min(c, 3)
    lanes, tile = 1, _PIXELS
    if stem_grad.stride(1) == 1 and o > 1:
        # In channels_last, lanes over pixels only would read 2 or 4 bytes of each of 32 lines.
        lanes, tile = min(triton.next_power_of_2(o), _CHANNELS), _TILE
        # In this order a thread's weights are adjacent: 6 loads for 16 gradients, not 24.
        weight = outputs_innermost(weight)
    block = (flat_tile(pixels * lanes)["BLOCK"] if INTERPRETING else tile) // lanes
    grid = (triton.cdiv(pixels, block), stride * stride, triton.cdiv(c, group))
    with on_device(x):
        input_grad_kernel[grid](
            stem_grad, weight, x, z, out, eps, alpha,
            b, o, *stem_grad.shape[2:], *stem_grad.stride(), *weight.stride(), *x.stride(),
            C=c, H=h, W=w, KH=kh, KW=kw, STRIDE=stride, PADDING=padding, GROUP=group, STEP=fused,
            BLOCK=block, LANES=lanes, WHOLE=o % lanes == 0, num_warps=_WARPS,
        )  # fmt: skip
        if not fused:
            launch_l2_step(x, z, out, out, eps, alpha)
    return out


@triton.jit
def _finish(acc, x_ptr, z_ptr, out_ptr, eps_ptr, alpha_ptr, at, mask, STEP: tl.constexpr):
    """Store the gradient, or the next point of the Linf step. acc: [BLOCK, LANES]."""
    acc = tl.sum(acc, axis=1)
    if STEP:
        x = tl.load(x_ptr + at, mask=mask, other=0.0)
        z = tl.load(z_ptr + at, mask=mask, other=0.0)
        eps, alpha = tl.load(eps_ptr).to(x.dtype), tl.load(alpha_ptr).to(x.dtype)
        acc = linf_step(x, z, acc, eps, alpha)
    tl.store(out_ptr + at, acc, mask=mask)


@triton.jit
def input_grad_kernel(
    grad_ptr, weight_ptr, x_ptr, z_ptr, out_ptr, eps_ptr, alpha_ptr,
    batch, out_channels, out_h, out_w,
    grad_b, grad_o, grad_y, grad_x, weight_o, weight_c, weight_y, weight_x, x_b, x_c, x_y, x_x,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    STRIDE: tl.constexpr, PADDING: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr,
    BLOCK: tl.constexpr, LANES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK pixels of one residue class, up to three channels each.

    Grid: (ceil(batch * ceil(H / STRIDE) * ceil(W / STRIDE) / BLOCK), STRIDE^2, ceil(C / GROUP)).

    The kernel gathers: input pixel y receives from output row (y + PADDING - ky) / STRIDE if that
    is whole. Pixels with the same (y, x) modulo STRIDE have the same taps, so a program takes one
    such class: every tap counts, and all pixels share their weights. A matrix product on tensor
    cores would pad the 1 or 3 channels to 16 and round to TF32.

    A pixel has LANES sums, each over every LANES-th output channel; the last step adds them.

    Args:
        grad_ptr: any float [batch, out_channels, out_h, out_w], strides grad_b, grad_o, grad_y,
            grad_x.
        weight_ptr: any float [out_channels, C, KH, KW], strides weight_o, weight_c, weight_y,
            weight_x.
        x_ptr, z_ptr, out_ptr: float32 or float64 [batch, C, H, W], strides x_b, x_c, x_y, x_x.
        eps_ptr, alpha_ptr: one float each.
        STEP: out is the next point of the Linf step; otherwise out is the gradient, and the kernel
            does not read x, z, eps and alpha.
        LANES: output channels at a time, adjacent in memory (grad_o == 1) if more than one.
        WHOLE: out_channels is a multiple of LANES.
    """
    dtype = x_ptr.dtype.element_ty
    class_y, class_x = tl.program_id(1) // STRIDE, tl.program_id(1) % STRIDE
    ROWS: tl.constexpr = (H + STRIDE - 1) // STRIDE
    COLUMNS: tl.constexpr = (W + STRIDE - 1) // STRIDE
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i, j = (pixel // COLUMNS) % ROWS, pixel % COLUMNS
    b = (pixel // (COLUMNS * ROWS)).to(tl.int64)
    y, x = i * STRIDE + class_y, j * STRIDE + class_x
    live = (b < batch) & (y < H) & (x < W)
    channel = 0 if GROUP == C else tl.program_id(2) * GROUP
    lane = tl.arange(0, LANES)

    first_ky, shift_y = (class_y + PADDING) % STRIDE, (class_y + PADDING) // STRIDE
    first_kx, shift_x = (class_x + PADDING) % STRIDE, (class_x + PADDING) // STRIDE
    acc0 = tl.zeros((BLOCK, LANES), dtype)
    acc1, acc2 = acc0, acc0
    for ty in range((KH + STRIDE - 1) // STRIDE):
        ky = first_ky + ty * STRIDE
        oy = i + shift_y - ty
        for tx in range((KW + STRIDE - 1) // STRIDE):
            kx = first_kx + tx * STRIDE
            ox = j + shift_x - tx
            tap = (ky < KH) & (kx < KW)
            mask = live & tap & (oy >= 0) & (oy < out_h) & (ox >= 0) & (ox < out_w)
            grad_at = grad_ptr + (b * grad_b + oy * grad_y + ox * grad_x)[:, None] + lane * grad_o
            weight_at = weight_ptr + channel * weight_c + ky * weight_y + kx * weight_x
            weight_at += lane * weight_o
            for o in range(0, out_channels, LANES):
                inside = tap if WHOLE else tap & (o + lane < out_channels)
                grad = tl.load(grad_at, mask=mask[:, None] & inside, other=0.0).to(dtype)
                acc0 += grad * tl.load(weight_at, mask=inside, other=0.0).to(dtype)
                if GROUP > 1:
                    there = inside & (channel + 1 < C)
                    w = tl.load(weight_at + weight_c, mask=there, other=0.0)
                    acc1 += grad * w.to(dtype)
                if GROUP > 2:
                    there = inside & (channel + 2 < C)
                    w = tl.load(weight_at + 2 * weight_c, mask=there, other=0.0)
                    acc2 += grad * w.to(dtype)
                grad_at += LANES * grad_o
                weight_at += LANES * weight_o
    at = b * x_b + channel * x_c + y * x_y + x * x_x
    _finish(acc0, x_ptr, z_ptr, out_ptr, eps_ptr, alpha_ptr, at, live, STEP)
    if GROUP > 1:
        mask = live & (channel + 1 < C)
        _finish(acc1, x_ptr, z_ptr, out_ptr, eps_ptr, alpha_ptr, at + x_c, mask, STEP)
    if GROUP > 2:
        mask = live & (channel + 2 < C)
        _finish(acc2, x_ptr, z_ptr, out_ptr, eps_ptr, alpha_ptr, at + 2 * x_c, mask, STEP)
