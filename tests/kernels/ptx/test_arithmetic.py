"""What the instructions of compiled kernels compute, against Python's exact numbers and PyTorch."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from engine.kernels.ptx.arithmetic import Unknown, operation
from engine.kernels.ptx.formats import decode, fma32, fma64, to_bfloat16


def apply(opcode, *values):
    return operation(opcode).function(*values)


def floats(kind, n=4000, seed=0):
    """Numbers of every size, and close ones, whose sums cancel."""
    draw = np.random.default_rng(seed)
    limit = 30 if kind == np.float32 else 300
    return (draw.normal(size=n) * 2.0 ** draw.integers(-limit, limit, n)).astype(kind)


def rounded(value, kind):
    """A fraction to the nearest float, ties to even, as Python's division gives it for float64."""
    if kind == np.float64:
        return value.numerator / value.denominator
    near = np.float32(value.numerator / value.denominator)
    around = [near, np.nextafter(near, np.float32(-np.inf)), np.nextafter(near, np.float32(np.inf))]
    even = [int(v.view(np.uint32)) & 1 for v in around]
    ordered = zip((abs(Fraction(float(v)) - value) for v in around), even, around, strict=True)
    return min(ordered, key=lambda entry: entry[:2])[2]


@pytest.mark.parametrize(("fma", "kind"), [(fma32, np.float32), (fma64, np.float64)])
def test_fused_products_are_rounded_once(fma, kind):
    a, b = floats(kind, seed=1), floats(kind, seed=2)
    # What is left of the product by its own rounding; numbers near it; numbers of any size.
    product = (a.astype(kind) * b).astype(kind)
    third = floats(kind, seed=3)
    for c in (-product, (-product * kind(1.0000001)).astype(kind), third):
        found = fma(a, b, c)
        for x, y, z, v in zip(a[:400], b[:400], c[:400], found[:400], strict=True):
            assert v == rounded(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)), kind)


def test_a_fused_product_that_would_be_rounded_twice():
    """The sum lies just below the middle of two float32, and at it once it is a float64."""
    a, b, c = (np.array([v], np.float32) for v in (2.0**-24 + 2.0**-39, 1 - 2.0**-15, 1 + 2.0**-23))
    twice = (a.astype(np.float64) * b + c).astype(np.float32)
    assert twice[0] == np.float32(1 + 2.0**-22)
    assert fma32(a, b, c)[0] == c[0]


def test_bfloat16_is_rounded_as_pytorch_rounds():
    values = np.concatenate(
        [floats(np.float32, 20000), np.array([np.inf, -np.inf, 0, -0.0, 3e38], np.float32)]
    )
    ours = torch.from_numpy(to_bfloat16(values).view(np.int16).copy())
    assert torch.equal(ours, torch.from_numpy(values).bfloat16().view(torch.int16))
    assert to_bfloat16(np.array([np.nan], np.float32))[0] == 0x7FFF


U32 = np.array([0, 1, 77, 0x80000000, 0xFFFFFFFF, 0x12345678], np.uint32)


def test_whole_numbers():
    a, b = np.repeat(U32, len(U32)), np.tile(U32, len(U32))
    pairs = list(zip(a.tolist(), b.tolist(), strict=True))
    assert apply("mul.hi.u32", a, b).tolist() == [x * y >> 32 for x, y in pairs]
    wide = apply("mul.wide.s32", a.view(np.int32), b.view(np.int32))
    signed = list(zip(a.view(np.int32).tolist(), b.view(np.int32).tolist(), strict=True))
    assert wide.tolist() == [x * y for x, y in signed]
    c, d = (
        a.astype(np.uint64) * np.uint64(0x123456789),
        b.astype(np.uint64) * np.uint64(0xFEDCBA987),
    )
    large = list(zip(c.tolist(), d.tolist(), strict=True))
    assert apply("mul.hi.u64", c, d).tolist() == [x * y >> 64 for x, y in large]
    assert apply("mul.lo.s32", a, b).tolist() == [x * y & 0xFFFFFFFF for x, y in pairs]
    short = a.astype(np.uint16)
    assert apply("mul.hi.u16", short, short).tolist() == [x * x >> 16 for x in short.tolist()]
    halves = apply("div.s32", a.view(np.int32), np.full(len(a), -3, np.int32))
    assert halves.tolist() == [math.trunc(Fraction(x, -3)) for x, _ in signed]
    assert apply("popc.b32", U32).tolist() == [bin(x).count("1") for x in U32.tolist()]


def test_shifts_past_the_width_empty_the_register():
    by = np.array([0, 4, 31, 32, 200, 1], np.uint32)
    assert apply("shl.b32", U32, by).tolist() == [
        (x << min(n, 32)) & 0xFFFFFFFF for x, n in zip(U32.tolist(), by.tolist(), strict=True)
    ]
    signed = U32.view(np.int32)
    assert apply("shr.s32", signed, by).tolist() == [
        x >> n for x, n in zip(signed.tolist(), by.tolist(), strict=True)
    ]


@pytest.mark.parametrize(
    ("position", "length"), [(0, 32), (4, 3), (28, 8), (31, 1), (5, 0), (40, 4)]
)
def test_bit_fields(position, length):
    where = (np.full(len(U32), position, np.uint32), np.full(len(U32), length, np.uint32))
    mask = (1 << length) - 1
    assert apply("bfe.u32", U32, *where).tolist() == [x >> position & mask for x in U32.tolist()]
    signed = U32.view(np.int32)
    wanted = [
        (x >> position & mask) - ((x >> position & mask) >> max(length - 1, 0) << length)
        for x in signed.tolist()
    ]
    assert apply("bfe.s32", signed, *where).tolist() == (wanted if length else [0] * len(U32))


def test_bytes_are_picked_and_their_signs_spread():
    a, b = np.array([0x83020100], np.uint32), np.array([0x07060584], np.uint32)
    assert apply("prmt.b32", a, b, np.array([0x7430], np.uint32)).tolist() == [0x07848300]
    assert apply("prmt.b32", a, b, np.array([0xB8C4], np.uint32)).tolist() == [0xFF00FF84]


def test_floats_meet_nan_as_the_isa_says():
    nan, one = np.array([np.nan], np.float32), np.array([1], np.float32)
    assert apply("max.f32", nan, one)[0] == 1
    assert math.isnan(apply("max.NaN.f32", nan, one)[0])
    assert apply("min.f32", one, nan)[0] == 1
    for name, wanted in {
        "lt": 0,
        "ge": 0,
        "ne": 0,
        "eq": 0,
        "geu": 1,
        "neu": 1,
        "nan": 1,
        "num": 0,
    }.items():
        assert apply(f"setp.{name}.f32", nan, one)[0] == bool(wanted), name


def test_floats_become_whole_numbers_within_the_range():
    values = np.array([1.5, -1.5, 2.5, 1e20, -1e20, np.nan, np.inf], np.float32)
    top, bottom = 2**31 - 1, -(2**31)
    assert apply("cvt.rni.s32.f32", values).tolist() == [2, -2, 2, top, bottom, 0, top]
    assert apply("cvt.rzi.s32.f32", values).tolist() == [1, -1, 2, top, bottom, 0, top]
    assert apply("cvt.rmi.f32.f32", values)[:3].tolist() == [1, -2, 2]
    assert apply("cvt.rzi.u32.f32", values).tolist() == [1, 0, 2, 2**32 - 1, 0, 0, 2**32 - 1]


@pytest.mark.parametrize(
    ("opcode", "exact", "units"),
    [
        ("ex2.approx.ftz.f32", np.exp2, 2),
        ("sqrt.approx.f32", np.sqrt, 1),
        ("rcp.approx.f32", np.reciprocal, 1),
    ],
)
def test_approximate_results_are_off_by_a_unit_or_two(opcode, exact, units):
    values = np.random.default_rng(0).uniform(0.5, 20, 5000).astype(np.float32)
    found, rounded = apply(opcode, values), exact(values)
    gaps = found.view(np.int32) - rounded.view(np.int32)
    assert set(gaps.tolist()) == set(range(-units, units + 1))
    assert np.array_equal(found, apply(opcode, values))
    special = np.array([np.inf, np.nan], np.float32)
    assert np.array_equal(apply(opcode, special), exact(special), equal_nan=True)


def test_ftz_takes_subnormal_numbers_as_zero():
    small, one = np.array([1e-40, -1e-40], np.float32), np.ones(2, np.float32)
    assert apply("mul.f32", small, one).tolist() == small.tolist()
    flushed = apply("mul.ftz.f32", small, one)
    assert flushed.tolist() == [0, 0]
    assert np.signbit(flushed).tolist() == [False, True]


def test_operands_of_16_bits_meet_those_of_32():
    """sub.f32.bf16 on a device of compute capability 10 takes a bfloat16 and a float32."""
    found = operation("sub.rn.f32.bf16")
    assert found.operands == ("bf16", "f32")
    half, one = np.array([0x3FC0], np.uint16), np.array([0.25], np.float32)
    assert found.function(decode(half, "bf16"), one)[0] == 1.25
    found = operation("fma.rn.f32.f16")
    assert found.operands == ("f16", "f16", "f32")
    half = np.array([1.5], np.float16)
    assert found.function(half, half, one)[0] == 2.5


@pytest.mark.parametrize(
    "opcode",
    [
        "add.rz.f32",
        "add.sat.f32",
        "fma.rn.f16x2",
        "mul.f32.bf16",
        "add.f64.f32",
        "max.bf16x2",
        "ex2.approx.f16",
        "cvt.rn.bf16.f64",
        "fma.rn.bf16",
        "wgmma.mma_async",
        "cvt.rzi.s64.f32",
        "mul.hi.s64",
    ],
)
def test_what_is_not_known_is_refused(opcode):
    with pytest.raises(Unknown, match="PTX instruction not known"):
        apply(opcode, *[np.ones(1, np.float32)] * len(operation(opcode).operands))
