"""The formulas, free of loads and stores: every function maps register tiles to register tiles.

A choice by type is one expression: after an `if` that returned, Triton compiles the rest all the same.
"""

import triton
import triton.language as tl


@triton.jit
def wide(v):
    """`v` in float32, or in float64 if it is: the type that the mathematics runs in."""
    return v if v.dtype == tl.float64 else v.to(tl.float32)


@triton.jit
def number(value, dtype: tl.constexpr):
    """A launch argument (float64 on the device, a Python float when interpreted) as a `dtype` scalar."""
    return (value * tl.full((), 1.0, tl.float64)).to(dtype)


@triton.jit
def divide(a, b):
    """a / b correctly rounded; plain division of float32 is allowed to be off by two units."""
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def clip(v, low, high):
    """`v` clipped to [low, high]; NaN stays NaN, as in PyTorch and unlike the hardware's default."""
    v = tl.maximum(v, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def linf_step(x, z, grad, eps, alpha):
    """clip(z + alpha sign(grad), x - eps, x + eps), then [0, 1]. NaN gradients count as 0."""
    sign = tl.where(grad > 0, 1.0, tl.where(grad < 0, -1.0, 0.0)).to(x.dtype)
    return clip(clip(z + alpha * sign, x - eps, x + eps), 0.0, 1.0)


@triton.jit
def into_ball(square, eps):
    """Factor that brings a perturbation of squared length `square` into the ball of radius `eps`."""
    length = tl.sqrt(square)
    return tl.where(length > eps, eps / tl.maximum(length, 1e-30), 1.0)


@triton.jit
def round_even(v):
    """To the nearest whole number, ties to even, for |v| < 2^22: adding 1.5 * 2^(mantissa bits) drops the rest."""
    shift: tl.constexpr = 6755399441055744.0 if v.dtype == tl.float64 else 12582912.0
    return (v + shift) - shift


@triton.jit
def log_softmax(logits, inside):
    """Log-probabilities of each row of [ROWS, K]; columns outside `inside` take no part."""
    top = tl.max(tl.where(inside, logits, float("-inf")), axis=1, keep_dims=True)
    # 0 outside: nothing there can overflow, whatever the row holds.
    shifted = tl.where(inside, logits - top, 0.0)
    total = tl.sum(tl.where(inside, tl.exp(shifted), 0.0), axis=1, keep_dims=True)
    return shifted - tl.log(total)


@triton.jit
def softmax(logits, inside):
    """Probabilities of each row of [ROWS, K]; 0 in columns outside `inside`."""
    top = tl.max(tl.where(inside, logits, float("-inf")), axis=1, keep_dims=True)
    p = tl.where(inside, tl.exp(tl.where(inside, logits - top, 0.0)), 0.0)
    return p / tl.sum(p, axis=1, keep_dims=True)


@triton.jit
def kl(log_p, log_q, inside):
    """KL(p || q) of each row: [ROWS, K] twice to [ROWS]."""
    return tl.sum(tl.where(inside, tl.exp(log_p) * (log_p - log_q), 0.0), axis=1)


@triton.jit
def is_argmax(logits, columns, target, inside):
    """1.0 for every row whose first largest entry is at `target`, else 0.0. NaN is larger than any number.

    Args:
        logits: [ROWS, K]; columns: [1, K] column numbers; target: [ROWS, 1].
    """
    at_target = tl.sum(tl.where(columns == target, logits, 0.0), axis=1, keep_dims=True)
    nan, target_nan = logits != logits, at_target != at_target
    before = columns < target
    ahead = (logits > at_target) | nan | ((logits == at_target) & before)
    ahead = tl.where(target_nan, nan & before, ahead)
    return tl.where(tl.sum((ahead & inside).to(tl.int32), axis=1) == 0, 1.0, 0.0)


@triton.jit
def box_muller(first, second):
    """Two standard normals from two uniforms in [0, 1).

    The quadrant is taken off before the angle is formed, so both series see at most pi/4, where the
    terms kept are exact to float64; the library's sine would bring its large-argument path and with it
    local memory.
    """
    radius = tl.sqrt(-2.0 * tl.log(1.0 - first))
    quadrant = tl.floor(4.0 * second + 0.5)
    t = 6.283185307179586 * (second - 0.25 * quadrant)
    t2 = t * t
    sine = 1.0 - t2 / 210.0
    sine = 1.0 - t2 / 156.0 * sine
    sine = 1.0 - t2 / 110.0 * sine
    sine = 1.0 - t2 / 72.0 * sine
    sine = 1.0 - t2 / 42.0 * sine
    sine = 1.0 - t2 / 20.0 * sine
    sine = t * (1.0 - t2 / 6.0 * sine)
    cosine = 1.0 - t2 / 240.0
    cosine = 1.0 - t2 / 182.0 * cosine
    cosine = 1.0 - t2 / 132.0 * cosine
    cosine = 1.0 - t2 / 90.0 * cosine
    cosine = 1.0 - t2 / 56.0 * cosine
    cosine = 1.0 - t2 / 30.0 * cosine
    cosine = 1.0 - t2 / 12.0 * cosine
    cosine = 1.0 - t2 / 2.0 * cosine
    q = quadrant.to(tl.int32) & 3
    swapped = (q & 1) == 1
    c = tl.where(swapped, sine, cosine)
    s = tl.where(swapped, cosine, sine)
    c = tl.where((q == 1) | (q == 2), -c, c)
    s = tl.where(q >= 2, -s, s)
    return radius * c, radius * s


@triton.jit
def byte_to_unit(v):
    """v / 255, correctly rounded, for whole v in [0, 255], without a division.

    1/255 = 257/2^16 + (2^-24 + 2^-32 + ...): the first product is exact and the second is too small
    for its own rounding to reach the result (all 256 values are tested).
    """
    return v * 0.0039215087890625 + v * 5.983838848033773e-08
