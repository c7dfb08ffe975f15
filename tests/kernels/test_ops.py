"""Every op on every backend against the reference in float64: values, gradients, edges, errors.

The rule for accuracy: an op's largest error may be twice that of the reference run in the inputs' own
precision, plus a few units of rounding. It holds for float32 and for half precision alike.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from engine import kernels
from engine.kernels import backends, reference

FLOAT_EPS = 2.0**-23
EPS, ALPHA = 8 / 255, 10 / 255
SHAPES = [(3, 1, 28, 28), (2, 3, 7, 5), (5, 3, 1, 1), (1, 2, 3, 67), (4, 13), (0, 3, 4, 4)]
LAYOUTS = ["contiguous", "channels_last", "strided"]
HALF = [torch.float16, torch.bfloat16]


def property_test(interpreted, **strategies):
    """Run the decorated function on drawn arguments; few times where Triton is interpreted."""

    def run(check_one):
        options = settings(max_examples=5 if interpreted else 40, deadline=None, derandomize=True)
        options(given(**strategies)(check_one))()

    return run


# ---- inputs and comparison -------------------------------------------------------------------


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def lay_out(t, layout):
    """The same values as `t` under other strides."""
    if layout == "channels_last" and t.dim() == 4:
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "strided":
        wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), float("nan"))
        wide[..., ::2] = t
        return wide[..., ::2]
    return t


def images(shape, device, layout="contiguous", seed=0):
    return lay_out(torch.rand(shape, generator=generator(seed)), layout).to(device)


def normal(shape, device, scale=1.0, seed=1, dtype=torch.float32):
    return (torch.randn(shape, generator=generator(seed)) * scale).to(dtype).to(device)


def targets(rows, classes, device, seed=2):
    return torch.randint(0, classes, (rows,), generator=generator(seed)).to(device)


def skip_bfloat16(interpreted, dtype):
    if interpreted and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter has no bfloat16")


def rng_state(device, seed=1234567890123, step=7):
    return torch.tensor([seed, step], dtype=torch.int64, device=device)


def plainly(op, *args, **options):
    """The reference's answer in the inputs' own precision, on the CPU."""
    on_cpu = [a.detach().cpu() if isinstance(a, torch.Tensor) else a for a in args]
    with backends.use("reference"):
        return getattr(kernels, op)(*on_cpu, **options)


def exactly(op, *args, **options):
    """The reference's answer in float64: every floating tensor is widened first."""

    def wide(a):
        return a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a

    return plainly(op, *map(wide, args), **options)


def assert_accurate(name, actual, plain, exact, rounding=4.0):
    """max |actual - exact| <= 2 max |plain - exact| + rounding * eps * max(|exact|, 1e-3)."""
    actual, plain = actual.detach().cpu(), plain.detach()
    assert actual.shape == exact.shape, name
    assert actual.dtype == plain.dtype, name
    assert torch.equal(actual.isnan(), exact.isnan()), f"{name}: NaN where none belongs, or none"
    usable = torch.isfinite(exact)
    if not usable.any():
        return
    actual, plain, exact = (t.double()[usable] for t in (actual, plain, exact))
    size = exact.abs().max().clamp_min(1e-3)
    allowed = 2 * (plain - exact).abs().max() + rounding * FLOAT_EPS * size
    error = (actual - exact).abs().max()
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"


def check(op, *args, rounding=4.0, **options):
    """The op on the backend in use against the reference; returns its output."""
    out = getattr(kernels, op)(*args, **options)
    plain, exact = plainly(op, *args, **options), exactly(op, *args, **options)
    assert_accurate(op, out, plain, exact, rounding)
    return out


def check_bits(op, *args, **options):
    out = getattr(kernels, op)(*args, **options)
    assert torch.equal(out.cpu(), plainly(op, *args, **options))
    return out


# ---- uniform_start ---------------------------------------------------------------------------


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


# ---- attack_step -----------------------------------------------------------------------------


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


# ---- attack_step_ ----------------------------------------------------------------------------


def check_in_place(x, z, grad, *, norm, network_input=None, eps=EPS, alpha=ALPHA):
    """The bits of `attack_step`, in `z`'s own memory and, rounded, in `network_input`."""
    expected = kernels.attack_step(x, z, grad, eps, alpha, norm=norm)
    centre, at = x.clone(), z.data_ptr()
    kernels.attack_step_(x, z, grad, eps, alpha, norm=norm, network_input=network_input)
    assert z.data_ptr() == at
    assert torch.equal(z, expected)
    assert torch.equal(x, centre)
    if network_input is not None:
        assert torch.equal(network_input, expected.to(network_input.dtype))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("input_layout", [None, *LAYOUTS[:2]])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attack_step_in_place_is_attack_step(backend, device, shape, layout, input_layout, norm):
    x = images(shape, device, layout)
    z = lay_out((x + normal(shape, device, 0.05)).clamp(0, 1).cpu(), layout).to(device)
    network_input = None
    if input_layout:
        network_input = lay_out(torch.full(shape, math.nan), input_layout).half().to(device)
    check_in_place(x, z, normal(shape, device, seed=3), norm=norm, network_input=network_input)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_attack_step_writes_the_network_input_in_its_type(
    backend, device, interpreted, dtype, norm
):
    skip_bfloat16(interpreted, dtype)
    # More elements than one tile or chunk holds, and no multiple of either.
    shape = (5, 3, 33, 31)
    x, grad = images(shape, device), normal(shape, device, dtype=dtype)
    for layout in LAYOUTS[:2]:
        z = (x + normal(shape, device, 0.02)).clamp(0, 1)
        network_input = lay_out(torch.full(shape, math.nan, dtype=dtype), layout).to(device)
        check_in_place(x, z, grad, norm=norm, network_input=network_input)


def test_attack_step_in_place_over_several_steps(backend, device):
    x = images((2, 3, 8, 8), device)
    grads = [normal(x.shape, device, seed=s) for s in range(3)]
    z, out = x.clone(), x
    network_input = torch.empty_like(x, dtype=torch.float16)
    for grad in grads:
        kernels.attack_step_(x, z, grad, EPS, 1e-5, network_input=network_input)
        out = kernels.attack_step(x, out, grad, EPS, 1e-5)
    # Steps below float16's resolution add up: the iterate itself is never rounded.
    assert torch.equal(z, out)
    assert torch.equal(network_input, out.half())


@pytest.mark.parametrize("which", ["z", "network_input"])
def test_a_pending_backward_notices_the_step(backend, device, which):
    x = images((2, 3, 4, 4), device)
    tensors = {"z": x.clone(), "network_input": x.clone()}
    weight = torch.ones((), device=device, requires_grad=True)
    loss = (tensors[which] * weight).sum()
    kernels.attack_step_(x, grad=x, eps=EPS, alpha=ALPHA, **tensors)
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


# ---- input_grad_step -------------------------------------------------------------------------

# (C, O, kernel height, kernel width, stride, padding, H, W)
STEMS = [
    (1, 16, 4, 4, 2, 1, 28, 28),
    (1, 32, 3, 3, 1, 0, 28, 28),
    (3, 64, 3, 3, 1, 1, 32, 32),
    (3, 5, 3, 3, 2, 1, 9, 7),
    (2, 4, 5, 3, 2, 2, 11, 8),
    (4, 6, 3, 3, 1, 1, 6, 6),
    (1, 3, 1, 1, 1, 0, 5, 5),
    (3, 7, 2, 2, 3, 0, 8, 10),
    (2, 5, 7, 7, 2, 3, 9, 8),
]


def stem_inputs(stem, batch, device, layout="contiguous", dtype=torch.float32, whole=False):
    c, o, kh, kw, stride, padding, h, w = stem
    out_h, out_w = (h + 2 * padding - kh) // stride + 1, (w + 2 * padding - kw) // stride + 1
    x = images((batch, c, h, w), device, layout)
    z = (x + normal(x.shape, device, 0.02)).clamp(0, 1)
    if whole:
        # Sums of small whole numbers are exact in any order, and so are their signs.
        gy = torch.randint(-2, 3, (batch, o, out_h, out_w), generator=generator(4)).to(dtype)
        weight = torch.randint(-2, 3, (o, c, kh, kw), generator=generator(5)).float()
        gy, weight = gy.to(device), weight.to(device)
    else:
        gy = normal((batch, o, out_h, out_w), device, 1e-3, seed=4, dtype=dtype)
        weight = normal((o, c, kh, kw), device, 0.2, seed=5)
    return x, z, lay_out(gy, layout), weight, stride, padding


def check_stem(args, exact_signs=False, **options):
    """Like `check`; with `exact_signs` the bits must match."""
    *tensors, stride, padding = args
    options = {"stride": stride, "padding": padding, "eps": EPS, "alpha": ALPHA, **options}
    return (check_bits if exact_signs else check)("input_grad_step", *tensors, **options)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stem", STEMS, ids=str)
def test_input_grad_step_linf_has_the_exact_signs(backend, device, interpreted, stem, layout):
    check_stem(
        stem_inputs(stem, 1 if interpreted else 5, device, layout, whole=True), exact_signs=True
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stem", STEMS, ids=str)
def test_input_grad_step_l2(backend, device, interpreted, stem, layout):
    check_stem(stem_inputs(stem, 1 if interpreted else 5, device, layout), norm="L2", rounding=8)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_input_grad_step_takes_half_precision_gradients(backend, device, interpreted, dtype):
    skip_bfloat16(interpreted, dtype)
    check_stem(stem_inputs(STEMS[3], 2, device, dtype=dtype, whole=True), exact_signs=True)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_input_grad_step_survives_bad_gradients(backend, device, norm):
    args = stem_inputs(STEMS[4], 3, device)
    args[2][1, 1, 2, 2] = math.nan
    assert torch.isfinite(check_stem(args, norm=norm)).all()


def test_input_grad_step_of_an_empty_batch(backend, device):
    assert check_stem(stem_inputs(STEMS[0], 0, device)).shape == (0, 1, 28, 28)


@pytest.mark.parametrize("stem", STEMS[:5], ids=str)
def test_input_grad_step_is_the_convolutions_gradient(stem):
    """The reference itself against autograd through the convolution, in float64."""
    x, z, gy, weight, stride, padding = stem_inputs(stem, 2, "cpu")
    x, z, gy, weight = (t.double() for t in (x, z, gy, weight))
    point = z.clone().requires_grad_()
    out = torch.nn.functional.conv2d(point, weight, stride=stride, padding=padding)
    (grad,) = torch.autograd.grad(out, point, gy)
    half, tenth = torch.tensor([0.5, 0.1], dtype=torch.float64)
    expected = reference.attack_step(x, z, grad, half, tenth, "L2")
    out = reference.input_grad_step(x, z, gy, weight, stride, padding, half, tenth, "L2")
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)


def test_input_grad_step_of_any_convolution(backend, device, interpreted):
    @property_test(
        interpreted,
        batch=st.integers(0, 2),
        channels=st.integers(1, 3),
        out_channels=st.integers(1, 20),
        kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
        stride=st.integers(1, 3),
        padding=st.integers(0, 2),
        size=st.tuples(st.integers(4, 13), st.integers(4, 13)),
        layout=st.sampled_from(LAYOUTS),
    )
    def check_one(batch, channels, out_channels, kernel, stride, padding, size, layout):
        stem = (channels, out_channels, *kernel, stride, padding, *size)
        check_stem(stem_inputs(stem, batch, device, layout, whole=True), exact_signs=True)


# ---- gradients from logits -------------------------------------------------------------------

ROWS = [(7, 10), (1, 2), (33, 3), (5, 1), (4, 100), (3, 1000), (0, 10)]


def logit_inputs(shape, device, dtype=torch.float32, scale=3.0):
    return tuple(normal(shape, device, scale, seed, dtype) for seed in (11, 12, 13))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_logit_gradients(backend, device, interpreted, shape, dtype):
    skip_bfloat16(interpreted, dtype)
    p, q, _ = logit_inputs(shape, device, dtype)
    check("cross_entropy_grad", q, targets(*shape, device), scale=3.0)
    check("kl_grad", p, q, scale=0.5)


def test_logit_gradients_of_strided_logits(backend, device):
    p, q, _ = (lay_out(t.t(), "strided").t() for t in logit_inputs((6, 10), device))
    check("cross_entropy_grad", q, targets(6, 10, device))
    check("kl_grad", p, q)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logit_gradients_keep_a_bad_row_to_itself(backend, device, bad):
    p, q, _ = logit_inputs((6, 10), device)
    q[2, 4] = bad
    target = targets(6, 10, device)
    for out in (kernels.cross_entropy_grad(q, target), kernels.kl_grad(p, q)):
        assert out[2].isnan().all()
        assert torch.isfinite(out[[0, 1, 3, 4, 5]]).all()


def test_logit_gradients_of_an_excluded_class(backend, device):
    _, q, _ = logit_inputs((4, 10), device)
    q[:, 3] = -math.inf
    check("cross_entropy_grad", q, torch.zeros(4, dtype=torch.int64, device=device))


def test_logit_gradients_are_those_of_the_losses():
    """The reference's formulas against autograd through the losses, in float64."""
    p, q, _ = (t.double() for t in logit_inputs((5, 7), "cpu"))
    target, q = targets(5, 7, "cpu"), q.requires_grad_()
    (ce,) = torch.autograd.grad(torch.nn.functional.cross_entropy(q, target, reduction="sum"), q)
    torch.testing.assert_close(reference.cross_entropy_grad(q.detach(), target, 1.0), ce)
    kl_loss = torch.nn.functional.kl_div(
        q.log_softmax(1), p.log_softmax(1), reduction="sum", log_target=True
    )
    (kl,) = torch.autograd.grad(kl_loss, q)
    torch.testing.assert_close(reference.kl_grad(p, q.detach(), 1.0), kl)


# ---- local_ball_loss -------------------------------------------------------------------------

TERMS = {"all": (True, True), "local": (True, False), "global": (False, True), "ce": (False, False)}


def loss_and_gradients(adv, target, ball, clean, lam, mu, smoothing, factor):
    """Through the op and autograd, on whichever backend is in use."""
    leaves = [
        None if t is None else t.detach().clone().requires_grad_() for t in (adv, ball, clean)
    ]
    loss, stats = kernels.local_ball_loss(
        leaves[0], target, leaves[1], leaves[2], lam=lam, mu=mu, label_smoothing=smoothing
    )
    (loss * factor).backward()
    return loss, stats, *(None if t is None else t.grad for t in leaves)


def check_loss(adv, target, ball, clean, lam=2.0, mu=0.7, smoothing=0.0, rounding=16.0):
    factor = 1.5
    got = loss_and_gradients(adv, target, ball, clean, lam, mu, smoothing, factor)
    wanted = []
    for widen in (lambda t: t.detach().cpu(), lambda t: t.detach().cpu().double()):
        a, b, c = (None if t is None else widen(t) for t in (adv, ball, clean))
        weights = (widen(torch.tensor(lam)), widen(torch.tensor(mu)))
        loss, stats = reference.local_ball_loss(a, target.cpu(), b, c, *weights, smoothing)
        upstream = torch.full((), factor, dtype=loss.dtype)
        grads = reference.local_ball_loss_backward(
            upstream, a, target.cpu(), b, c, *weights, smoothing
        )
        wanted.append((loss, stats[:3], *grads, stats[3:]))
    plain, exact = wanted
    got = (got[0], got[1][:3], *got[2:], got[1][3:])
    names = ("loss", "stats", "grad_adv", "grad_ball", "grad_clean", "counts")
    for name, actual, low, high in zip(names, got, plain, exact, strict=True):
        if actual is not None:
            assert_accurate(name, actual, low, high, rounding)
    # Counts are compared in the inputs' own precision: widening cannot make or break a tie.
    assert torch.equal(got[-1].cpu(), plain[-1])
    return got


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_loss_and_gradients(backend, device, shape, terms, smoothing):
    adv, ball, clean = logit_inputs(shape, device)
    with_ball, with_clean = TERMS[terms]
    check_loss(
        adv,
        targets(*shape, device),
        ball if with_ball else None,
        clean if with_clean else None,
        smoothing=smoothing,
    )


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_loss_and_gradients_in_half_precision(backend, device, interpreted, shape, dtype):
    skip_bfloat16(interpreted, dtype)
    adv, ball, clean = logit_inputs(shape, device, dtype)
    check_loss(adv, targets(*shape, device), ball, clean, smoothing=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_loss_is_finite_for_extreme_logits(backend, device, dtype, classes):
    signs = (torch.randint(0, 2, (3, 9, classes), generator=generator()) * 2 - 1).to(device)
    adv, ball, clean = (1e4 * signs).to(dtype)
    got = check_loss(adv, targets(9, classes, device), ball, clean)
    for t in got:
        assert torch.isfinite(t).all()


def test_loss_of_strided_logits(backend, device):
    adv, ball, clean = (lay_out(t, "strided") for t in logit_inputs((6, 10), device))
    check_loss(adv, targets(6, 10, device), ball, clean)


def test_loss_with_identical_logits_has_no_divergence(backend, device):
    adv, _, _ = logit_inputs((6, 10), device)
    loss, stats = kernels.local_ball_loss(adv, targets(6, 10, device), adv.clone(), adv.clone())
    assert stats[1] == 0
    assert stats[2] == 0
    assert loss == stats[0]


def test_loss_counts_take_the_first_of_equal_classes(backend, device):
    flat = torch.ones(4, 10, device=device)
    target = torch.tensor([0, 0, 1, 9], device=device)
    _, stats = kernels.local_ball_loss(flat, target, flat, flat)
    assert stats[3:].tolist() == [2, 2, 2]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_loss_of_a_nan_is_nan(backend, device, which):
    logits = logit_inputs((6, 10), device)
    logits[which][3, 3] = math.nan
    adv, ball, clean = logits
    loss, *_, grad_adv, grad_ball, grad_clean = loss_and_gradients(
        adv, targets(6, 10, device), ball, clean, 1.0, 1.0, 0.0, 1.0
    )
    assert loss.isnan()
    assert grad_adv[3].isnan().any()
    others = [0, 1, 2, 4, 5]
    for grad in (grad_adv, grad_ball, grad_clean):
        assert torch.isfinite(grad[others]).all()


def test_loss_of_any_shape_and_weight(backend, device, interpreted):
    @property_test(
        interpreted,
        rows=st.integers(0, 40),
        classes=st.integers(1, 130),
        terms=st.sampled_from(sorted(TERMS)),
        scale=st.sampled_from([0.0, 0.1, 10.0, 300.0]),
        lam=st.floats(0, 10, width=32),
        mu=st.floats(0, 10, width=32),
        smoothing=st.floats(0, 0.9),
    )
    def check_one(rows, classes, terms, scale, lam, mu, smoothing):
        adv, ball, clean = logit_inputs((rows, classes), device, scale=scale)
        with_ball, with_clean = TERMS[terms]
        target = targets(rows, classes, device)
        ball, clean = ball if with_ball else None, clean if with_clean else None
        check_loss(adv, target, ball, clean, lam, mu, smoothing, rounding=64)


@pytest.mark.parametrize("terms", TERMS)
def test_gradcheck_of_the_reference(terms):
    with_ball, with_clean = TERMS[terms]
    adv, ball, clean = (t.double().requires_grad_() for t in logit_inputs((4, 5), "cpu", scale=1.0))
    target = targets(4, 5, "cpu")

    def loss(*logits):
        given_logits = iter(logits)
        return kernels.local_ball_loss(
            next(given_logits),
            target,
            next(given_logits) if with_ball else None,
            next(given_logits) if with_clean else None,
            lam=2.0,
            mu=0.5,
            label_smoothing=0.1,
        )[0]

    wanted = [adv] + [ball] * with_ball + [clean] * with_clean
    with backends.use("reference"):
        assert torch.autograd.gradcheck(loss, wanted)


# ---- augment, recall, remember ---------------------------------------------------------------

DATA = [((9, 1, 28, 28), 2), ((6, 3, 7, 5), 4), ((4, 3, 8, 67), 0), ((3, 2, 1, 1), 0)]


def dataset(shape, device):
    return torch.randint(0, 256, shape, generator=generator(21), dtype=torch.uint8).to(device)


def indices(n, batch, device, seed=22):
    return torch.randint(0, n, (batch,), generator=generator(seed)).to(device)


@pytest.mark.parametrize(("flip", "cutout"), [(False, 0), (True, 3), (True, 4)])
@pytest.mark.parametrize("batch", [0, 1, 11])
@pytest.mark.parametrize(("shape", "pad"), DATA, ids=str)
def test_augment_has_the_reference_bits(backend, device, shape, pad, batch, flip, cutout):
    args = (dataset(shape, device), indices(shape[0], batch, device))
    args = (*args, rng_state(device, seed=-1, step=1 << 40))
    options = {"pad": pad, "flip": flip, "cutout": min(cutout, shape[2]), "stream": 5}
    *outputs, start = kernels.augment(*args, **options)
    for out, expected in zip(outputs, plainly("augment", *args, **options)[:2], strict=True):
        assert torch.equal(out.cpu(), expected)
    assert start is None


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("batch", [0, 1, 11])
@pytest.mark.parametrize("eps", [0.0, 0.3])
@pytest.mark.parametrize(("shape", "pad"), DATA, ids=str)
def test_augment_forms_the_start_that_recall_gives(backend, device, shape, pad, eps, batch, norm):
    memory = torch.randint(-127, 128, shape, generator=generator(23), dtype=torch.int8).to(device)
    # Twice the same sample under two crops is no rarity here.
    data, index = dataset(shape, device), indices(shape[0], batch, device)
    options = {"pad": pad, "flip": True, "cutout": min(3, shape[2]), "stream": 5}
    x, where, start = kernels.augment(
        data, index, rng_state(device), memory=memory, eps=eps, norm=norm, **options
    )
    alone = kernels.augment(data, index, rng_state(device), **options)
    assert torch.equal(x, alone[0])
    assert torch.equal(where, alone[1])
    assert torch.equal(start, kernels.recall(memory, index, where, x, eps, norm=norm))


def test_augment_draws_every_shift_and_both_mirrors(backend, device):
    data, index = dataset((4, 1, 8, 8), device), indices(4, 256, device)
    _, where, _ = kernels.augment(data, index, rng_state(device), pad=1, flip=True)
    where = where.cpu()
    assert {tuple(w) for w in where[:, :2].tolist()} == {
        (dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)
    }
    assert 0.3 < where[:, 2].float().mean() < 0.7


def test_cutout_is_a_square_that_lies_anywhere(backend, device):
    data, index = (
        torch.full((1, 2, 8, 8), 255, dtype=torch.uint8, device=device),
        indices(1, 400, device),
    )
    x, _, _ = kernels.augment(data, index, rng_state(device), cutout=3)
    holes = (x.cpu() == 0).all(dim=1)
    assert torch.equal(holes, (x.cpu() == 0).any(dim=1))  # in all channels alike
    sizes = holes.flatten(1).sum(1)
    assert {int(n) for n in sizes} == {4, 6, 9}  # cut at a corner, at an edge, whole
    # Every pixel is as likely the centre: 1 in 64, over 400 draws.
    centres = {
        (int(h.any(1).nonzero().float().mean() * 2), int(h.any(0).nonzero().float().mean() * 2))
        for h in holes
    }
    assert len(centres) > 45


def memory_inputs(shape, pad, batch, device, layout="contiguous"):
    """A filled memory, distinct indices and an augmented batch."""
    memory = torch.randint(-127, 128, shape, generator=generator(23), dtype=torch.int8).to(device)
    index = torch.randperm(shape[0], generator=generator(24))[:batch].to(device)
    with backends.use("reference"):
        x, where, _ = kernels.augment(
            dataset(shape, device), index, rng_state(device), pad=pad, flip=True
        )
    return memory, index, where, lay_out(x, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize(("shape", "pad"), DATA, ids=str)
def test_recall(backend, device, shape, pad, norm, layout):
    check("recall", *memory_inputs(shape, pad, 3, device, layout), 0.3, norm=norm)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "pad"), DATA, ids=str)
def test_remember(backend, device, shape, pad, layout):
    memory, index, where, x = memory_inputs(shape, pad, 3, device, layout)
    z = (x + normal(x.shape, device, 0.1)).clamp(0, 1)
    expected = memory.cpu().clone()
    plainly("remember", expected, index, where, x, z, 0.2)
    kernels.remember(memory, index, where, x, z, 0.2)
    gap = (memory.cpu().int() - expected.int()).abs()
    # A division that is not IEEE's may round a tie the other way.
    assert gap.max() <= 1
    assert (gap > 0).float().mean() < 0.01


@pytest.mark.parametrize(("shape", "pad"), DATA, ids=str)
def test_what_is_remembered_is_recalled(backend, device, shape, pad):
    memory, index, where, x = memory_inputs(shape, pad, 3, device)
    eps = 0.3
    z = kernels.uniform_start(x, eps, rng_state(device))
    before = memory.clone()
    kernels.remember(memory, index, where, x, z, eps)
    again = kernels.recall(memory, index, where, x, eps)
    # What the crop shows of the padding is not stored, and comes back as x.
    h, w = shape[2:]
    _, inside = reference._source_pixels(where.cpu(), h, w)
    inside = inside.view(-1, 1, h, w).expand(x.shape)
    again, x, z = again.cpu(), x.cpu(), z.cpu()
    assert ((again - z).abs()[inside] <= 0.51 * eps / 127).all()
    assert torch.equal(again[~inside], x[~inside])
    untouched = [i for i in range(shape[0]) if i not in index.tolist()]
    assert torch.equal(memory[untouched], before[untouched])


def test_remember_and_recall_with_no_radius(backend, device):
    memory, index, where, x = memory_inputs((6, 3, 7, 5), 2, 4, device)
    kernels.remember(memory, index, where, x, x, 0.0)
    assert torch.equal(kernels.recall(memory, index, where, x, 0.0), x)


def test_memory_of_an_empty_batch(backend, device):
    memory, index, where, x = memory_inputs((6, 3, 7, 5), 2, 0, device)
    before = memory.clone()
    kernels.remember(memory, index, where, x, x, 0.1)
    assert torch.equal(memory, before)
    assert kernels.recall(memory, index, where, x, 0.1).shape == x.shape


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("shape", "out", "kernel", "stride", "padding"),
    [
        ((5, 1, 28, 28), 16, (4, 4), 2, 1),
        ((3, 1, 9, 7), 5, (3, 3), 1, 0),
        ((9, 3, 8, 8), 40, (3, 3), 1, 1),
        ((17, 2, 6, 11), 3, (1, 5), 3, 2),
        ((0, 3, 8, 8), 4, (3, 3), 1, 1),
    ],
    ids=str,
)
def test_stem_weight_grad(backend, device, shape, out, kernel, stride, padding, layout):
    x = lay_out(images(shape, device), layout)
    side = [(n + 2 * padding - k) // stride + 1 for n, k in zip(shape[2:], kernel, strict=True)]
    grad = lay_out(normal((shape[0], out, *side), device), layout)
    options = {"kernel": kernel, "stride": stride, "padding": padding}
    weight = torch.zeros(out, shape[1], *kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(out, dtype=torch.float64, requires_grad=True)
    y = torch.conv2d(x.cpu().double(), weight, bias, stride, padding)
    exact = torch.autograd.grad(y, (weight, bias), grad.cpu().double())
    for actual, wanted in zip(kernels.stem_weight_grad(x, grad, **options), exact, strict=True):
        assert actual.shape == wanted.shape
        torch.testing.assert_close(actual.cpu().double(), wanted, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stem", STEMS, ids=str)
def test_stem_input_grad(backend, device, stem, dtype, layout):
    x, _, gy, weight, stride, padding = stem_inputs(stem, 5, device, layout, dtype=dtype)
    point = x.cpu().double().requires_grad_()
    y = torch.conv2d(point, weight.cpu().double(), None, stride, padding)
    (exact,) = torch.autograd.grad(y, point, gy.cpu().double())
    actual = kernels.stem_input_grad(
        gy, weight, size=tuple(x.shape[2:]), stride=stride, padding=padding
    )
    assert actual.dtype == weight.dtype
    torch.testing.assert_close(actual.cpu().double(), exact, atol=1e-7, rtol=1e-5)


def test_stem_input_grad_of_no_samples(backend, device):
    x, _, gy, weight, stride, padding = stem_inputs(STEMS[0], 0, device)
    empty = kernels.stem_input_grad(gy, weight, size=(28, 28), stride=stride, padding=padding)
    assert empty.shape == x.shape


@pytest.mark.parametrize("stem", [(2, 3, 3, 2, 1, 1, 5, 4), (1, 2, 2, 3, 2, 0, 7, 6)], ids=str)
def test_the_stems_gradients_have_gradients(stem):
    """Both, twice, against finite differences: gradients of gradients pass through them."""
    x, _, gy, weight, stride, padding = stem_inputs(stem, 2, "cpu")
    x, gy, weight = (t.double().requires_grad_() for t in (x, gy, weight))
    geometry = {"stride": stride, "padding": padding}

    def on_input(gy, weight):
        return kernels.stem_input_grad(gy, weight, size=tuple(x.shape[2:]), **geometry)

    def on_weight(x, gy):
        return kernels.stem_weight_grad(x, gy, kernel=tuple(weight.shape[2:]), **geometry)

    for function, inputs in ((on_input, (gy, weight)), (on_weight, (x, gy))):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


# ---- sgd_ema_step ----------------------------------------------------------------------------

PARAMETERS = [(16, 1, 4, 4), (16,), (1,), (0, 3), (), (100, 33), (7, 3, 3, 3)]


def optimiser_state(device, grad_dtype=torch.float32, layout="contiguous"):
    def tensors(seed, scale=1.0, layout="contiguous"):
        return [
            lay_out(torch.as_tensor(normal(s, device, scale, seed + i)), layout)
            for i, s in enumerate(PARAMETERS)
        ]

    grads = [g.to(grad_dtype) for g in tensors(200, 0.1)]
    # Weights of a channels_last network meet gradients of either layout.
    return (
        tensors(100, layout=layout),
        grads,
        tensors(300, 0.1, layout),
        tensors(400, layout=layout),
    )


DECAY = [5e-4, 0.0, 0.0, 1e-2, 0.1, 5e-4, 0.0]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("with_average", [True, False])
@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_ema_step(backend, device, nesterov, with_average, grad_dtype, layout):
    state = optimiser_state(device, grad_dtype, layout)
    if not with_average:
        state = (*state[:3], [])
    options = (0.9, DECAY, nesterov, torch.tensor(0.99))
    copies = []
    for dtype in (torch.float32, torch.float64):
        copy = [[t.detach().cpu().clone().to(dtype) for t in group] for group in state]
        lr, found = torch.tensor(0.1, dtype=dtype), torch.tensor(0.0, dtype=dtype)
        for _ in range(2):
            reference.sgd_ema_step(*copy, lr, found, *options)
        copies.append(copy)
    lr, found = torch.tensor(0.1, device=device), torch.zeros(1, device=device)
    for _ in range(2):
        kernels.sgd_ema_step(
            *state,
            lr=lr,
            found_inf=found,
            momentum=0.9,
            weight_decay=DECAY,
            nesterov=nesterov,
            ema_decay=0.99,
        )
    plain, exact = copies
    for group, name in ((0, "params"), (2, "momenta"), (3, "averages")):
        for actual, low, high in zip(state[group], plain[group], exact[group], strict=True):
            assert_accurate(name, actual, low, high)


def test_sgd_ema_step_is_skipped_on_overflow(backend, device):
    params, grads, momenta, averages = optimiser_state(device)
    grads[0][0, 0, 0, 0] = math.inf
    grads[5][3, 3] = math.nan
    before = [[t.clone() for t in group] for group in (params, momenta, averages)]
    kernels.sgd_ema_step(
        params,
        grads,
        momenta,
        averages,
        lr=0.1,
        found_inf=torch.ones((), device=device),
        weight_decay=DECAY,
        ema_decay=0.99,
    )
    for old, new in zip(before, (params, momenta, averages), strict=True):
        for a, b in zip(old, new, strict=True):
            assert torch.equal(a, b)


def adamw_state(device, grad_dtype=torch.float32, layout="contiguous"):
    params, grads, first, averages = optimiser_state(device, grad_dtype, layout)
    second = [t.square() for t in optimiser_state(device, layout=layout)[2]]
    return params, grads, first, second, averages


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("with_average", [True, False])
def test_adamw_ema_step(backend, device, with_average, grad_dtype, layout):
    state = adamw_state(device, grad_dtype, layout)
    if not with_average:
        state = (*state[:4], [])
    copies = []
    for dtype in (torch.float32, torch.float64):
        copy = [[t.detach().cpu().clone().to(dtype) for t in group] for group in state]
        lr, found = torch.tensor(0.01, dtype=dtype), torch.tensor(0.0, dtype=dtype)
        for n in (1.0, 2.0):
            rest = (0.9, 0.999, 1e-8, DECAY, torch.tensor(0.99))
            reference.adamw_ema_step(*copy, lr, torch.tensor(n), found, *rest)
        copies.append(copy)
    for n in (1.0, 2.0):
        kernels.adamw_ema_step(
            *state,
            lr=torch.tensor(0.01, device=device),
            count=torch.tensor(n, device=device),
            found_inf=torch.zeros(1, device=device),
            weight_decay=DECAY,
            ema_decay=0.99,
        )
    plain, exact = copies
    for group, name in ((0, "params"), (2, "first"), (3, "second"), (4, "averages")):
        for actual, low, high in zip(state[group], plain[group], exact[group], strict=True):
            assert_accurate(name, actual, low, high)


def test_adamw_ema_step_is_torchs_adamw(backend, device):
    ours, *_ = adamw_state(device)
    theirs = [t.clone().requires_grad_() for t in ours]
    average = [t.clone() for t in ours]
    averages, first, second = ([t.clone() * scale for t in ours] for scale in (1, 0, 0))
    opt = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1)
    for n in range(1, 21):
        grads = [normal(t.shape, device, 0.1, 1000 * n + i) for i, t in enumerate(ours)]
        for t, g in zip(theirs, grads, strict=True):
            t.grad = g.clone()
        opt.step()
        kernels.adamw_ema_step(
            ours,
            grads,
            first,
            second,
            averages,
            lr=0.01,
            count=torch.tensor(float(n), device=device),
            found_inf=torch.zeros((), device=device),
            weight_decay=[0.1] * len(ours),
            ema_decay=0.9,
        )
        for e, t in zip(average, theirs, strict=True):
            e.lerp_(t.detach(), 0.1)
    torch.testing.assert_close(ours, [t.detach() for t in theirs], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(averages, average, atol=2e-6, rtol=1e-5)


def test_adamw_ema_step_is_skipped_on_overflow(backend, device):
    params, grads, first, second, averages = adamw_state(device)
    grads[0][0, 0, 0, 0] = math.inf
    kept = (params, first, second, averages)
    before = [[t.clone() for t in group] for group in kept]
    kernels.adamw_ema_step(
        params,
        grads,
        first,
        second,
        averages,
        lr=0.1,
        # A first step that is skipped leaves the count at 0: nothing may be divided by it.
        count=torch.zeros((), device=device),
        found_inf=torch.ones((), device=device),
        weight_decay=DECAY,
        ema_decay=0.99,
    )
    for old, new in zip(before, kept, strict=True):
        for a, b in zip(old, new, strict=True):
            assert torch.equal(a, b)


# ---- torch.library ---------------------------------------------------------------------------


def operator_arguments(device):
    x = images((2, 3, 6, 6), device)
    xl = lay_out(x, "channels_last")
    grad, rng = normal(x.shape, device), rng_state(device)
    small = torch.tensor(0.1, device=device)
    adv, ball, clean = logit_inputs((5, 10), device)
    target = targets(5, 10, device)
    gy, weight = normal((2, 4, 6, 6), device), normal((4, 3, 3, 3), device)
    memory, index, where, batch = memory_inputs((6, 3, 7, 5), 2, 4, device)
    state = optimiser_state(device)
    learn = [t.clone().requires_grad_() for t in (adv, ball, clean)]
    return {
        "uniform_start": [(x, small, rng, "Linf", 0), (xl, small, rng, "L2", 0)],
        "attack_step": [
            (x, x, grad, small, small, "Linf"),
            (xl, xl, lay_out(grad, "channels_last"), small, small, "L2"),
        ],
        "attack_step_": [
            (x, x.clone(), grad, small, small, "Linf", None),
            (xl, xl.clone(), lay_out(grad, "channels_last"), small, small, "L2", x.half()),
        ],
        "cross_entropy_grad": [(adv, target, 1.0)],
        "kl_grad": [(adv, ball, 1.0)],
        "input_grad_step": [
            (x, x, gy, weight, 1, 1, small, small, "Linf"),
            (xl, xl, gy, weight, 1, 1, small, small, "L2"),
        ],
        "stem_input_grad": [(gy, weight, *x.shape[2:], 1, 1)],
        "stem_weight_grad": [(x, gy, 3, 3, 1, 1), (xl, lay_out(gy, "channels_last"), 3, 3, 1, 1)],
        "local_ball_loss": [
            (learn[0], target, learn[1], learn[2], small, small, 0.1),
            (learn[0], target, None, None, small, small, 0.0),
        ],
        "local_ball_loss_backward": [(small, adv, target, ball, None, small, small, 0.0)],
        "augment": [
            (dataset((6, 3, 7, 5), device), index, rng, 2, True, 0, 0, None, None, "Linf"),
            (dataset((6, 3, 7, 5), device), index, rng, 2, True, 3, 0, memory, small, "Linf"),
            (dataset((6, 3, 7, 5), device), index, rng, 2, True, 0, 0, memory, small, "L2"),
        ],
        "recall": [(memory, index, where, batch, small, "Linf")],
        "remember": [(memory, index, where, batch, batch, small)],
        "sgd_ema_step": [(*state, small, torch.zeros_like(small), 0.9, DECAY, True, small)],
        "adamw_ema_step": [
            (
                *adamw_state(device),
                small,
                torch.ones_like(small),
                torch.zeros_like(small),
                *(0.9, 0.999, 1e-8, DECAY, small),
            )
        ],
    }


@pytest.mark.parametrize("op", backends.OPS)
def test_opcheck(backend, device, op, monkeypatch):
    # opcheck compares with fake tensors, which poisoned memory would only slow down.
    for args in operator_arguments(device)[op]:
        torch.library.opcheck(getattr(torch.ops.engine, op).default, args)


def test_every_op_is_covered():
    assert set(operator_arguments("cpu")) == set(backends.OPS)


# ---- bad input -------------------------------------------------------------------------------


def bad_calls(device):
    x, rng = images((2, 3, 6, 6), device), rng_state(device)
    logits, target = logit_inputs((5, 10), device)[0], targets(5, 10, device)
    gy, weight = normal((2, 4, 6, 6), device), normal((4, 3, 3, 3), device)
    data, index = dataset((6, 3, 7, 5), device), indices(6, 4, device)
    memory, index, where, batch = memory_inputs((6, 3, 7, 5), 2, 4, device)
    p = [x.clone()]
    k = kernels
    stem = {"stride": 1, "padding": 1, "eps": 0.1, "alpha": 0.1}
    sgd = {"lr": 0.1, "found_inf": torch.zeros((), device=device)}
    meta = torch.empty_like(x, device="meta")
    return {
        "x dtype": (TypeError, "x", lambda: k.uniform_start(x.half(), 0.1, rng)),
        "x rank": (ValueError, "x", lambda: k.uniform_start(x[0, 0, 0], 0.1, rng)),
        "x no tensor": (TypeError, "x", lambda: k.uniform_start([1.0], 0.1, rng)),
        "norm": (ValueError, "norm", lambda: k.uniform_start(x, 0.1, rng, norm="L1")),
        "rng": (TypeError, "rng", lambda: k.uniform_start(x, 0.1, rng.float())),
        "rng shape": (TypeError, "rng", lambda: k.uniform_start(x, 0.1, rng[:1])),
        "stream": (ValueError, "stream", lambda: k.uniform_start(x, 0.1, rng, stream=-1)),
        "eps shape": (
            ValueError,
            "eps",
            lambda: k.uniform_start(x, torch.ones(2, device=device), rng),
        ),
        "eps dtype": (
            TypeError,
            "eps",
            lambda: k.attack_step(x, x, x, torch.ones((), dtype=torch.int64, device=device), 0.1),
        ),
        "z shape": (ValueError, "z", lambda: k.attack_step(x, x[:1], x, 0.1, 0.1)),
        "z dtype": (TypeError, "z", lambda: k.attack_step(x, x.double(), x, 0.1, 0.1)),
        "z device": (ValueError, "z", lambda: k.attack_step(x, meta, x, 0.1, 0.1)),
        "grad shape": (ValueError, "grad", lambda: k.attack_step(x, x, x[..., :5], 0.1, 0.1)),
        "grad dtype": (TypeError, "grad", lambda: k.attack_step(x, x, x.int(), 0.1, 0.1)),
        "in place z": (TypeError, "z", lambda: k.attack_step_(x, x.double(), x, 0.1, 0.1)),
        "in place z is x": (ValueError, "z", lambda: k.attack_step_(x, x.detach(), x, 0.1, 0.1)),
        "in place grad": (TypeError, "grad", lambda: k.attack_step_(x, p[0], x.int(), 0.1, 0.1)),
        **{
            f"network_input {what}": (
                error,
                "network_input",
                lambda t=t: k.attack_step_(x, p[0], x, 0.1, 0.1, network_input=t),
            )
            for what, error, t in (
                ("kind", TypeError, 1.0),
                ("dtype", TypeError, x.double()),
                ("shape", ValueError, x[:1].clone()),
                ("layout", ValueError, x.transpose(2, 3)),
                ("device", ValueError, meta),
            )
        },
        "logits rank": (ValueError, "logits", lambda: k.cross_entropy_grad(logits[0], target)),
        "logits dtype": (TypeError, "logits", lambda: k.cross_entropy_grad(logits.int(), target)),
        "target dtype": (TypeError, "target", lambda: k.cross_entropy_grad(logits, target.int())),
        "target shape": (ValueError, "target", lambda: k.cross_entropy_grad(logits, target[:3])),
        "p_logits": (ValueError, "p_logits", lambda: k.kl_grad(logits[:3], logits)),
        "ball": (ValueError, "ball", lambda: k.local_ball_loss(logits, target, logits[:, :4])),
        "clean": (
            TypeError,
            "clean",
            lambda: k.local_ball_loss(logits, target, None, logits.int()),
        ),
        "lam": (ValueError, "lam", lambda: k.local_ball_loss(logits, target, lam=logits)),
        "label_smoothing": (
            ValueError,
            "label_smoothing",
            lambda: k.local_ball_loss(logits, target, label_smoothing=1.0),
        ),
        "stem_grad": (
            ValueError,
            "stem_grad",
            lambda: k.input_grad_step(x, x, gy[:, :3], weight, **stem),
        ),
        "weight": (
            ValueError,
            "weight",
            lambda: k.input_grad_step(x, x, gy, weight[:, :2], **stem),
        ),
        "stride": (
            ValueError,
            "stride",
            lambda: k.input_grad_step(x, x, gy, weight, **{**stem, "stride": 0}),
        ),
        "images dtype": (TypeError, "images", lambda: k.augment(data.int(), index, rng)),
        "images layout": (
            ValueError,
            "images",
            lambda: k.augment(data.transpose(2, 3), index, rng),
        ),
        "pad": (ValueError, "pad", lambda: k.augment(data, index, rng, pad=5)),
        "cutout": (ValueError, "cutout", lambda: k.augment(data, index, rng, cutout=-1)),
        "index dtype": (TypeError, "index", lambda: k.augment(data, index.int(), rng)),
        "augment memory dtype": (
            TypeError,
            "memory",
            lambda: k.augment(data, index, rng, memory=data, eps=0.1),
        ),
        "augment memory shape": (
            ValueError,
            "memory",
            lambda: k.augment(data, index, rng, memory=memory[:5], eps=0.1),
        ),
        "augment memory layout": (
            ValueError,
            "memory",
            lambda: k.augment(
                data, index, rng, memory=lay_out(memory.cpu(), "channels_last").to(device), eps=0.1
            ),
        ),
        "augment memory device": (
            ValueError,
            "memory",
            lambda: k.augment(data, index, rng, memory=memory.to("meta"), eps=0.1),
        ),
        "augment eps": (ValueError, "eps", lambda: k.augment(data, index, rng, memory=memory)),
        "augment norm": (ValueError, "norm", lambda: k.augment(data, index, rng, norm="L1")),
        "memory": (TypeError, "memory", lambda: k.recall(memory.int(), index, where, batch, 0.1)),
        "where": (TypeError, "where", lambda: k.recall(memory, index, where.long(), batch, 0.1)),
        "recall x": (ValueError, "x", lambda: k.recall(memory, index, where, batch[:, :2], 0.1)),
        "remember z": (
            ValueError,
            "z",
            lambda: k.remember(memory, index, where, batch, batch[:1], 0.1),
        ),
        "stem_input_grad stem_grad": (
            ValueError,
            "stem_grad",
            lambda: k.stem_input_grad(gy[:, :3], weight, size=(9, 9), stride=1, padding=1),
        ),
        "stem_input_grad weight": (
            ValueError,
            "weight",
            lambda: k.stem_input_grad(gy, weight[0], size=(9, 9), stride=1, padding=1),
        ),
        "stem_weight_grad x": (
            ValueError,
            "x",
            lambda: k.stem_weight_grad(x[0], x, kernel=(3, 3), stride=1, padding=1),
        ),
        "stem_weight_grad stem_grad": (
            ValueError,
            "stem_grad",
            lambda: k.stem_weight_grad(batch, batch[..., :2], kernel=(3, 3), stride=1, padding=1),
        ),
        "params": (
            ValueError,
            "params",
            lambda: k.sgd_ema_step([], [], [], [], weight_decay=[], **sgd),
        ),
        "grads": (
            ValueError,
            "grads",
            lambda: k.sgd_ema_step(p, [], p, [], weight_decay=[0.0], **sgd),
        ),
        "momenta": (
            ValueError,
            "momenta",
            lambda: k.sgd_ema_step(p, p, [x[:1]], [], weight_decay=[0.0], **sgd),
        ),
        "exp_avg_sqs": (
            ValueError,
            "exp_avg_sqs",
            lambda: k.adamw_ema_step(p, p, p, [x[:1]], [], count=1.0, weight_decay=[0.0], **sgd),
        ),
        "weight_decay": (
            ValueError,
            "weight_decay",
            lambda: k.sgd_ema_step(p, p, p, [], weight_decay=[], **sgd),
        ),
    }


def test_an_op_dispatches_itself_and_nothing_else(backend, device):
    """Views aside: no check reads a value back, no number is copied to the device a second time."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace != "engine" and func is not torch.ops.aten.detach.default:
                seen.append(str(func))
            return func(*args, **(kwargs or {}))

    x, z = images((2, 3, 6, 6), device), images((2, 3, 6, 6), device)
    grad, rng = normal(x.shape, device), rng_state(device)
    gy, weight = normal((2, 4, 6, 6), device), normal((4, 3, 3, 3), device)
    (adv, ball, clean), target = logit_inputs((5, 10), device), targets(5, 10, device)
    memory, index, where, batch = memory_inputs((6, 3, 7, 5), 2, 4, device)
    data, state, zero = (
        dataset((6, 3, 7, 5), device),
        optimiser_state(device),
        torch.zeros((), device=device),
    )
    stem = {"stride": 1, "padding": 1, "eps": 0.25, "alpha": 0.125}
    calls = [
        lambda: kernels.uniform_start(x, 0.25, rng),
        lambda: kernels.attack_step(x, z, grad, 0.25, 0.125),
        lambda: kernels.attack_step_(x, z, grad, 0.25, 0.125),
        lambda: kernels.cross_entropy_grad(adv, target),
        lambda: kernels.kl_grad(adv, ball),
        lambda: kernels.input_grad_step(x, z, gy, weight, **stem),
        lambda: kernels.stem_input_grad(gy, weight, size=tuple(x.shape[2:]), stride=1, padding=1),
        lambda: kernels.stem_weight_grad(x, gy, kernel=(3, 3), stride=1, padding=1),
        lambda: kernels.local_ball_loss(adv, target, ball, clean, lam=0.5, mu=2.0),
        lambda: kernels.augment(data, index, rng, pad=2, flip=True, memory=memory, eps=0.25),
        lambda: kernels.recall(memory, index, where, batch, 0.25),
        lambda: kernels.remember(memory, index, where, batch, batch, 0.25),
        lambda: kernels.sgd_ema_step(
            *state, lr=0.125, found_inf=zero, weight_decay=DECAY, ema_decay=0.5
        ),
        lambda: kernels.adamw_ema_step(
            *adamw, lr=0.125, count=zero + 1, found_inf=zero, weight_decay=DECAY, ema_decay=0.5
        ),
    ]
    adamw = adamw_state(device)
    for call in calls:
        call()
        seen: list[str] = []
        with Seen():
            call()
        assert [op for op in seen if op != "aten.add.Tensor"] == []


@pytest.mark.parametrize("case", list(bad_calls("cpu")))
def test_bad_input_names_the_argument(backend, device, case):
    error, name, call = bad_calls(device)[case]
    with pytest.raises(error, match=rf"\b{name}\b"):
        call()


def test_an_index_outside_the_dataset_is_refused(backend, device):
    if backend == "triton":
        pytest.skip("a device-held index is not read by the host")
    data, rng = dataset((6, 3, 7, 5), device), rng_state(device)
    for value in (-1, 6):
        with pytest.raises(IndexError, match="index"):
            kernels.augment(data, torch.tensor([0, value]), rng)
