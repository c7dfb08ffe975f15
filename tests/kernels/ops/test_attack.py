"""The start of an attack and its step, on every backend."""

import math

import pytest
import torch
from hypothesis import strategies as st

from engine import kernels

from .support import (
    ALPHA,
    EPS,
    HALF,
    LAYOUTS,
    SHAPES,
    check,
    check_bits,
    images,
    lay_out,
    normal,
    property_test,
    rng_state,
    skip_bfloat16,
)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_uniform_start_linf_has_the_reference_bits(backend, device, shape, layout):
    x, rng = images(shape, device, layout), rng_state(device, seed=-5, step=(3 << 32) + 1)
    assert check_bits("uniform_start", x, EPS, rng, stream=9).shape == x.shape


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_uniform_start_l2(backend, device, shape):
    # Box-Muller's sine, cosine and logarithm differ by some units between libraries.
    x, rng = images(shape, device), rng_state(device)
    check("uniform_start", x, 0.5, rng, norm="L2", stream=1, rounding=64)


def test_uniform_start_depends_on_seed_step_and_stream_only(backend, device):
    x = images((4, 3, 8, 8), device)
    draws = [
        kernels.uniform_start(x, EPS, rng_state(device, seed, step), stream=stream)
        for seed, step, stream in [
            (1, 1, 0),
            (2, 1, 0),
            (1, 2, 0),
            (1, 1, 1),
            (1 + (1 << 32), 1, 0),
        ]
    ]
    again = kernels.uniform_start(x, EPS, rng_state(device, 1, 1), stream=0)
    assert torch.equal(draws[0], again)
    for other in draws[1:]:
        assert not torch.equal(draws[0], other)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_uniform_start_with_no_radius_stays(backend, device, norm):
    x = images((2, 3, 5, 5), device)
    assert torch.equal(kernels.uniform_start(x, 0.0, rng_state(device), norm=norm), x)


def test_uniform_start_is_uniform(backend, device):
    x = torch.full((2, 1, 64, 64), 0.5, device=device)
    delta = (kernels.uniform_start(x, 0.25, rng_state(device)) - x).flatten().cpu() / 0.25
    assert abs(delta.mean()) < 0.03
    assert abs(delta.square().mean() - 1 / 3) < 0.02
    lengths = (
        kernels.uniform_start(
            torch.full((512, 2), 0.5, device=device), 0.25, rng_state(device), norm="L2"
        ).cpu()
        - 0.5
    ).norm(dim=1) / 0.25
    assert lengths.max() <= 1.0001
    # In two dimensions the radius has density 2r, so its mean is 2/3.
    assert abs(lengths.mean() - 2 / 3) < 0.04


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attack_step_linf_has_the_reference_bits(backend, device, shape, layout):
    x = images(shape, device, layout)
    z = (x + normal(shape, device, 0.05)).clamp(0, 1)
    # The gradient often arrives in another layout than the images.
    grad = normal(shape, device, seed=3)
    grad[grad.abs() < 0.2] = 0.0
    check_bits("attack_step", x, z, grad, EPS, ALPHA)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_attack_step_l2(backend, device, shape, layout, scale):
    x = images(shape, device, layout)
    z, grad = (x + normal(shape, device, 0.1)).clamp(0, 1), normal(shape, device, scale, seed=3)
    check("attack_step", x, z, grad, 0.5, 0.2, norm="L2")


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_attack_step_takes_half_precision_gradients(backend, device, interpreted, norm, dtype):
    skip_bfloat16(interpreted, dtype)
    x = images((3, 3, 7, 5), device)
    check("attack_step", x, x, normal(x.shape, device, dtype=dtype), EPS, ALPHA, norm=norm)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_attack_step_survives_bad_gradients(backend, device, norm, bad):
    x = images((3, 2, 5, 5), device)
    z, grad = (x + 0.01).clamp(0, 1), normal(x.shape, device)
    grad[1, 0, 2, 3] = bad
    out = check("attack_step", x, z, grad, 0.5, 0.1, norm=norm)
    assert torch.isfinite(out).all()
    if norm == "L2":
        torch.testing.assert_close(out[1], z[1], atol=1e-7, rtol=0)


def test_attack_step_l2_with_zero_gradient_stays(backend, device):
    x = images((2, 3, 5, 5), device)
    z = (x + 0.01).clamp(0, 1)
    out = kernels.attack_step(x, z, torch.zeros_like(x), 5.0, 0.1, norm="L2")
    torch.testing.assert_close(out, z, atol=1e-7, rtol=0)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_attack_step_with_no_radius_returns_the_centre(backend, device, norm):
    x = images((2, 3, 5, 5), device)
    out = kernels.attack_step(
        x, (x + 0.3).clamp(0, 1), normal(x.shape, device), 0.0, 0.1, norm=norm
    )
    torch.testing.assert_close(out, x, atol=0, rtol=0)


def test_attack_step_stays_in_ball_and_box(backend, device, interpreted):
    @property_test(
        interpreted,
        shape=st.tuples(st.integers(0, 3), *[st.integers(1, 9)] * 3),
        eps=st.floats(0, 1, width=32),
        alpha=st.floats(0, 2, width=32),
        norm=st.sampled_from(["Linf", "L2"]),
        layout=st.sampled_from(LAYOUTS),
        seed=st.integers(0, 1000),
    )
    def check_one(shape, eps, alpha, norm, layout, seed):
        x = images(shape, device, layout, seed)
        z, grad = images(shape, device, seed=seed + 1), normal(shape, device, seed=seed)
        out = check("attack_step", x, z, grad, eps, alpha, norm=norm, rounding=16)
        assert ((out >= 0) & (out <= 1)).all()
        delta = (out - x).flatten(1)
        size = delta.abs().amax(1) if norm == "Linf" else delta.norm(dim=1)
        assert (size <= eps + 1e-6 + 1e-6 * eps).all()


def check_in_place(x, z, grad, *, norm, eps=EPS, alpha=ALPHA):
    """The bits of `attack_step`, in `z`'s own memory."""
    expected = kernels.attack_step(x, z, grad, eps, alpha, norm=norm)
    centre, at = x.clone(), z.data_ptr()
    kernels.attack_step_(x, z, grad, eps, alpha, norm=norm)
    assert z.data_ptr() == at
    assert torch.equal(z, expected)
    assert torch.equal(x, centre)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attack_step_in_place_is_attack_step(backend, device, shape, layout, norm):
    x = images(shape, device, layout)
    z = lay_out((x + normal(shape, device, 0.05)).clamp(0, 1).cpu(), layout).to(device)
    check_in_place(x, z, normal(shape, device, seed=3), norm=norm)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_attack_step_in_place_takes_gradients_of_any_type(
    backend, device, interpreted, dtype, norm
):
    skip_bfloat16(interpreted, dtype)
    # More elements than one tile or chunk holds, and no multiple of either.
    shape = (5, 3, 33, 31)
    x, grad = images(shape, device), normal(shape, device, dtype=dtype)
    for layout in LAYOUTS[:2]:
        x = lay_out(x.cpu(), layout).to(device)
        z = lay_out((x + normal(shape, device, 0.02)).clamp(0, 1).cpu(), layout).to(device)
        check_in_place(x, z, grad, norm=norm)


def test_attack_step_in_place_over_several_steps(backend, device):
    x = images((2, 3, 8, 8), device)
    grads = [normal(x.shape, device, seed=s) for s in range(3)]
    z, out = x.clone(), x
    for grad in grads:
        kernels.attack_step_(x, z, grad, EPS, 1e-5)
        out = kernels.attack_step(x, out, grad, EPS, 1e-5)
    assert torch.equal(z, out)


def test_a_pending_backward_notices_the_step(backend, device):
    x = images((2, 3, 4, 4), device)
    z, weight = x.clone(), torch.ones((), device=device, requires_grad=True)
    loss = (z * weight).sum()
    kernels.attack_step_(x, z, x, EPS, ALPHA)
    with pytest.raises(RuntimeError, match="inplace"):
        loss.backward()
    with torch.inference_mode():
        kernels.attack_step_(x, x.clone(), x, EPS, ALPHA)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_attack_step_in_place_survives_bad_gradients(backend, device, norm):
    x = images((3, 2, 5, 5), device)
    grad = normal(x.shape, device)
    grad[0, 0, 0, 0], grad[1, 0, 2, 3] = math.nan, math.inf
    check_in_place(x, (x + 0.01).clamp(0, 1), grad, norm=norm)


def test_attack_step_in_place_refuses_a_z_of_another_layout(backend, device):
    x = images((2, 3, 4, 4), device)
    for z in (lay_out(x.cpu(), "channels_last"), lay_out(x.cpu(), "strided"), x[:1].expand_as(x)):
        z = z.to(device)
        before = z.clone()
        with pytest.raises(ValueError, match=r"\bz\b"):
            kernels.attack_step_(x, z, x, EPS, ALPHA)
        assert torch.equal(z, before)
