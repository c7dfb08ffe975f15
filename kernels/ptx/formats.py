"""Read a register's bits as numbers, and round numbers to bits.

A register is an unsigned NumPy array with an entry a lane; a predicate's is bool. bfloat16 is
computed with as float32. A pair of numbers in one register (f32x2, s16x2) has a second axis.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

UNSIGNED: dict[int, Any] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED: dict[int, Any] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
_FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}
_PAIRS = {"f32x2": np.float32, "f16x2": np.float16, "s16x2": np.int16, "u16x2": np.uint16}
TYPE = re.compile(r"pred|[bus](?:8|16|32|64)|f(?:16|32|64)|bf16|bf16x2|" + "|".join(_PAIRS))


def bits(kind: str) -> int:
    """Return the width of a PTX type: 32 for "s32" and "bf16x2", 1 for "pred"."""
    if kind == "pred":
        return 1
    width, _, count = kind.lstrip("busf").partition("x")
    return int(width) * int(count or 1)


def dtype(kind: str) -> type:
    """Return the NumPy type that a PTX type is computed with."""
    if kind == "pred":
        return np.bool_
    if kind == "bf16":
        return np.float32
    if kind in _PAIRS:
        return _PAIRS[kind]
    width = bits(kind)
    return (_FLOAT if kind[0] == "f" else SIGNED if kind[0] == "s" else UNSIGNED)[width]


def is_float(kind: str) -> bool:
    return kind.startswith(("f", "bf"))


def decode(raw: np.ndarray, kind: str) -> np.ndarray:
    """Return the numbers in `raw`, a register of at least the type's width."""
    width = bits(kind)
    if kind != "pred" and raw.dtype.itemsize * 8 != width:
        raw = raw.astype(UNSIGNED[width])
    if kind == "bf16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
    if kind in _PAIRS:
        return np.ascontiguousarray(raw).reshape(-1, 1).view(_PAIRS[kind])
    return raw if raw.dtype == dtype(kind) else raw.view(dtype(kind))


def encode(values: np.ndarray, kind: str, width: int) -> np.ndarray:
    """Return the bits of `values`, which are of type `kind`, in a register of `width` bits."""
    values = np.asarray(values)
    if kind == "pred":
        return values
    if kind == "bf16":
        values = to_bfloat16(values)
    elif kind in _PAIRS:
        values = np.ascontiguousarray(values).view(UNSIGNED[width])[:, 0]
    if values.dtype.itemsize * 8 < width:
        # Into a wider register: signed numbers keep their sign.
        wider = SIGNED if values.dtype.kind == "i" else UNSIGNED
        if values.dtype.kind == "f":
            values = values.view(UNSIGNED[values.dtype.itemsize * 8])
        values = values.astype(wider[width])
    unsigned = UNSIGNED[width]
    return values if values.dtype == unsigned else values.view(unsigned)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round float32 to nearest even, as uint16; NaN becomes the canonical 0x7FFF."""
    word = np.asarray(values, np.float32).view(np.uint32)
    rounded = word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(values), np.uint16(0x7FFF), (rounded >> 16).astype(np.uint16))


def flush(values: np.ndarray) -> np.ndarray:
    """Turn subnormal float32 numbers into zeros of their sign, as `.ftz` does."""
    return np.where(
        np.abs(values) < np.finfo(np.float32).tiny,
        np.copysign(np.float32(0), values),
        values,
    )


def fma32(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Compute a b + c in float32, rounded once."""
    product = a.astype(np.float64) * b.astype(np.float64)  # exact: 48 bits
    addend = c.astype(np.float64)
    total = product + addend
    # Rounding twice errs only where the first rounding lands halfway between two float32.
    word = np.atleast_1d(total).view(np.int64)
    halfway = (word & 0x1FFFFFFF) == 0x10000000
    if halfway.any() or (np.abs(total) < np.finfo(np.float32).tiny).any():
        total = _odd(total, _residual(product, addend, total))
    return total.astype(np.float32)


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Compute a b + c in float64, rounded once, unless a product's error underflows.

    Boldo, Melquiond: Emulation of FMA and correctly rounded sums: proved algorithms using rounding
    to odd (IEEE Transactions on Computers 57, 2008).
    """
    high, low = _product(a, b)
    t_high, t_low = _sum(low, c)
    v_high, v_low = _sum(high, t_high)
    rest = t_low + v_low
    result = v_high + _odd(rest, _residual(t_low, v_low, rest))
    # Splitting overflows near the largest numbers, and infinities have no error terms.
    return np.where(np.isfinite(result), result, a * b + c)


def _residual(a: np.ndarray, b: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Return what rounding took from a + b, exactly (Knuth's two-sum)."""
    part = total - a
    return (a - (total - part)) + (b - part)


def _sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    total = a + b
    return total, _residual(a, b, total)


def _product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a b as the sum of two float64 (Dekker's product)."""

    def split(v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        scaled = v * 134217729.0
        upper = scaled - (scaled - v)
        return upper, v - upper

    total = a * b
    (a1, a2), (b1, b2) = split(a), split(b)
    return total, a2 * b2 - (((total - a1 * b1) - a2 * b1) - a1 * b2)


def _odd(total: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """Round total + rest to odd: to the one of its two neighbours whose last bit is 1."""
    total = np.atleast_1d(total)
    word = total.view(np.int64)
    moved = np.where(np.isfinite(rest) & (rest != 0) & (word & 1 == 0), 1, 0)
    # Away from zero is one up in the bits, whatever the sign.
    away = np.where((rest > 0) == (total > 0), moved, -moved)
    # Halfway between two smallest numbers there is no bit to take off.
    away = np.where((total == 0) & (moved == 1), 0, away)
    return (word + away).view(np.float64)
