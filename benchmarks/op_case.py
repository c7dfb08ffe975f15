"""Hold one case of the op benchmark, and compare an op with its reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from engine.kernels import backends


@dataclass
class Case:
    """Hold one op at one shape.

    Attributes:
        op, eager: the same work by the engine's op and by plain PyTorch; `op` takes no arguments,
            `eager` takes `args`.
        check: raises AssertionError unless the op agrees with the reference in float64.
        bytes: the least that must be read and written.
    """

    name: str
    shape: str
    op: Callable[[], object]
    eager: Callable[..., object]
    args: tuple
    check: Callable[[], None]
    bytes: int


def close(actual: object, expected: object, tolerance: float = 2e-5) -> None:
    actual = actual if isinstance(actual, tuple) else (actual,)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for a, e in zip(actual, expected, strict=True):
        scale = max(1e-6, float(e.abs().max())) if e.numel() else 1.0
        error = float((a.double() - e.double()).abs().max()) if e.numel() else 0.0
        assert error <= tolerance * scale, f"error {error:.2e} against a value of {scale:.2e}"


def _wide(value: object) -> object:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.double()
    return value


def against_reference(op: Callable, *args: object, **options: object) -> Callable[[], None]:
    def check() -> None:
        out = op(*args, **options)
        with backends.use("reference"):
            expected = op(*map(_wide, args), **options)
        close(out, expected)

    return check


def name_of(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
