"""Inputs of the ops' tests, and the comparison with the reference in float64.

The rule for accuracy is that of `engine.kernels.accuracy`.
"""

import pytest
import torch
from hypothesis import given, settings

from engine import kernels
from engine.kernels import accuracy, backends, reference

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
    """Compare an output with the reference: shape, type, NaN, and `accuracy.error`'s bound."""
    actual, plain = actual.detach().cpu(), plain.detach()
    assert actual.shape == exact.shape, name
    assert actual.dtype == plain.dtype, name
    assert torch.equal(actual.isnan(), exact.isnan()), f"{name}: NaN where none belongs, or none"
    error, allowed = accuracy.error(actual, plain, exact, rounding)
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


ROWS = [(7, 10), (1, 2), (33, 3), (5, 1), (4, 100), (3, 1000), (0, 10)]


def logit_inputs(shape, device, dtype=torch.float32, scale=3.0):
    return tuple(normal(shape, device, scale, seed, dtype) for seed in (11, 12, 13))


def loss_and_gradients(adv, target, ball, clean, lam, mu, smoothing, factor):
    """Through the op and autograd, on whichever backend is in use."""
    leaves = [
        None if t is None else t.detach().clone().requires_grad_() for t in (adv, ball, clean)
    ]
    loss, stats = kernels.local_ball_loss(
        leaves[0], target, leaves[1], leaves[2], lam=lam, mu=mu, label_smoothing=smoothing
    )
    (loss * factor).backward()
    return loss, torch.stack(stats), *(None if t is None else t.grad for t in leaves)


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


def dataset(shape, device):
    return torch.randint(0, 256, shape, generator=generator(21), dtype=torch.uint8).to(device)


def indices(n, batch, device, seed=22):
    return torch.randint(0, n, (batch,), generator=generator(seed)).to(device)


def memory_inputs(shape, pad, batch, device, layout="contiguous"):
    """A filled memory, distinct indices and an augmented batch."""
    memory = torch.randint(-127, 128, shape, generator=generator(23), dtype=torch.int8).to(device)
    index = torch.randperm(shape[0], generator=generator(24))[:batch].to(device)
    with backends.use("reference"):
        x, crops, *_ = kernels.augment(
            dataset(shape, device), index, rng_state(device), pad=pad, flip=True
        )
    return memory, index, crops, lay_out(x, layout)


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


def adamw_state(device, grad_dtype=torch.float32, layout="contiguous"):
    params, grads, first, averages = optimiser_state(device, grad_dtype, layout)
    second = [t.square() for t in optimiser_state(device, layout=layout)[2]]
    return params, grads, first, second, averages
