"""The backward of the first convolution, on every backend."""

import math

import pytest
import torch
from hypothesis import strategies as st

from engine import kernels
from engine.kernels import reference

from .support import (
    HALF,
    LAYOUTS,
    STEMS,
    check_stem,
    images,
    lay_out,
    normal,
    property_test,
    skip_bfloat16,
    stem_inputs,
)


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


# Output channels: fewer than a block of the kernels, one, one and a part, two and a part.
HALF_STEMS = [
    STEMS[3],
    (1, 16, 4, 4, 2, 1, 8, 9),
    (3, 20, 3, 3, 1, 1, 6, 5),
    (4, 35, 2, 3, 2, 2, 6, 5),
]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("stem", HALF_STEMS, ids=str)
def test_input_grad_step_takes_half_precision_gradients(
    backend, device, interpreted, stem, dtype, layout
):
    skip_bfloat16(interpreted, dtype)
    args = stem_inputs(stem, 2, device, layout, dtype, whole=True)
    check_stem(args, exact_signs=True)
    check_stem(stem_inputs(stem, 2, device, layout, dtype), norm="L2", rounding=8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_input_grad_step_of_a_part_of_a_networks_channels(backend, device, dtype):
    """Next to each other in memory, but not at a multiple of 16 bytes, and pixels further apart."""
    *args, weight, stride, padding = stem_inputs(HALF_STEMS[2], 2, device, dtype=dtype, whole=True)
    x, z, gy = args
    wide = gy.new_full((2, 64, *gy.shape[2:]), math.nan)
    part = lay_out(wide, "channels_last")[:, 3:23].copy_(gy)
    assert part.stride(1) == 1
    out = check_stem((x, z, part, weight, stride, padding), exact_signs=True)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_input_grad_step_survives_bad_gradients(backend, device, norm, layout):
    args = stem_inputs(STEMS[4], 3, device, layout)
    args[2][1, 1, 2, 2] = math.nan
    assert torch.isfinite(check_stem(args, norm=norm)).all()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_input_grad_step_of_an_empty_batch(backend, device, layout):
    assert check_stem(stem_inputs(STEMS[0], 0, device, layout)).shape == (0, 1, 28, 28)


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


def test_products_are_exact_here():
    """Switch tf32 off: it keeps 10 bits, and PyTorch uses it for convolutions by default."""
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    assert torch.backends.cuda.matmul.fp32_precision == "ieee"
