"""Compute PTX's arithmetic instructions, for many lanes at a time.

`operation` looks an opcode up: a function of NumPy arrays, and the types of operands and result.
An approximate instruction (ex2.approx, div.full) gives a value that is off by up to two units in
the last place, as a device's may be: a fixed number for each value.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .formats import TYPE, bits, dtype, encode, flush, fma32, fma64, is_float


class Operation(NamedTuple):
    """Hold what an arithmetic instruction computes, and the types of its operands and result."""

    function: Callable[..., np.ndarray]
    operands: tuple[str, ...]
    result: str


class Unknown(ValueError):
    """Say that an instruction is not executed here."""


# Modifiers that ask for what NumPy does, or for less; `ftz` is common to all instructions.
_PLAIN = {"rn", "approx", "full", "ftz", "lo"}


def operation(opcode: str) -> Operation:
    """Look up an arithmetic opcode, such as "fma.rn.ftz.f32".

    Raises:
        Unknown: it, or one of its modifiers, is not executed here.
    """
    name, *rest = opcode.split(".")
    kinds = [word for word in rest if TYPE.fullmatch(word)]
    modifiers = [word for word in rest if not TYPE.fullmatch(word)]
    mixed = name in _MIXED and len(kinds) == 2
    if name not in _BUILDERS or not (mixed or len(kinds) == (2 if name == "cvt" else 1)):
        raise Unknown(f"PTX instruction not known: {opcode}")
    built, used = _BUILDERS[name](kinds, modifiers)
    if mixed:
        built = _widening(built, kinds, _MIXED[name])
    approximate = not {"approx", "full"}.isdisjoint(modifiers)
    pairs = "bf16x2" in (built.result, *built.operands)
    if set(modifiers) - used - _PLAIN or pairs or (approximate and kinds[0] != "f32"):
        raise Unknown(f"PTX instruction not known: {opcode}")
    if approximate:
        built = built._replace(function=_off(built.function, _UNITS.get(name, 2)))
    return _flushing(built) if "ftz" in modifiers else built


# Units in the last place, after the maximum errors that the PTX ISA states for float32.
_UNITS = {"ex2": 2, "lg2": 2, "div": 2, "rsqrt": 2, "sqrt": 1, "rcp": 1}


def _off(function: Callable[..., np.ndarray], units: int) -> Callable[..., np.ndarray]:
    """Return the function with its results moved by up to `units` units in the last place."""

    def off(*values: np.ndarray) -> np.ndarray:
        result = function(*values)
        word = result.view(np.uint32)
        # The upper bits of a product hash the word.
        move = (word * np.uint32(2654435761) >> np.uint32(16)) % np.uint32(2 * units + 1)
        moved = (word + move - np.uint32(units)).view(np.float32)
        regular = np.isfinite(result) & (np.abs(result) >= np.finfo(np.float32).tiny)
        return np.where(regular & np.isfinite(moved), moved, result)

    return off


# sub.f32.bf16: a float32 result, and so many first operands of 16 bits.
_MIXED = {"add": 1, "sub": 1, "fma": 2}


def _widening(built: Operation, kinds: list[str], count: int) -> Operation:
    """Return the float32 operation on `count` operands of 16 bits and the rest of 32."""
    wide, narrow = kinds
    if wide != "f32" or narrow not in ("f16", "bf16"):
        raise Unknown(f"PTX instruction not known: of {wide} with {narrow}")

    def function(*values: np.ndarray) -> np.ndarray:
        return built.function(*(v.astype(np.float32) for v in values))

    operands = (narrow,) * count + built.operands[count:]
    return Operation(function, operands, wide)


def of_three(one: Operation) -> Operation:
    """Return min or max of three operands, from that of two."""
    return Operation(
        lambda a, b, c: one.function(one.function(a, b), c), one.operands[:1] * 3, one.result
    )


def _flushing(built: Operation) -> Operation:
    """Return the operation with subnormal float32 operands and results taken as zeros."""

    def function(*values: np.ndarray) -> np.ndarray:
        kinds = zip(values, built.operands, strict=True)
        result = built.function(*(flush(v) if kind.startswith("f32") else v for v, kind in kinds))
        return flush(result) if built.result.startswith("f32") else result

    return built._replace(function=function)


Built = tuple[Operation, set[str]]


def _same(function: Callable[..., np.ndarray], count: int) -> Callable[..., Built]:
    """Build an operation with `count` operands and a result of one type."""

    def build(kinds: list[str], modifiers: list[str]) -> Built:
        return Operation(function, (kinds[0],) * count, kinds[0]), set()

    return build


def _by_class(floating: Callable, whole: Callable, count: int = 2) -> Callable[..., Built]:
    """Build an operation with one function for floats and one for whole numbers."""

    def build(kinds: list[str], modifiers: list[str]) -> Built:
        function = floating if is_float(kinds[0]) else whole
        return Operation(function, (kinds[0],) * count, kinds[0]), set()

    return build


def _extreme(plain: Callable, with_nan: Callable) -> Callable[..., Built]:
    """Build min or max: of a number and NaN the number, unless the opcode says NaN."""

    def build(kinds: list[str], modifiers: list[str]) -> Built:
        function = with_nan if "NaN" in modifiers or not is_float(kinds[0]) else plain
        return Operation(function, (kinds[0],) * 2, kinds[0]), {"NaN"}

    return build


def _product(kinds: list[str], modifiers: list[str]) -> Built:
    kind = kinds[0]
    if "hi" in modifiers:
        return Operation(_upper_half(kind), (kind, kind), kind), {"hi"}
    if "wide" in modifiers:
        wide = kind[0] + str(2 * bits(kind))
        into = dtype(wide)
        return Operation(lambda a, b: a.astype(into) * b.astype(into), (kind, kind), wide), {"wide"}
    return Operation(operator.mul, (kind, kind), kind), set()


def _upper_half(kind: str) -> Callable:
    """Return a function for the upper half of a product of whole numbers."""
    if bits(kind) <= 32:
        wide, shift = dtype(kind[0] + "64"), dtype(kind[0] + "64")(bits(kind))
        return lambda a, b: ((a.astype(wide) * b.astype(wide)) >> shift).astype(dtype(kind))
    if kind != "u64":
        raise Unknown(f"PTX instruction not known: mul.hi.{kind}")

    def upper(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
        a1, a0, b1, b0 = a >> half, a & low, b >> half, b & low
        middle = a1 * b0 + ((a0 * b0) >> half)
        return a1 * b1 + (middle >> half) + (((middle & low) + a0 * b1) >> half)

    return upper


def _multiply_add(kinds: list[str], modifiers: list[str]) -> Built:
    product, used = _product(kinds, modifiers)
    kind = product.result
    return Operation(
        lambda a, b, c: product.function(a, b) + c, (*product.operands, kind), kind
    ), used


def _fused(kinds: list[str], modifiers: list[str]) -> Built:
    functions = {"f32": fma32, "f32x2": fma32, "f64": fma64}
    if kinds[0] not in functions:
        raise Unknown(f"PTX instruction not known: fma.{kinds[0]}")
    return Operation(functions[kinds[0]], (kinds[0],) * 3, kinds[0]), set()


def _shift(left: bool) -> Callable[..., Built]:
    def build(kinds: list[str], modifiers: list[str]) -> Built:
        kind, width = kinds[0], bits(kinds[0])

        def function(value: np.ndarray, by: np.ndarray) -> np.ndarray:
            amount = np.minimum(by, width - 1).astype(value.dtype)
            shifted = value << amount if left else value >> amount
            emptied = np.zeros_like(shifted) if left or kind[0] != "s" else shifted
            return np.where(by >= width, emptied, shifted)

        return Operation(function, (kind, "u32"), kind), set()

    return build


def _field(kinds: list[str], modifiers: list[str]) -> Built:
    """Build bfe: `length` bits from `position` on; a signed type extends the highest of them."""
    kind, width = kinds[0], bits(kinds[0])

    def function(value: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
        into = value.dtype
        at, count = position & 0xFF, np.minimum(length & 0xFF, width)
        found = value >> np.minimum(at, width - 1).astype(into)
        if kind[0] == "u":
            found = np.where(at >= width, into.type(0), found)
        above = np.minimum(width - count, width - 1).astype(into)
        return np.where(count == 0, into.type(0), (found << above) >> above)

    return Operation(function, (kind, "u32", "u32"), kind), set()


def _permute(kinds: list[str], modifiers: list[str]) -> Built:
    """Build prmt: each byte of the result is one of eight bytes, or that byte's sign spread."""

    def function(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
        both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        result: np.ndarray = np.zeros_like(selector, np.uint32)
        for i in range(4):
            pick = (selector >> np.uint32(4 * i)) & np.uint32(15)
            shift = ((pick & np.uint32(7)) * np.uint32(8)).astype(np.uint64)
            byte = ((both >> shift) & np.uint64(255)).astype(np.uint32)
            sign = np.where(byte >> np.uint32(7), np.uint32(255), np.uint32(0))
            result = result | np.where(pick >> np.uint32(3), sign, byte) << np.uint32(8 * i)
        return result

    return Operation(function, ("b32", "b32", "b32"), "b32"), set()


def _select(kinds: list[str], modifiers: list[str]) -> Built:
    kind = "b" + str(bits(kinds[0]))

    def function(a: np.ndarray, b: np.ndarray, chosen: np.ndarray) -> np.ndarray:
        return np.where(chosen, a, b)

    return Operation(function, (kind, kind, "pred"), kind), set()


def _unordered(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.isnan(a) | np.isnan(b)


_COMPARISONS: dict[str, Callable] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "lo": operator.lt,
    "ls": operator.le,
    "hi": operator.gt,
    "hs": operator.ge,
    "num": lambda a, b: ~_unordered(a, b),
    "nan": _unordered,
}


def _compare(kinds: list[str], modifiers: list[str]) -> Built:
    name, kind = modifiers[0], kinds[-1]
    function = _COMPARISONS.get(name)
    if is_float(kind) and name == "ne":
        function = lambda a, b: (a != b) & ~_unordered(a, b)  # noqa: E731
    elif name in ("equ", "neu", "ltu", "leu", "gtu", "geu"):
        ordered = _COMPARISONS[name[:2]]
        function = lambda a, b: ordered(a, b) | _unordered(a, b)  # noqa: E731
    if function is None:
        raise Unknown(f"PTX instruction not known: setp.{name}.{kind}")
    return Operation(function, (kind, kind), "pred"), {name}


_ROUND = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _convert(kinds: list[str], modifiers: list[str]) -> Built:
    into, kind = kinds
    if into in ("bf16x2", "f16x2"):
        return Operation(_pack(into), (kind, kind), "b32"), set()
    if into == "bf16" and kind != "f32":
        raise Unknown(f"PTX instruction not known: cvt.bf16.{kind}")
    rounding = next((word for word in modifiers if word in _ROUND), None)
    target = dtype(into)

    def function(value: np.ndarray) -> np.ndarray:
        if rounding is not None:
            value = _ROUND[rounding](value)
        if is_float(kind) and not is_float(into):
            value = _saturated(value, np.iinfo(target))
        return value.astype(target)

    return Operation(function, (kind,), into), {rounding} if rounding else set()


def _saturated(value: np.ndarray, limits: np.iinfo) -> np.ndarray:
    """Return floats clipped to the range of a whole type, NaN as 0."""
    if limits.bits == 64:  # whose largest number is no float64
        raise Unknown("PTX instruction not known: cvt from float to 64 bits")
    whole = np.nan_to_num(value.astype(np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf)
    return np.clip(whole, limits.min, limits.max)


def _pack(into: str) -> Callable:
    """Return a function that packs two numbers into one register, the first in its upper half."""
    kind = into.removesuffix("x2")

    def function(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
        def half(value: np.ndarray) -> np.ndarray:
            return encode(value.astype(dtype(kind)), kind, 16).astype(np.uint32)

        return (half(upper) << np.uint32(16)) | half(lower)

    return function


def _count_bits(kinds: list[str], modifiers: list[str]) -> Built:
    kind = kinds[0]

    def function(value: np.ndarray) -> np.ndarray:
        count = np.zeros(value.shape, np.uint32)
        for i in range(bits(kind)):
            count += ((value >> value.dtype.type(i)) & value.dtype.type(1)).astype(np.uint32)
        return count

    return Operation(function, (kind,), "u32"), set()


def _whole_quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Divide towards zero. For b = 0 a device's result is undefined."""
    one = b.dtype.type(1)
    safe = np.where(b == 0, one, b)
    down = a // safe
    return down + (((a < 0) != (safe < 0)) & (down * safe != a)).astype(a.dtype)


def _whole_rest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a - _whole_quotient(a, b) * b


def _reciprocal(v: np.ndarray) -> np.ndarray:
    return v.dtype.type(1) / v


_BUILDERS: dict[str, Callable[[list[str], list[str]], Built]] = {
    "add": _same(operator.add, 2),
    "sub": _same(operator.sub, 2),
    "mul": _product,
    "mad": _multiply_add,
    "fma": _fused,
    "div": _by_class(operator.truediv, _whole_quotient),
    "rem": _same(_whole_rest, 2),
    "neg": _same(operator.neg, 1),
    "abs": _same(np.abs, 1),
    "min": _extreme(np.fmin, np.minimum),
    "max": _extreme(np.fmax, np.maximum),
    "and": _same(operator.and_, 2),
    "or": _same(operator.or_, 2),
    "xor": _same(operator.xor, 2),
    "not": _same(operator.invert, 1),
    "shl": _shift(left=True),
    "shr": _shift(left=False),
    "bfe": _field,
    "prmt": _permute,
    "popc": _count_bits,
    "selp": _select,
    "setp": _compare,
    "cvt": _convert,
    "mov": _same(lambda v: v, 1),
    "ex2": _same(np.exp2, 1),
    "lg2": _same(np.log2, 1),
    "sqrt": _same(np.sqrt, 1),
    "rsqrt": _same(lambda v: _reciprocal(np.sqrt(v)), 1),
    "rcp": _same(_reciprocal, 1),
}
