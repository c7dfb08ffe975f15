"""The formulas without loads and stores: every function maps register tiles to register tiles.

A choice by type is one expression: Triton also compiles the code after an `if` that returned.
"""

import triton
import triton.language as tl


@triton.jit
def wide(v):
    """Return `v` in the type of the computation: float64 for float64, else float32."""
    return v if v.dtype == tl.float64 else v.to(tl.float32)


@triton.jit
def number(value, dtype: tl.constexpr):
    """Convert a launch argument, float64 or (if interpreted) a Python float, to `dtype`."""
    return (value * tl.full((), 1.0, tl.float64)).to(dtype)


@triton.jit
def divide(a, b):
    """Return a / b correctly rounded; plain float32 division may be off by two units."""
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def clip(v, low, high):
    """Clip `v` to [low, high]; NaN stays NaN, as in PyTorch and unlike the hardware's default."""
    v = tl.maximum(v, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(v, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def linf_step(x, z, grad, eps, alpha):
    """Clip z + alpha sign(grad) to [x - eps, x + eps] and [0, 1]; NaN gradients count as 0."""
    sign = tl.where(grad > 0, 1.0, tl.where(grad < 0, -1.0, 0.0)).to(x.dtype)
    return clip(clip(z + alpha * sign, x - eps, x + eps), 0.0, 1.0)


@triton.jit
def into_ball(square, eps):
    """Return the factor that projects a perturbation of squared length `square` into the ball."""
    length = tl.sqrt(square)
    return tl.where(length > eps, eps / tl.maximum(length, 1e-30), 1.0)


@triton.jit
def round_even(v):
    """Round to the nearest whole number, ties to even, for |v| < 2^22.

    The sum with 1.5 * 2^(mantissa bits) has no room for the fraction.
    """
    shift: tl.constexpr = 6755399441055744.0 if v.dtype == tl.float64 else 12582912.0
    return (v + shift) - shift


@triton.jit
def log_softmax(logits, inside):
    """Return the log-probabilities of each row of [ROWS, K] over the columns `inside`."""
    top = tl.max(tl.where(inside, logits, float("-inf")), axis=1, keep_dims=True)
    # Outside, 0 cannot overflow.
    shifted = tl.where(inside, logits - top, 0.0)
    total = tl.sum(tl.where(inside, tl.exp(shifted), 0.0), axis=1, keep_dims=True)
    return shifted - tl.log(total)


@triton.jit
def softmax(logits, inside):
    """Return the probabilities of each row of [ROWS, K]; 0 in columns outside `inside`."""
    top = tl.max(tl.where(inside, logits, float("-inf")), axis=1, keep_dims=True)
    p = tl.where(inside, tl.exp(tl.where(inside, logits - top, 0.0)), 0.0)
    return p / tl.sum(p, axis=1, keep_dims=True)


@triton.jit
def kl(log_p, log_q, inside):
    """Return KL(p || q) of each row: [ROWS, K] twice to [ROWS]."""
    return tl.sum(tl.where(inside, tl.exp(log_p) * (log_p - log_q), 0.0), axis=1)


@triton.jit
def is_argmax(logits, columns, target, inside):
    """Return 1.0 for every row whose first largest entry is at `target`, else 0.0.

    NaN is larger than any number, as in `torch.argmax`.

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
    """Return two standard normals from two uniforms in [0, 1) (Box and Muller, 1958).

    The quadrant is subtracted before the angle is computed, so the arguments of both series are at
    most pi/4, and the terms here are exact to float64. The library's sine has a path for large
    arguments, which needs local memory.
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
    """Return v / 255, correctly rounded, for whole v in [0, 255], without a division.

    1/255 = 257/2^16 + (2^-24 + 2^-32 + ...): the first product is exact, and the rounding of the
    second product is too small to change the result (a test holds all 256 values).
    """
    return v * 0.0039215087890625 + v * 5.983838848033773e-08
