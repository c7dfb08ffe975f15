"""Properties of the C++ backend only: threads, instruction sets, addresses not to be trusted."""

import subprocess
import sys
import threading
import time

import pytest
import torch

from engine import kernels
from engine.kernels import backends

from .ops import support as shared

native, reason = backends.load("native")
pytestmark = pytest.mark.skipif(native is None, reason=f"native is not available: {reason}")


def every_op():
    """Return a call of every op, large enough to be shared among threads, with its outputs."""
    x, rng = shared.images((64, 3, 32, 32), "cpu"), shared.rng_state("cpu")
    z, grad = (x + shared.normal(x.shape, "cpu", 0.02)).clamp(0, 1), shared.normal(x.shape, "cpu")
    adv, ball, clean = shared.logit_inputs((3001, 10), "cpu")
    target = shared.targets(3001, 10, "cpu")
    gy, weight = shared.normal((64, 16, 32, 32), "cpu"), shared.normal((16, 3, 3, 3), "cpu")
    data, index = shared.dataset((70, 3, 32, 32), "cpu"), torch.randperm(70)[:64]
    memory = torch.randint(-127, 128, data.shape, generator=shared.generator(), dtype=torch.int8)
    stem = {"stride": 1, "padding": 1, "eps": 0.1, "alpha": 0.05}

    def remember():
        stored = memory.clone()
        _, crops, *_ = kernels.augment(data, torch.arange(64), rng, pad=4, flip=True)
        kernels.remember(stored, torch.arange(64), crops, x, z, 0.1)
        return stored

    def recall():
        _, crops, *_ = kernels.augment(data, index, rng, pad=4, flip=True)
        return kernels.recall(memory, index, crops, x, 0.1, norm="L2")

    def step_in_place():
        stepped = z.clone()
        kernels.attack_step_(x, stepped, grad, 0.1, 0.05)
        return stepped

    def optimise():
        shapes = [(300, 200), (7,), (64, 3, 3, 3), (50_000,)]
        lists = [[shared.normal(s, "cpu", seed=i) for s in shapes] for i in range(4)]
        zero = torch.zeros(())
        kernels.sgd_ema_step(*lists, lr=0.1, found_inf=zero, weight_decay=[0.1] * 4, ema_decay=0.9)
        return torch.cat([t.flatten() for group in lists for t in group])

    def adamw():
        shapes = [(300, 200), (7,), (64, 3, 3, 3), (50_000,)]
        lists = [[shared.normal(s, "cpu", seed=i) for s in shapes] for i in range(5)]
        options = {"lr": 0.1, "count": torch.tensor(3.0), "found_inf": torch.zeros(())}
        lists[3] = [t.square() for t in lists[3]]
        kernels.adamw_ema_step(*lists, weight_decay=[0.1] * 4, ema_decay=0.9, **options)
        return torch.cat([t.flatten() for group in lists for t in group])

    def loss():
        leaves = [t.clone().requires_grad_() for t in (adv, ball, clean)]
        value, stats = kernels.local_ball_loss(leaves[0], target, leaves[1], leaves[2])
        value.backward()
        return torch.cat(
            [value.detach().view(1), torch.stack(stats), *(t.grad.flatten() for t in leaves)]
        )

    def perturb():
        shapes = [(300, 200), (7,), (64, 3, 3, 3), (50_000,)]
        params, grads, copies = (
            [shared.normal(s, "cpu", seed=i) for s in shapes] for i in range(3)
        )
        kernels.perturb_weights(params, grads, copies, gamma=0.01)
        moved = torch.cat([t.flatten() for t in (*params, *copies)])
        kernels.restore_weights(params, copies)
        return torch.cat([moved, *(t.flatten() for t in params)])

    return {
        "uniform_start": lambda: kernels.uniform_start(x, 0.1, rng),
        "uniform_start L2": lambda: kernels.uniform_start(x, 0.1, rng, norm="L2"),
        "attack_step": lambda: kernels.attack_step(x, z, grad, 0.1, 0.05),
        "attack_step L2": lambda: kernels.attack_step(x, z, grad, 0.1, 0.05, norm="L2"),
        "attack_step_": step_in_place,
        "apgd_step": lambda: kernels.apgd_step(
            x, z, x, grad, grad[:, 0, 0, 0].abs(), eps=0.1, momentum=0.75, norm="L2"
        ),
        "fab_step": lambda: kernels.fab_step(x, z, grad, 3 * grad[:, 0, 0, 0]),
        "cross_entropy_grad": lambda: kernels.cross_entropy_grad(adv, target),
        "kl_grad": lambda: kernels.kl_grad(adv, ball),
        "input_grad_step": lambda: kernels.input_grad_step(x, z, gy, weight, norm="L2", **stem),
        "stem_input_grad": lambda: (
            1e-2 * kernels.stem_input_grad(gy, weight, size=tuple(x.shape[2:]), stride=1, padding=1)
        ),
        "stem_weight_grad": lambda: torch.cat(
            [
                1e-2 * t.flatten()
                for t in kernels.stem_weight_grad(
                    x,
                    gy,
                    kernel=tuple(weight.shape[2:]),
                    stride=stem["stride"],
                    padding=stem["padding"],
                )
            ]
        ),
        "loss": loss,
        "augment": lambda: kernels.augment(data, index, rng, pad=4, flip=True)[0],
        "augment changed": lambda: kernels.augment(
            data, index, rng, pad=4, flip=True, cutmix=True, erase=0.5, jitter=0.4
        )[0],
        "augment start": lambda: kernels.augment(
            data, index, rng, pad=4, flip=True, memory=memory, eps=0.1
        )[2],
        "recall": recall,
        "remember": remember,
        "sgd_ema_step": optimise,
        "adamw_ema_step": adamw,
        "perturb_weights": perturb,
    }


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("op", list(every_op()) if native else [])
def test_the_number_of_threads_does_not_change_a_bit(threads, op):
    call = every_op()[op]
    with backends.use("native"):
        threads(1)
        alone = call()
        threads(2)
        shared_out = call()
    assert torch.equal(alone, shared_out)


def test_torch_governs_the_threads(threads):
    for n in (1, 2):
        threads(n)
        assert native._native.threads() == n if native._native.openmp else 1


@pytest.fixture
def portable():
    """The build for any processor, which dispatch would not pick on this one."""
    chosen = native._native.isa()
    native._native.use_isa(native._native.isas()[-1])
    yield
    native._native.use_isa(chosen)


@pytest.mark.parametrize("op", list(every_op()) if native else [])
def test_the_portable_build_agrees_with_the_best_one(op):
    call, builds = every_op()[op], native._native.isas()
    if len(builds) < 2:
        pytest.skip(f"this processor or build has one instruction set only: {builds}")
    outputs = []
    with backends.use("native"):
        for build in (builds[0], builds[-1]):
            native._native.use_isa(build)
            try:
                outputs.append(call())
            finally:
                native._native.use_isa(builds[0])
    exact = ("uniform_start", "attack_step", "attack_step_", "augment", "remember", "sgd_ema_step")
    if op in exact:
        assert torch.equal(*outputs)
    torch.testing.assert_close(*outputs, atol=2e-6, rtol=1e-5)


def test_portable_build_against_the_reference(portable):
    with backends.use("native"):
        for stem in shared.STEMS:
            for layout in shared.LAYOUTS:
                shared.check_stem(
                    shared.stem_inputs(stem, 3, "cpu", layout, whole=True), exact_signs=True
                )
        for shape in shared.ROWS:
            adv, ball, clean = shared.logit_inputs(shape, "cpu")
            shared.check_loss(adv, shared.targets(*shape, "cpu"), ball, clean, smoothing=0.1)
            half = [t.half() for t in (adv, ball, clean)]
            shared.check_loss(half[0], shared.targets(*shape, "cpu"), half[1], half[2])
        x = shared.images((3, 3, 7, 5), "cpu")
        shared.check_bits("uniform_start", x, 0.1, shared.rng_state("cpu"))
        shared.check("uniform_start", x, 0.5, shared.rng_state("cpu"), norm="L2", rounding=64)


def test_other_python_threads_run_meanwhile(threads):
    """Count in a thread while a kernel runs: with the GIL held, the thread could not."""
    threads(1)
    x = torch.rand(64, 3, 224, 224)
    rng, started, done = shared.rng_state("cpu"), threading.Event(), threading.Event()
    counted = []

    def count():
        started.set()
        ticks = 0
        while not done.is_set():
            ticks += 1
            time.sleep(0.001)
        counted.append(ticks)

    counter = threading.Thread(target=count)
    counter.start()
    started.wait()
    begin = time.perf_counter()
    address, out = x.data_ptr(), torch.empty_like(x)
    for _ in range(10):
        native._native.uniform_start(
            address, out.data_ptr(), 64, x[0].numel(), *rng.tolist(), 0, 0.1, True
        )
    spent = time.perf_counter() - begin
    done.set()
    counter.join()
    # With the GIL held, one switch a call is all there would be.
    assert counted[0] > 20 + 100 * spent


def test_a_target_outside_the_classes_is_refused():
    adv, ball, clean = shared.logit_inputs((4, 10), "cpu")
    one = torch.ones(())
    for bad in (-1, 10, 2**40):
        target = torch.tensor([0, 1, bad, 3])
        calls = (
            lambda t: native.cross_entropy_grad(adv, t, 1.0),
            lambda t: native.local_ball_loss(adv, t, ball, clean, one, one, 0.0),
            lambda t: native.local_ball_loss_backward(one, adv, t, ball, clean, one, one, 0.0),
        )
        for call in calls:
            with pytest.raises(IndexError, match=r"target must lie in \[0, 10\)"):
                call(target)


def test_what_the_kernels_do_not_cover_goes_to_the_reference():
    """Called past the checks of `ops`: an address read with wrong strides would crash or lie."""
    from engine.kernels import reference

    x = shared.images((4, 3, 6, 8), "cpu")
    last = shared.lay_out(x, "channels_last")
    eps = torch.tensor(0.1)
    cases = [
        (x.double(), x.double(), x.double()),
        (x[:, :, ::2, ::2], x[:, :, ::2, ::2], x[:, :, ::2, ::2]),
        (x.transpose(2, 3), x.transpose(2, 3), x.transpose(2, 3)),
        (x[:0], x[:0], x[:0]),
    ]
    for x_, z_, grad in cases:
        args = (x_, z_, grad - 0.5, eps.to(x_.dtype), eps.to(x_.dtype), "Linf")
        expected = reference.attack_step(*args)
        assert torch.equal(native.attack_step(*args), expected)
    assert not native.binding.served(x, last)
    assert not native.binding.served(x.expand(4, 3, 6, 8)[:, :1].expand(4, 3, 6, 8))


def test_extreme_crops_stay_inside_the_memory():
    """`crops` comes from the caller: offsets beyond the image show padding and write nothing."""
    memory = torch.full((2, 1, 4, 4), 5, dtype=torch.int8)
    x, index = torch.rand(2, 1, 4, 4), torch.tensor([0, 1])
    for offset in (4, -4, 100, -100, 2**31 - 1, -(2**31)):
        for mirrored in (0, 1):
            crops = torch.tensor([[0, offset, mirrored], [offset, 0, mirrored]], dtype=torch.int32)
            assert torch.equal(native.recall(memory, index, crops, x, torch.tensor(0.1), "Linf"), x)
            native.remember(memory, index, crops, x, x, torch.tensor(0.1))
            assert (memory == 5).all()


def test_import_without_the_module_falls_back_to_the_reference():
    code = (
        "import sys; sys.modules['engine.kernels.native._native'] = None\n"
        "import torch; from engine import kernels\n"
        "x = torch.rand(2, 3); print(kernels.attack_step(x, x, x, 0.1, 0.1).shape)\n"
        "print(kernels.backends.table()[0]['why'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch.Size([2, 3])" in done.stdout
    assert "the C++ kernels are not built; install" in done.stdout
    assert "plain PyTorch serves" in done.stderr


def test_freed_memory_is_kept():
    code = (
        "from engine.kernels import native\n"
        "import torch, resource, sys\n"
        "kept = native.keep_freed_memory()\n"
        "def faults():\n"
        "    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "    for _ in range(20): torch.empty(1 << 20).fill_(1.0)\n"
        "    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before\n"
        "faults(); print(kept, faults())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kept, faults = done.stdout.split()
    if kept == "True":
        # 20 tensors of 4 MiB are 20,480 pages.
        assert int(faults) < 2000
