"""Say how far an op's result may lie from the reference in float64.

The rule: an op's largest error may be twice that of the reference run in the inputs' own precision,
plus a few units of rounding. It holds for float32 and for half precision alike.
"""

from __future__ import annotations

from torch import Tensor

FLOAT_EPS = 2.0**-23


def error(actual: Tensor, plain: Tensor, exact: Tensor, rounding: float) -> tuple[float, float]:
    """Return the largest error of `actual` and the largest that is allowed.

    Entries where `exact` is not finite are left out.

    Args:
        actual, plain, exact: the op's result, the reference's in the inputs' own precision, and the
            reference's in float64; all of one shape.
        rounding: units of 2^-23, of the largest entry or 1e-3, that are allowed besides.
    """
    usable = exact.isfinite()
    if not usable.any():
        return 0.0, 0.0
    actual, plain, exact = (t.double()[usable] for t in (actual, plain, exact))
    size = exact.abs().max().clamp_min(1e-3)
    allowed = 2 * (plain - exact).abs().max() + rounding * FLOAT_EPS * size
    return float((actual - exact).abs().max()), float(allowed)
