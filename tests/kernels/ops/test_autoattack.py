"""The steps of APGD and FAB, on every backend."""

import pytest
import torch

from engine import kernels

from .support import EPS, LAYOUTS, SHAPES, check, check_bits, images, lay_out, normal

NORMS = ["Linf", "L2"]


def climb(shape, device, layout="contiguous"):
    x = images(shape, device, layout)
    z, last = (
        lay_out((x + normal(shape, device, 0.05, seed)).clamp(0, 1), layout) for seed in (2, 3)
    )
    grad = lay_out(normal(shape, device, seed=4), layout)
    return x, z, last, grad, normal(shape[:1], device, 0.05, seed=5).abs()


def plane(shape, device, layout="contiguous"):
    x, z, _, normals, _ = climb(shape, device, layout)
    # Flat slopes; a plane through the point; planes that the box does not reach.
    normals[normals.abs() < 0.3] = 0.0
    gap = normal(shape[:1], device, 3.0, seed=6)
    gap[1:2], gap[2:3] = 0.0, 1e4
    return x, z, normals, gap


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_apgd_step_linf_has_the_reference_bits(backend, device, shape, layout):
    for momentum in (1.0, 0.75):
        check_bits("apgd_step", *climb(shape, device, layout), eps=EPS, momentum=momentum)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_apgd_step_l2(backend, device, shape, layout):
    for momentum in (1.0, 0.75):
        args = climb(shape, device, layout)
        check("apgd_step", *args, eps=0.3, momentum=momentum, norm="L2", rounding=8)


@pytest.mark.parametrize("norm", NORMS)
def test_apgd_step_ignores_useless_gradients(backend, device, norm):
    x, z, _, grad, step = climb((3, 1, 5, 5), device)
    grad[0], grad[1, 0, 0, 0] = 0.0, float("nan")
    moved = kernels.apgd_step(x, z, z, grad, step, eps=1.0, momentum=1.0, norm=norm)
    assert torch.equal(moved[0], z[0]) if norm == "Linf" else torch.allclose(moved[0], z[0])
    assert not moved.isnan().any()
    assert moved[1, 0, 0, 0] == pytest.approx(float(z[1, 0, 0, 0]), abs=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fab_step(backend, device, shape, layout, norm):
    # The sums that Newton's method solves for are rounded in another order.
    check("fab_step", *plane(shape, device, layout), norm=norm, rounding=64)


@pytest.mark.parametrize("norm", NORMS)
def test_fab_step_reaches_the_plane(backend, device, norm):
    """From the clean image the overshoot is 1.05 of the way to a plane within the box."""
    x = 0.4 + 0.2 * images((6, 1, 6, 7), device)
    normals, gap = normal(x.shape, device), torch.full((6,), -0.8, device=device)
    moved = kernels.fab_step(x, x, normals, gap, norm=norm)
    height = (normals * (moved - x)).flatten(1).sum(1)
    torch.testing.assert_close(height, torch.full_like(gap, 1.05 * 0.8), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_fab_step_ignores_slopes_of_nan(backend, device, norm):
    x, z, normals, gap = plane((2, 1, 5, 5), device)
    clean = normals.clone()
    normals[0, 0, 0, 0], clean[0, 0, 0, 0] = float("nan"), 0.0
    moved = kernels.fab_step(x, z, normals, gap, norm=norm)
    assert torch.equal(moved, kernels.fab_step(x, z, clean, gap, norm=norm))
