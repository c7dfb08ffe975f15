"""The Triton backend beyond the shared suite: its mathematics, its tiling, its launches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine import kernels
from engine.kernels import backends

triton = pytest.importorskip("triton", reason="Triton is not installed")
import triton.language as tl  # noqa: E402

from engine.kernels.reference.philox import RADIUS_STREAM  # noqa: E402
from engine.kernels.reference.philox import philox as philox_words  # noqa: E402
from engine.kernels.triton import launch, maths, philox  # noqa: E402

sgd = sys.modules["engine.kernels.triton.optimisers"]
loss = sys.modules["engine.kernels.triton.logits"]

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() and not launch.INTERPRETING,
    reason="no CUDA device, and TRITON_INTERPRET is not set",
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALAR = {"dtype": torch.float32, "device": DEVICE}


def on_triton(op, *args, **options):
    with backends.use("triton"):
        return getattr(kernels, op)(*args, **options)


def on_reference(op, *args, **options):
    with backends.use("reference"):
        return getattr(kernels, op)(*args, **options)


def draw(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@triton.jit
def words_kernel(rng_ptr, out_ptr, stream, first, BLOCK: tl.constexpr):
    block = tl.arange(0, BLOCK)
    w0, w1, w2, w3 = philox.words(rng_ptr, stream, first + block)
    out = philox.in_order(w0, w1, w2, w3)
    tl.store(out_ptr + tl.arange(0, 4 * BLOCK), out.to(tl.int64))


@pytest.mark.parametrize("stream", [0, 1, 7, (1 << 31) - 1, RADIUS_STREAM + 5])
@pytest.mark.parametrize("seed", [0, -1, 0x0123456789ABCDEF, -(1 << 62)])
@pytest.mark.parametrize("step", [0, (1 << 32) + 3, -9])
def test_random_words_have_the_reference_bits(seed, step, stream):
    rng = torch.tensor([seed, step], device=DEVICE)
    for first in (0, (1 << 32) - 16):
        out = torch.empty(256, dtype=torch.int64, device=DEVICE)
        words_kernel[(1,)](rng, out, stream, first, BLOCK=64)
        blocks = torch.arange(first, first + 64, device=DEVICE)
        wanted = torch.stack(philox_words(rng, stream, blocks), 1).flatten()
        assert torch.equal(out, wanted)


@triton.jit
def byte_kernel(in_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, maths.byte_to_unit(tl.load(in_ptr + i).to(tl.float32)))


def test_every_byte_scales_as_a_division_does():
    byte = torch.arange(256, device=DEVICE).to(torch.uint8)
    out = torch.empty(256, **SCALAR)
    byte_kernel[(1,)](byte, out, BLOCK=256)
    assert torch.equal(out, byte.float() / 255.0)


@triton.jit
def round_kernel(in_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, maths.round_even(tl.load(in_ptr + i)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_is_to_even(dtype):
    v = torch.linspace(-128, 127.75, 1024, dtype=dtype, device=DEVICE)
    v[:4] = torch.tensor([0.49999997, -0.49999997, 0.5, 1.5], dtype=dtype)
    out = torch.empty_like(v)
    round_kernel[(1,)](v, out, BLOCK=1024)
    assert torch.equal(out, v.round())


@triton.jit
def normal_kernel(u_ptr, v_ptr, a_ptr, b_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = maths.box_muller(tl.load(u_ptr + i), tl.load(v_ptr + i))
    tl.store(a_ptr + i, a)
    tl.store(b_ptr + i, b)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 2e-14)])
def test_normals_follow_box_muller(dtype, tolerance):
    u, v = draw(4096, seed=1).to(dtype), draw(4096, seed=2).to(dtype)
    # Quadrant borders, and both ends of [0, 1).
    v[:8] = torch.arange(8, dtype=dtype) / 8
    u[8], v[9] = 0.0, 1 - 2.0**-24
    a, b = torch.empty_like(u), torch.empty_like(u)
    normal_kernel[(1,)](u, v, a, b, BLOCK=4096)
    radius, angle = (-2 * torch.log1p(-u.double())).sqrt(), 2 * torch.pi * v.double()
    torch.testing.assert_close(a.double(), radius * angle.cos(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(b.double(), radius * angle.sin(), atol=tolerance, rtol=tolerance)


def test_correct_counts_break_ties_as_argmax_does():
    nan = float("nan")
    rows = [[1, 1, 0], [0, 1, 1], [nan, 5, 1], [5, nan, nan], [2, 2, 2], [3, 1, float("inf")]]
    logits = torch.tensor(rows, **SCALAR)
    for target in range(3):
        y = torch.full((len(rows),), target, device=DEVICE)
        stats = on_triton("local_ball_loss", logits, y)[1]
        # On the CPU, where PyTorch takes the first of equals.
        assert stats.correct_adv == (logits.cpu().argmax(1) == target).sum(), f"target {target}"


@pytest.fixture
def narrow(monkeypatch):
    """Set tiles of 32 elements: small inputs then take many programs and loop steps."""
    if not launch.INTERPRETING:
        pytest.skip("tiles are fixed on a device, where real sizes exercise them")
    monkeypatch.setattr(launch, "_WIDEST", 32)
    monkeypatch.setattr(loss, "_TILES_IN_ONE_PROGRAM", 2)
    monkeypatch.setattr(loss, "_MOST_PROGRAMS", 5)


def compare(op, *args, atol=2e-6, **options):
    out, wanted = on_triton(op, *args, **options), on_reference(op, *args, **options)
    torch.testing.assert_close(out, wanted, atol=atol, rtol=2e-6)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("shape", [(3, 2, 7, 5), (5, 11), (3, 7), (2, 1, 16, 16)], ids=str)
def test_images_over_many_programs(narrow, poison, norm, shape):
    x, rng = draw(*shape), torch.tensor([5, 6], device=DEVICE)
    z, grad = (x + 0.1 * draw(*shape, seed=1)).clamp(0, 1), draw(*shape, seed=2) - 0.5
    compare("uniform_start", x, 0.3, rng, norm=norm, stream=3)
    compare("attack_step", x, z, grad, 0.3, 0.1, norm=norm)
    wanted = on_triton("attack_step", x, z, grad, 0.3, 0.1, norm=norm)
    on_triton("attack_step_", x, z, grad, 0.3, 0.1, norm=norm)
    assert torch.equal(z, wanted)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_data_over_many_programs(narrow, poison, norm, last):
    images = (255 * draw(9, 3, 6, 5)).to(torch.uint8)
    index, rng = torch.tensor([4, 0, 8, 3], device=DEVICE), torch.tensor([1, 2], device=DEVICE)
    x, crops, *_ = on_reference("augment", images, index, rng, pad=3, flip=True)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    memory = (254 * draw(9, 3, 6, 5, seed=1) - 127).to(torch.int8)
    compare("augment", images, index, rng, pad=3, flip=True)
    compare("augment", images, index, rng, pad=3, flip=True, memory=memory, eps=0.1, norm=norm)
    compare("recall", memory, index, crops, x, 0.1, norm=norm)
    written, wanted = memory.clone(), memory.clone()
    z = x + 0.2 * (draw(*x.shape, seed=3) - 0.5)
    on_triton("remember", written, index, crops, x, z, 0.1)
    on_reference("remember", wanted, index, crops, x, z, 0.1)
    assert torch.equal(written, wanted)


@pytest.mark.parametrize("classes", [3, 40])
@pytest.mark.parametrize("rows", [1, 23])
def test_logits_over_many_programs(narrow, poison, rows, classes):
    adv, ball, clean = (6 * draw(rows, classes, seed=s) for s in range(3))
    target = torch.arange(rows, device=DEVICE) % classes
    compare("cross_entropy_grad", adv, target)
    compare("kl_grad", clean, adv)
    results = []
    for run in (on_triton, on_reference):
        leaves = [t.clone().requires_grad_() for t in (adv, ball, clean)]
        value, stats = run("local_ball_loss", leaves[0], target, *leaves[1:], lam=2.0, mu=0.5)
        with backends.use("triton" if run is on_triton else "reference"):
            gradients = torch.autograd.grad(value, leaves)
        results.append((value, stats, *gradients))
    for out, wanted in zip(*results, strict=True):
        torch.testing.assert_close(out, wanted, atol=2e-6, rtol=5e-6)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_stem_over_many_programs(narrow, poison, norm):
    x, z = draw(2, 4, 9, 7), draw(2, 4, 9, 7, seed=1)
    weight, grad = draw(5, 4, 3, 3, seed=2) - 0.5, draw(2, 5, 5, 4, seed=3) - 0.5
    geometry = {"stride": 2, "padding": 1}
    compare("input_grad_step", x, z, grad, weight, **geometry, eps=0.3, alpha=0.1, norm=norm)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize(("out", "stride", "last"), [(20, 2, False), (16, 1, True), (3, 1, False)])
def test_a_channels_last_stem_over_many_programs(narrow, poison, norm, out, stride, last):
    """Two pixels a program, and output channels that fill one block, one and a part, or none."""
    x, z = draw(2, 4, 5, 3), draw(2, 4, 5, 3, seed=1)
    side = [(n - 1) // stride + 1 for n in (5, 3)]
    weight, grad = draw(out, 4, 3, 3, seed=2) - 0.5, (draw(2, out, *side, seed=3) - 0.5).half()
    order = torch.channels_last if last else torch.contiguous_format
    x, z, weight = (t.contiguous(memory_format=order) for t in (x, z, weight))
    grad = grad.contiguous(memory_format=torch.channels_last)
    geometry = {"stride": stride, "padding": 1}
    compare("input_grad_step", x, z, grad, weight, **geometry, eps=0.3, alpha=0.1, norm=norm)


@pytest.mark.parametrize("innermost", [False, True])
def test_a_gradient_of_more_than_two_billion_elements(innermost):
    """Reach a third sample beyond 32 bits of address; the memory between is never touched."""
    apart, (o, h, w) = 1 << 30, (4, 2, 3)
    strides = (1, w * o, o) if innermost else (h * w, w, 1)
    memory = torch.empty(2 * apart + o * h * w, dtype=torch.float16, device=DEVICE)
    grad = memory.as_strided((3, o, h, w), (apart, *strides)).copy_(draw(3, o, h, w) - 0.5)
    x, weight = draw(3, 1, h, w, seed=1), draw(o, 1, 1, 1, seed=2) - 0.5
    compare("input_grad_step", x, x, grad, weight, stride=1, padding=0, eps=0.3, alpha=0.1)


def optimiser_state(shapes, seed=0):
    def tensors(offset):
        return [draw(*shape, seed=seed + offset + i) - 0.5 for i, shape in enumerate(shapes)]

    return [tensors(100 * k) for k in range(4)]


def run_sgd(run, state, steps=2, **options):
    g, (p, m, e) = state[1], ([t.clone() for t in state[i]] for i in (0, 2, 3))
    for _ in range(steps):
        run(
            "sgd_ema_step", p, g, m, e, lr=0.1, found_inf=torch.zeros((), **SCALAR),
            weight_decay=[0.1 * i for i in range(len(p))], ema_decay=0.9, nesterov=True, **options,
        )  # fmt: skip
    return p + m + e


def assert_same_step(state):
    out, wanted = run_sgd(on_triton, state), run_sgd(on_reference, state)
    torch.testing.assert_close(out, wanted, atol=1e-6, rtol=1e-6)


SHAPES = [(7,), (40, 3), (2, 3, 3, 3), (1,), (65,)]


def test_many_tensors_over_many_programs(narrow):
    assert_same_step(optimiser_state(SHAPES))


def run_adamw(run, state):
    g, (p, m, e) = state[1], ([t.clone() for t in state[i]] for i in (0, 2, 3))
    v = [t.square() for t in m]
    run(
        "adamw_ema_step", p, g, m, v, e, lr=0.1, count=torch.ones((), **SCALAR),
        found_inf=torch.zeros((), **SCALAR), weight_decay=[0.1] * len(p), ema_decay=0.9,
    )  # fmt: skip
    return p + m + v + e


def test_one_gradient_off_16_bytes_costs_the_others_nothing(narrow, monkeypatch):
    """As a view of a bucket has it whose first parameter is a bias of ten."""
    state = optimiser_state(SHAPES)
    g = state[1]
    bucket = torch.zeros(1 + g[1].numel(), device=DEVICE)
    g[1] = bucket[1:].view_as(g[1]).copy_(g[1])
    assert [t.data_ptr() % 16 for t in g] == [0, 4, 0, 0, 0]
    wanted = run_sgd(on_reference, state, steps=1), run_adamw(on_reference, state)
    launches = []

    class Recorded:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(table, *args, **options):
                launches.append((options["ALIGNED"], table[:, 1].tolist()))
                self.kernel[grid](table, *args, **options)

            return launch

    for name in ("sgd_ema_kernel", "adamw_ema_kernel"):
        monkeypatch.setattr(sgd, name, Recorded(getattr(sgd, name)))
    out = run_sgd(on_triton, state, steps=1), run_adamw(on_triton, state)
    torch.testing.assert_close(out, wanted, atol=1e-6, rtol=1e-6)
    addresses = [t.data_ptr() for t in g]
    expected = [(True, [addresses[i] for i in (0, 2, 3, 4)]), (False, [addresses[1]])]
    assert launches == 2 * expected


def test_a_table_first_met_in_a_capture_is_filled_when_it_has_ended(monkeypatch):
    """What the capture launches reads its table at the first replay, not before."""
    state = optimiser_state(SHAPES)
    wanted = run_sgd(on_reference, state, steps=1)
    monkeypatch.setattr(sgd, "_tables", type(sgd._tables)())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    launches = []

    class Recorded:
        def __getitem__(self, grid):
            return lambda *args, **options: launches.append((grid, args, options))

    kernel, table = sgd.sgd_ema_kernel, sgd._table

    class Cuda:
        """A device that says it is CUDA; its memory is that of `DEVICE`."""

        type = "cuda"

    cuda = Cuda()

    def pretending(members, rows, block):
        real = torch.empty_like

        def room(t, device=None, **options):
            return real(t, device=DEVICE, **options).fill_(-1)

        monkeypatch.setattr(torch, "empty_like", room)
        first = members[0]

        class P:
            device = cuda
            data_ptr, numel = first.p.data_ptr, first.p.numel

        made = table([first._replace(p=P()), *members[1:]], rows, block)
        monkeypatch.setattr(torch, "empty_like", real)
        return made

    monkeypatch.setattr(sgd, "_table", pretending)
    monkeypatch.setattr(sgd, "sgd_ema_kernel", Recorded())
    p, g, m, e = ([t.clone() for t in tensors] for tensors in state)

    def step():
        on_triton(
            "sgd_ema_step", p, g, m, e, lr=0.1, found_inf=torch.zeros((), **SCALAR),
            weight_decay=[0.1 * i for i in range(len(p))], ema_decay=0.9, nesterov=True,
        )  # fmt: skip

    with kernels.capturing() as kept:
        step()
        ((grid, args, options),) = launches
        assert (args[0] == -1).all()
        # The same launch again reads the same table.
        step()
        assert launches[1][1][0] is args[0]
    assert {t.data_ptr() for t in kept} == {t.data_ptr() for t in args[:3]}
    kernel[grid](*args, **options)
    torch.testing.assert_close(p + m + e, wanted, atol=1e-6, rtol=1e-6)
    # Nothing but the list keeps the tables.
    assert sgd._capture is None
    assert not sgd._tables
    with pytest.raises(RuntimeError, match=r"within `kernels.capturing"):
        step()
    try:
        with kernels.capturing() as kept:
            step()
            raise ZeroDivisionError
    except ZeroDivisionError:
        assert kept == []
    assert sgd._capture is None


def test_a_gradient_in_the_same_order_is_not_copied(monkeypatch):
    """With one channel, contiguous and channels_last are one order with two sets of strides."""
    state = optimiser_state([(4, 1, 3, 3)])
    wanted = run_sgd(on_reference, state, steps=1)
    state[0][0] = state[0][0].as_strided((4, 1, 3, 3), (9, 1, 3, 1))
    assert state[0][0].stride() != state[1][0].stride()
    tables, build = [], sgd._build
    monkeypatch.setattr(sgd, "_tables", type(sgd._tables)())
    monkeypatch.setattr(
        sgd, "_build", lambda rows, *rest: tables.append(rows) or build(rows, *rest)
    )
    torch.testing.assert_close(run_sgd(on_triton, state, steps=1), wanted, atol=1e-6, rtol=1e-6)
    assert tables[0][0][1] == state[1][0].data_ptr()


def test_layouts_of_their_own(monkeypatch):
    """Copy a gradient of another memory order; update a parameter with gaps by the reference."""
    state = optimiser_state([(4, 3, 5, 5), (6, 8), (9,)])
    state[1][0] = state[1][0].contiguous(memory_format=torch.channels_last)
    wanted = run_sgd(on_reference, state)
    holes = [t[1].new_zeros(6, 16)[:, ::2].copy_(t[1]) for t in state]
    p, g, m, e = ([t[0].clone(), hole, t[2].clone()] for t, hole in zip(state, holes, strict=True))
    g[0] = state[1][0]
    for _ in range(2):
        on_triton(
            "sgd_ema_step", p, g, m, e, lr=0.1, found_inf=torch.zeros((), **SCALAR),
            weight_decay=[0.0, 0.1, 0.2], ema_decay=0.9, nesterov=True,
        )  # fmt: skip
    torch.testing.assert_close(p + m + e, wanted, atol=1e-6, rtol=1e-6)


def test_tables_are_built_once_and_forgotten_in_order(monkeypatch):
    monkeypatch.setattr(sgd, "_tables", type(sgd._tables)())
    built = []
    build = sgd._build
    monkeypatch.setattr(sgd, "_build", lambda *a: built.append(1) or build(*a))
    p, g, m, e = optimiser_state([(5,), (6,)])
    for _ in range(3):
        on_triton(
            "sgd_ema_step", p, g, m, e, lr=0.1, found_inf=torch.zeros((), **SCALAR),
            weight_decay=[0.0, 0.0],
        )  # fmt: skip
    assert len(built) == 1
    # Weight decay is part of the table.
    rest = {"lr": 0.1, "found_inf": torch.zeros((), **SCALAR), "weight_decay": [0.0, 0.1]}
    on_triton("sgd_ema_step", p, g, m, e, **rest)
    assert len(built) == 2
    assert len(sgd._tables) <= sgd._MOST_TABLES


def python(code, **environment):
    """Run `code` in a Python that does not interpret Triton kernels."""
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], env={**kept, **environment}, capture_output=True, text=True
    )


def test_cpu_tensors_are_refused_unless_interpreted():
    code = """
import torch
from engine import kernels
with kernels.backends.use("triton"):
    kernels.attack_step(*[torch.zeros(1, 4)] * 3, 0.1, 0.1)
"""
    done = python(code)
    assert done.returncode != 0
    assert "RuntimeError: Triton kernels need a CUDA tensor" in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr
    assert python(code, TRITON_INTERPRET="1").returncode == 0


def test_without_triton_the_reason_is_told():
    done = python("""
import sys
sys.modules["triton"] = None
from engine.kernels import backends
module, reason = backends.load("triton")
assert module is None
print(reason)
""")
    assert done.returncode == 0, done.stderr
    assert "Triton is not installed" in done.stdout


class Net(torch.nn.Module):
    """Stem and body, as the attack wants them: 1x12x12 to 5 classes."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.body = torch.nn.Sequential(
            torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(4 * 36, 16), torch.nn.ReLU(),
            torch.nn.Linear(16, 5),
        )  # fmt: skip

    def forward(self, x):
        return self.body(self.stem(x))


def train(steps, device):
    """Train by the local ball with public ops only; compare every loss and the final weights."""
    torch.manual_seed(0)
    net = Net().to(device)
    parameters = list(net.parameters())
    momenta = [torch.zeros_like(p) for p in parameters]
    averages = [p.detach().clone() for p in parameters]
    images = torch.randint(0, 256, (64, 1, 12, 12), dtype=torch.uint8)
    labels = (images.float().flatten(1)[:, :5]).argmax(1).to(device)
    images = images.to(device)
    memory = torch.zeros(64, 1, 12, 12, dtype=torch.int8, device=device)
    rng = torch.tensor([3, 0], device=device)
    eps, rho, alpha = 0.1, 0.05, 0.06
    lr, no_overflow = torch.tensor(0.05, device=device), torch.zeros((), device=device)
    losses = []
    for step in range(steps):
        index = (torch.arange(32, device=device) + 32 * step) % 64
        x, crops, *_ = kernels.augment(images, index, rng, pad=1, flip=True)
        target = labels[index]
        start = kernels.uniform_start(x, eps, rng)
        # Each half of the data is met at random once; from then on its last attack is taken up
        # again.
        z = start if step < 2 else kernels.recall(memory, index, crops, x, eps)
        # Adversary: the backward pass stops at the stem's output.
        with torch.no_grad():
            features = net.stem(z)
        features.requires_grad_()
        logits = net.body(features)
        (grad,) = torch.autograd.grad(
            logits, features, kernels.cross_entropy_grad(logits.detach(), target)
        )
        z = kernels.input_grad_step(
            x, z, grad, net.stem.weight.detach(), stride=2, padding=1, eps=eps, alpha=alpha
        )
        kernels.remember(memory, index, crops, x, z, eps)
        # Worst point of the local ball around it: one step on the divergence, all the way to the
        # pixels.
        with torch.no_grad():
            centre = net(z)
        b = kernels.uniform_start(z, rho, rng, stream=1).requires_grad_()
        near = net(b)
        (grad,) = torch.autograd.grad(near, b, kernels.kl_grad(centre, near.detach()))
        b = kernels.attack_step(z, b.detach(), grad, rho, rho)
        value, _ = kernels.local_ball_loss(net(z), target, net(b), net(x), lam=1.0, mu=0.5)
        grads = list(torch.autograd.grad(value, parameters))
        with torch.no_grad():
            kernels.sgd_ema_step(
                parameters, grads, momenta, averages, lr=lr, found_inf=no_overflow,
                weight_decay=[5e-4 if p.dim() > 1 else 0.0 for p in parameters],
                nesterov=True, ema_decay=0.95,
            )  # fmt: skip
        rng[1] += 1
        losses.append(value.detach())
    return torch.stack(losses), [p.detach() for p in parameters], averages


@pytest.fixture
def one_thread():
    """Threads cost more than they bring on layers this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("fast", ["triton", "native"])
def test_thirty_steps_give_the_reference_losses(one_thread, fast):
    module, reason = backends.load(fast)
    if module is None or not any(hasattr(module, op) for op in backends.OPS):
        pytest.skip(f"{fast} is not available: {reason}")
    device = DEVICE if fast == "triton" else "cpu"
    with backends.use("reference"):
        wanted, weights, averages = train(30, device)
    with backends.use(fast):
        losses, fast_weights, fast_averages = train(30, device)
    # The run must learn, or equal losses would say little.
    assert wanted[-5:].mean() < wanted[:5].mean() - 0.05
    torch.testing.assert_close(losses, wanted, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(fast_weights, weights, atol=2e-5, rtol=2e-4)
    torch.testing.assert_close(fast_averages, averages, atol=2e-5, rtol=2e-4)


def test_where_there_is_a_gpu_all_tests_of_triton_are_marked_so(tmp_path):
    """`make test-gpu` runs what is marked; collected here on a machine that thinks it has one."""
    (tmp_path / "pretend.py").write_text("import torch\ntorch.cuda.is_available = lambda: True\n")
    words = ["-p", "pretend", "--collect-only", "-m", "gpu", str(Path(__file__).parent)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    output = done.stdout
    assert "test_attack_step_l2[triton" in output
    assert "test_thirty_steps_give_the_reference_losses" in output
    assert "test_attack_step_l2[native" not in output
    assert "test_attack_step_l2[reference" not in output


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device to capture a graph")
def test_a_captured_step_draws_fresh_numbers_and_equals_eager():
    x, rng = draw(16, 3, 32, 32), torch.tensor([1, 0], device=DEVICE)
    eps = torch.tensor(0.03, device=DEVICE)
    p, g, m, e = (
        [t] for t in (draw(5000), draw(5000, seed=1), draw(5000, seed=2), draw(5000, seed=3))
    )
    found_inf, lr = torch.zeros((), device=DEVICE), torch.tensor(0.1, device=DEVICE)

    def step():
        z = kernels.uniform_start(x, eps, rng)
        z = kernels.attack_step(x, z, x - 0.5, eps, eps, norm="L2")
        kernels.sgd_ema_step(p, g, m, e, lr=lr, found_inf=found_inf, weight_decay=[0.1])
        rng[1] += 1
        return z

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    begin = [t.clone() for t in (rng, p[0], m[0], e[0])]
    eager = [step() for _ in range(3)] + [t.clone() for t in (p[0], m[0], e[0])]
    for t, value in zip((rng, p[0], m[0], e[0]), begin, strict=True):
        t.copy_(value)
    graph = torch.cuda.CUDAGraph()
    # The tables live as long as this list.
    with kernels.capturing() as kept, torch.cuda.graph(graph):
        out = step()
    assert kept
    replayed = []
    for _ in range(3):
        graph.replay()
        replayed.append(out.clone())
    assert not torch.equal(replayed[0], replayed[1])
    for a, b in zip(eager, [*replayed, p[0], m[0], e[0]], strict=True):
        assert torch.equal(a, b)
