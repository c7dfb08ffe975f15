"""Test the step: eager, recorded and replayed, in every precision; overflows; captures."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import logging
import types

import pytest
import torch
from torch import nn

import engine
from engine import L2, PGD, AdversaryMemory, Attack, EngineError, Linf, LocalBall, Schedule, recipes
from engine.data.loaders import Batch, ResidentLoader
from engine.device import distributed
from engine.device.capture import WARM_UP, CudaGraphs, unavailable
from engine.device.precision import LossScale, arithmetic, resolve
from engine.evaluation import robust_accuracy
from engine.models import compiled
from engine.models.dropout import Dropout
from engine.performance import capture_audit
from engine.performance.capture_audit import Tape
from engine.training.optimiser import Optimiser
from engine.training.step import Step

from ..conftest import Foreign, Tiny, blobs

STEPS = 20


class Dropped(Tiny):
    """With batch normalisation and dropout: everything that changes while training."""

    def __init__(self) -> None:
        super().__init__(batch_norm=True)
        self.drop = Dropout(0.3)

    def body(self, h):
        return self.fc(self.drop(torch.tanh(self.bn(h)).flatten(1)))


def make(
    model: nn.Module,
    *,
    objective=None,
    threat=None,
    attack=None,
    optimiser="sgd",
    steps=STEPS,
    lr=0.05,
    memory=None,
    schedule=None,
    **options,
) -> Step:
    model.train()
    return Step(
        model,
        objective=objective or LocalBall(global_weight=0.5),
        threat=threat or Linf(0.1),
        attack=attack or Attack(steps=2),
        optimiser=Optimiser(
            model,
            lr=(schedule or Schedule()).rates(lr, steps),
            name=optimiser,
            weight_decay=1e-3,
            ema=0.9,
        ),
        memory=memory,
        seed=5,
        **options,
    )


def train(step: Step, memory: AdversaryMemory | None = None, steps: int = STEPS) -> None:
    images, labels = blobs(64)
    loader = ResidentLoader(images, labels, 16, pad=1, flip=True, memory=memory)
    epoch = 0
    while step.done < steps:
        for batch in loader.epoch(epoch):
            if step.done < steps:
                step(batch)
        epoch += 1


def assert_same(ours: Step, theirs: Step) -> None:
    """Bit for bit: weights, statistics, momentum, average, counters, metrics, memory."""
    mine, yours = ours.tensors(), theirs.tensors()
    assert mine.keys() == yours.keys()
    for name in mine:
        assert torch.equal(mine[name], yours[name]), name
    assert ours.means() == theirs.means()


@pytest.mark.parametrize("optimiser", ["sgd", "adamw", "torch-sgd", "torch-adamw"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_replayed_steps_are_the_eager_steps(precision, optimiser):
    """Record a step once, operator by operator, and replay it 20 times: nothing is frozen."""
    torch.manual_seed(0)
    model = Dropped()
    shape, threat = (1, 6, 6), Linf(0.1)
    memories = [AdversaryMemory(64, shape, threat) for _ in range(2)]
    options = {"precision": precision, "optimiser": optimiser, "attack": Attack(2, start="memory")}
    eager = make(copy.deepcopy(model), memory=memories[0], **options)
    tape = Tape()
    taped = make(copy.deepcopy(model), memory=memories[1], recorder=tape, **options)
    train(eager, memories[0])
    train(taped, memories[1])
    assert tape.calls
    assert taped.why_eager is None
    assert_same(taped, eager)
    for name, t in model.named_parameters():
        assert not torch.equal(t, eager.tensors()[f"model.{name}"]), name


@pytest.mark.parametrize("k", [1, 2, 10])
@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5)], ids=str)
@pytest.mark.parametrize(
    "objective",
    [
        PGD(),
        LocalBall(),
        LocalBall(direction="ce", anchor="start", global_weight=0.5),
        LocalBall(direction="gradient-norm"),
        LocalBall(distance="squared", global_weight=0.5),
    ],
    ids=str,
)
def test_every_objective_replays(objective, threat, k):
    options = {"objective": objective, "threat": threat, "attack": Attack(steps=k)}
    torch.manual_seed(0)
    model = Tiny(batch_norm=True)
    eager = make(copy.deepcopy(model), **options)
    taped = make(copy.deepcopy(model), recorder=Tape(), **options)
    train(eager, steps=4)
    train(taped, steps=4)
    assert_same(taped, eager)


def test_a_schedule_with_corners_replays():
    schedule = Schedule(name="piecewise", milestones=(0.25, 0.5), factor=0.1)
    rates = schedule.rates(0.05, STEPS)
    assert len(set(rates)) == 3
    torch.manual_seed(0)
    model = Tiny()
    eager = make(copy.deepcopy(model), schedule=schedule)
    taped = make(copy.deepcopy(model), schedule=schedule, recorder=Tape())
    images, labels = blobs(16)
    batch = next(ResidentLoader(images, labels, 16).epoch(0))
    for rate in rates:
        eager(batch)
        taped(batch)
        assert float(taped.optimiser.lr) == float(eager.optimiser.lr) == pytest.approx(rate)
    assert_same(taped, eager)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("objective", recipes.objectives().values(), ids=lambda o: o().name)
def test_every_objective_replays_while_the_radius_grows(objective, k):
    threat, schedule = Linf(0.1), Schedule(eps_warmup=0.5)
    from_memory = objective().name in ("local-ball", "pgd", "fgsm-pgi")
    steps = []
    for recorder in (None, Tape()):
        torch.manual_seed(0)
        memory = AdversaryMemory(64, (1, 6, 6), threat) if from_memory else None
        step = make(
            Tiny(batch_norm=True),
            objective=objective(),
            threat=threat,
            attack=Attack(steps=k, start="memory" if from_memory else "random"),
            memory=memory,
            steps=4,
            radii=schedule.radii(threat.eps, 4),
            recorder=recorder,
        )
        train(step, memory, steps=4)
        steps.append(step)
    assert_same(steps[1], steps[0])
    assert steps[0].tensors()["eps"] == pytest.approx(0.1)


class Watched(PGD):
    """Keeps the batch's adversaries, in a tensor that a replay writes again."""

    def compute(self, *arguments):
        outcome = super().compute(*arguments)
        object.__setattr__(self, "seen", outcome.adversary)
        return outcome


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5)], ids=str)
@pytest.mark.parametrize("recorder", [None, Tape], ids=["eager", "replayed"])
def test_adversaries_grow_with_the_radius(recorder, threat):
    """Each lies on its step's sphere; what is remembered of it is relative to that."""
    n = 16
    memory = AdversaryMemory(n, (1, 6, 6), threat)
    torch.manual_seed(0)
    objective = Watched()
    step = make(
        Tiny(),
        objective=objective,
        threat=threat,
        attack=Attack(steps=10, start="memory"),
        memory=memory,
        steps=8,
        radii=Schedule(eps_warmup=0.5).radii(threat.eps, 8),
        recorder=recorder and recorder(),
    )
    x = torch.full((n, 1, 6, 6), 0.5)
    batch = Batch(x, torch.arange(n) % 4, torch.arange(n), torch.zeros((n, 3), dtype=torch.int32))

    def length(delta):
        return delta.flatten(1).norm(p=2 if threat.norm == "L2" else torch.inf, dim=1)

    for share in (0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0):
        step(batch)
        assert length(objective.seen - x).tolist() == pytest.approx(
            [share * threat.eps] * n, rel=1e-4
        )
        # To a step of an int8.
        assert length(memory.deltas.float()).tolist() == pytest.approx([127.0] * n, rel=0.02)


def test_validation_has_the_whole_radius_while_training_s_grows(monkeypatch):
    met = []
    monkeypatch.setattr(
        robust_accuracy,
        "pgd",
        lambda model, x, y, threat, **_: met.append(threat.eps) or torch.ones_like(y).bool(),
    )
    images, labels = blobs(32)
    engine.train(
        Tiny(),
        (images, labels),
        Linf(0.1),
        schedule=Schedule(eps_warmup=0.9),
        epochs=2,
        batch_size=16,
        validation=(images.float() / 255, labels),
    )
    assert met == [0.1, 0.1]


def test_as_many_radii_as_steps():
    with pytest.raises(EngineError, match="7 radii for a schedule of 20"):
        make(Tiny(), radii=[0.1] * 7)


def test_recording_leaves_no_trace():
    """Warm-up moves weights, statistics and counters past the run's end; all are restored."""
    torch.manual_seed(0)
    memory = AdversaryMemory(64, (1, 6, 6), Linf(0.1))
    images, labels = blobs(64)
    loader = ResidentLoader(images, labels, 16, memory=memory)
    loader.begin(0)
    step = make(
        Dropped(),
        memory=memory,
        take=loader.take,
        attack=Attack(steps=2, start="memory"),
        steps=4,
        radii=Schedule(eps_warmup=0.5).radii(0.1, 4),
    )
    before = {name: t.detach().clone() for name, t in step.tensors().items()}
    places = {name: t.data_ptr() for name, t in step.tensors().items()}
    runs = []
    recorder = types.SimpleNamespace(
        warm_up=lambda run: [run() for _ in range(WARM_UP)],
        record=lambda run: lambda: runs.append(1),
        close=lambda: None,
    )
    step._recorder = recorder
    step()
    assert runs == [1]
    for name, t in step.tensors().items():
        assert t.data_ptr() == places.get(name, t.data_ptr()), name
        assert torch.equal(t, before.get(name, torch.zeros_like(t))), name


def test_a_batch_of_another_size_runs_eagerly_and_says_so_once(caplog):
    torch.manual_seed(0)
    model = Tiny(batch_norm=True)
    eager = make(copy.deepcopy(model))
    taped = make(copy.deepcopy(model), recorder=Tape())
    images, labels = blobs(64)
    x = images.float() / 255
    batches = [Batch(x[i : i + 16], labels[i : i + 16]) for i in (0, 16)]
    batches += [Batch(x[40:47], labels[40:47]), Batch(x[50:57], labels[50:57]), batches[0]]
    with caplog.at_level(logging.WARNING):
        for batch in batches:
            eager(batch)
            taped(batch)
    assert_same(taped, eager)
    assert [r.getMessage() for r in caplog.records] == [
        "this step runs without its CUDA graph: a batch of 7 does not fit the graph of 16"
    ]


def test_a_step_that_takes_its_own_batches_replays():
    """The whole step, batch included, from device state alone."""
    images, labels = blobs(16)
    x = images.float() / 255
    steps = []
    for recorder in (None, Tape()):
        torch.manual_seed(0)

        def take(state):
            index = (torch.arange(8) + state[1]) % 16
            return Batch(x.index_select(0, index), labels.index_select(0, index))

        steps.append(make(Tiny(), take=take, recorder=recorder))
        for _ in range(6):
            steps[-1]()
    assert_same(steps[1], steps[0])
    assert steps[1].images == 48


@pytest.mark.skipif(
    compiled.unavailable(torch.device("cpu")) is not None,
    reason=str(compiled.unavailable(torch.device("cpu"))),
)
def test_compiled_passes_train_the_same_network():
    torch.manual_seed(0)
    model = Tiny(batch_norm=True)
    eager = make(copy.deepcopy(model))
    ours_compiled = make(copy.deepcopy(model), compile=True)
    train(eager)
    train(ours_compiled)
    assert ours_compiled.means()["loss"] == pytest.approx(eager.means()["loss"], rel=1e-4)
    for (name, ours), theirs in zip(
        ours_compiled.model.state_dict().items(), eager.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=name)
    assert all(p.requires_grad for p in ours_compiled.model.parameters())


def test_a_folder_with_a_space_trains_uncompiled_and_says_so_once(monkeypatch, caplog):
    """PyTorch's CPU compiler hands the linker -L and a folder without quotes."""
    monkeypatch.setattr(torch, "__file__", "/opt/my env/torch/__init__.py")
    model = Tiny()
    step = make(model, compile=True)
    assert step.network is model
    train(step)
    told = [record.message for record in caplog.records if "torch.compile" in record.message]
    assert len(told) == 1
    assert "space in its path: /opt/my env/torch/lib" in told[0]
    assert compiled.unavailable(torch.device("cuda")) is None


def test_a_capture_that_fails_is_announced_and_the_step_goes_on(caplog):
    class Broken(Tape):
        def record(self, run):
            try:
                raise RuntimeError("operation not permitted\nwhen the stream is capturing")
            finally:
                # As torch.cuda.graph does at the end of a capture that is broken.
                raise RuntimeError("operation failed due to a previous error during capture")

    torch.manual_seed(0)
    model = Tiny()
    eager, broken = make(copy.deepcopy(model)), make(copy.deepcopy(model), recorder=Broken())
    with caplog.at_level(logging.WARNING):
        train(eager, steps=4)
        train(broken, steps=4)
    assert broken.why_eager == "the capture failed: operation not permitted"
    assert [r.getMessage() for r in caplog.records] == [
        "running without a CUDA graph: the capture failed: operation not permitted"
    ]
    assert_same(broken, eager)


def test_no_cuda_no_graph():
    assert unavailable(torch.device("cpu")) == "CUDA graphs need a CUDA device, this is cpu"
    assert unavailable(torch.device("cuda")) is None


def test_what_averages_gradients_is_made_where_the_capture_will_be(monkeypatch):
    """DistributedDataParallel keeps autograd's accumulation nodes, which remember a stream."""
    inside, made = [], []

    class Watched(Tape):
        @contextlib.contextmanager
        def context(self):
            inside.append(True)
            yield
            inside.pop()

    def averaged(network, compute):
        made.append(bool(inside))
        return functools.partial(compute, network)

    monkeypatch.setattr(distributed, "averaged", averaged)
    make(Tiny(), recorder=Watched())
    make(Tiny())
    assert made == [True, False]


def test_cuda_graphs_warm_up_and_capture_on_one_stream(monkeypatch):
    """The calls that CUDA sees, in order, on a machine that has none."""
    told: list[object] = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            told.append(f"{self.name} waits for {other.name}")

    class On:
        def __init__(self, what):
            self.what = what

        def __enter__(self):
            told.append(f"into {self.what}")

        def __exit__(self, *_):
            told.append(f"out of {self.what}")

    class Graph:
        def replay(self):
            told.append("replay")

        def reset(self):
            told.append("reset")

    def graph(it, *, pool, stream, capture_error_mode):
        assert pool == "pool"
        return On(f"{capture_error_mode} capture on {stream.name}")

    side, current = Stream("side"), Stream("current")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: On(s.name))
    monkeypatch.setattr(torch.cuda, "set_stream", lambda s: told.append(f"back on {s.name}"))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: told.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(gc, "collect", lambda: told.append("collect"))
    with CudaGraphs(torch.device("cuda")) as graphs:
        graphs.warm_up(lambda: told.append("run"))
        replay = graphs.record(lambda: told.append("run"))
        replay()
        assert told == [
            "side waits for current",
            *("into side", *["run"] * WARM_UP, "out of side"),
            "current waits for side",
            "collect",
            "synchronize",
            # A global capture would fail a loader's threads.
            *("into thread_local capture on side", "run", "out of thread_local capture on side"),
            "back on current",
            "replay",
        ]
        told.clear()
        with pytest.raises(ZeroDivisionError):
            graphs.record(lambda: 1 / 0)
        # torch.cuda.graph may leave the process on the capturing stream then.
        assert told[-1] == "back on current"
        told.clear()
        with pytest.raises(ZeroDivisionError):
            graphs.warm_up(lambda: 1 / 0)
        # What the caller then restores, the side stream may still be writing.
        assert told == [
            "side waits for current",
            "into side",
            "out of side",
            "current waits for side",
        ]
        told.clear()
    assert told == ["synchronize", "reset"]


@pytest.mark.parametrize(
    ("mistake", "complaint"),
    [
        (lambda x: x * float(x.mean()), "reads a value of the device on the host"),
        (lambda x: x[x > 0], "shape depends on its contents"),
        (lambda x: x + torch.rand_like(x), "draws random numbers from a generator"),
        (lambda x: x + torch.tensor(3.0), "makes a tensor from a number of the host's"),
        (lambda x: x + torch.ones(4)[0], None),
    ],
    ids=["read", "shape", "random", "host", "fine"],
)
def test_tape_complains(mistake, complaint):
    x = torch.randn(8)
    tape = Tape(known=lambda: [x])
    tape.record(lambda: mistake(x))
    if complaint is None:
        assert tape.complaints == []
    else:
        assert any(complaint in line for line in tape.complaints), tape.complaints


def test_tape_complains_of_a_tensor_from_outside():
    x, stray = torch.randn(8), torch.randn(8)
    tape = Tape(known=lambda: [x])
    tape.record(lambda: x + stray)
    assert tape.complaints == ["bookkeeping: add touches a tensor (8,) that the step does not own"]


def test_tape_freezes_the_numbers_of_the_host():
    """As a graph does: this is what the audit's comparison finds."""
    x, count = torch.zeros(1), [0]

    def run():
        count[0] += 1
        x.add_(count[0])

    replay = Tape().record(run)
    replay()
    assert x.item() == 2.0


@pytest.mark.parametrize(
    "name",
    [
        # Large networks; their objectives are met on small ones as well.
        pytest.param(name, marks=pytest.mark.slow)
        if name.startswith("cifar") and name != "cifar10"
        else name
        for name in recipes.names()
    ],
)
def test_every_recipe_can_be_captured(name):
    recipe = recipes.load(name)
    found = capture_audit.audit(recipe)
    assert found.complaints == []
    # The whole of it outside the network: what the kernels are for. These rivals' losses have none.
    plain = recipe.objective.name in ("mart", "gat", "llr", "grad-align", "fgsm-pgi")
    assert found.attack_step_ops <= (20 if plain else 2)
    assert found.loss_ops <= (30 if plain else 2)
    assert found.optimiser_ops == 1


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_recipe_can_be_captured_in_low_precision(precision):
    found = capture_audit.audit(recipes.load("fashion-mnist", {"step.precision": precision}))
    assert found.complaints == []


def test_audit_notices_a_generator_and_a_number_of_the_host(monkeypatch):
    compute = PGD.compute

    def careless(self, model, x, y, *rest):
        outcome = compute(self, model, x + 1e-3 * torch.rand_like(x), y, *rest)
        return dataclasses.replace(outcome, loss=outcome.loss * (1 + float(outcome.loss)))

    monkeypatch.setattr(PGD, "compute", careless)
    complaints = " ".join(capture_audit.audit(recipes.load("quickstart-pgd10")).complaints)
    assert "rand_like draws random numbers from a generator" in complaints
    assert "_local_scalar_dense reads a value of the device on the host" in complaints
    assert "differs between replay and eager step" in complaints


@pytest.mark.parametrize("optimiser", ["sgd", "adamw", "torch-sgd", "torch-adamw"])
@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("recorder", [None, Tape], ids=["eager", "replayed"])
def test_an_overflow_leaves_weights_and_momentum_alone(optimiser, at, recorder):
    torch.manual_seed(0)
    step = make(
        Tiny(),
        precision="fp16",
        optimiser=optimiser,
        recorder=recorder and recorder(),
        attack=Attack(steps=1),
        objective=PGD(),
    )
    images, labels = blobs(64)
    batches = list(ResidentLoader(images, labels, 16).epoch(0))
    for batch in batches[:at]:
        step(batch)
    assert not step.scale.found_inf
    kept = {
        name: t.clone()
        for name, t in step.tensors().items()
        if name.startswith(("model.", "optimiser.")) and not name.endswith(".now")
    }
    scale = float(step.scale.scale)
    if recorder is not None and at == 0:
        # Recorded in good order, then struck at its first replay.
        step._record(batches[0])
    step.scale.scale.fill_(float("inf"))
    step(batches[0])
    assert step.scale.found_inf
    for name, before in kept.items():
        assert torch.equal(step.tensors()[name], before), name
    step.scale.scale.fill_(scale)
    for batch in batches:
        step(batch)
    assert not step.scale.found_inf
    for name, t in step.tensors().items():
        if name.startswith(("model.", "optimiser.")):
            assert t.isfinite().all(), name
            if name in kept and name.startswith("model."):
                assert not torch.equal(t, kept[name]), name


def test_loss_scale_halves_on_overflow_and_doubles_after_a_while():
    scale = LossScale(torch.device("cpu"), dynamic=True, initial=1024.0, interval=3)
    grads = [torch.full((4,), 2048.0), torch.full((2,), 1024.0)]
    scale.unscale_(grads)
    scale.update()
    assert grads[0].tolist() == [2.0] * 4
    assert grads[1].tolist() == [1.0] * 2
    scale.unscale_([torch.tensor([1.0, float("inf")])])
    assert scale.found_inf
    scale.update()
    assert scale.scale == 512.0
    for _ in range(3):
        scale.unscale_([torch.ones(2)])
        assert not scale.found_inf
        scale.update()
    assert scale.scale == 1024.0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("model", [Tiny, Foreign])
def test_low_precision_trains_float32_weights_to_about_the_same(precision, model):
    torch.manual_seed(0)
    start = model()
    full = make(copy.deepcopy(start))
    low = make(copy.deepcopy(start), precision=precision)
    train(full)
    train(low)
    assert all(p.dtype == torch.float32 for p in low.model.parameters())
    assert low.means()["loss"] == pytest.approx(full.means()["loss"], rel=0.03)
    assert low.means()["loss"] != full.means()["loss"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stem_learns_in_every_precision(precision):
    """A cast of the stem's weight that the attack made must not serve the training pass."""
    torch.manual_seed(0)
    step = make(Tiny(), precision=precision)
    before = step.model.conv1.weight.detach().clone()
    train(step, steps=1)
    assert step.model.conv1.weight.grad.abs().sum() > 0
    assert not torch.equal(before, step.model.conv1.weight)


def test_precision_by_device():
    cpu = torch.device("cpu")
    assert resolve("auto", cpu) == "fp32"
    assert resolve("bf16", cpu) == "bf16"
    with pytest.raises(EngineError, match="tf32 needs an NVIDIA GPU"):
        resolve("tf32", cpu)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_float32_products_are_rounded_in_all_of_a_step_or_nowhere(monkeypatch, precision):
    """In the attack's backward pass, the loss's, and the optimiser; and afterwards as before."""
    seen = []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(flags())
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(flags())
            return grad

    class Watched(Tiny):
        def body(self, h):
            return super().body(Spy.apply(h))

    def flags():
        backends = torch.backends
        newer = [k.fp32_precision for k in (backends.cudnn.conv, backends.cuda.matmul)]
        return backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32, *newer

    torch.manual_seed(0)
    before, step = flags(), make(Watched())
    # The flags may be set without a GPU; the rest of the step stays where it is.
    step.precision, step.device = precision, torch.device("cuda")
    monkeypatch.setattr(torch, "autocast", lambda *_: contextlib.nullcontext())
    train(step, steps=1)
    rounded = precision == "tf32"
    newer = "tf32" if rounded else "ieee"
    wanted = before if precision == "bf16" else (rounded, rounded, newer, newer)
    assert set(seen) == {wanted}
    # Two steps of the attack and the training pass, forwards and backwards.
    assert len(seen) >= 4
    assert flags() == before


def test_a_program_may_have_set_its_arithmetic_the_newer_way():
    """PyTorch then raises where the older flags are read."""
    knobs = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    before = [knob.fp32_precision for knob in knobs]
    theirs = ["ieee", "tf32", "tf32"]
    try:
        for knob, value in zip(knobs, theirs, strict=True):
            knob.fp32_precision = value
        with pytest.raises(RuntimeError):
            _ = torch.backends.cudnn.allow_tf32
        for precision, inside in (("fp32", "ieee"), ("tf32", "tf32")):
            with arithmetic(precision, torch.device("cuda")):
                assert {knob.fp32_precision for knob in knobs} == {inside}
                assert torch.backends.cudnn.allow_tf32 == (precision == "tf32")
            assert [knob.fp32_precision for knob in knobs] == theirs
    finally:
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("highest")
        for knob, value in zip(knobs, before, strict=True):
            knob.fp32_precision = value
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("wanted", [False, True])
def test_a_recipe_may_ask_for_the_same_bits(wanted):
    cudnn, seen = torch.backends.cudnn, []

    class Watched(PGD):
        def compute(self, *arguments):
            seen.append((cudnn.deterministic, cudnn.benchmark))
            return super().compute(*arguments)

    step = make(Tiny(), objective=Watched(), deterministic=wanted)
    cudnn.benchmark = True
    try:
        train(step, steps=1)
        assert (cudnn.deterministic, cudnn.benchmark) == (False, True)
    finally:
        cudnn.benchmark = False
    assert seen == [(wanted, not wanted)]
    recipe = recipes.load("quickstart", {"step.deterministic": str(wanted).lower()})
    assert recipe.step.deterministic == wanted


@pytest.mark.parametrize("policy", ["eval", "batch"])
def test_attack_passes_leave_batch_norm_statistics_alone(policy):
    """One training pass of PGD training, one update, however many attack passes."""
    torch.manual_seed(0)
    step = make(Tiny(batch_norm=True), objective=PGD(), attack=Attack(steps=3, batch_norm=policy))
    train(step, steps=2)
    assert step.model.bn.num_batches_tracked == 2


def test_dropout_masks_are_a_function_of_the_step():
    state = torch.tensor([3, 7])
    layer = Dropout(0.25)
    x = torch.ones(64, 50)
    layer.state = state
    first, again = layer(x), layer(x)
    assert torch.equal(first, again)
    state[1] += 1
    assert not torch.equal(layer(x), first)
    kept = (first > 0).float().mean()
    assert abs(float(kept) - 0.75) < 0.03
    torch.testing.assert_close(first.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert torch.equal(layer.eval()(x), x)


def test_a_step_past_the_schedule_is_refused():
    step = make(Tiny(), steps=2)
    train(step, steps=2)
    images, labels = blobs(16)
    with pytest.raises(EngineError, match="the schedule ends after 2 steps"):
        step(next(ResidentLoader(images, labels, 16).epoch(0)))


def test_a_step_without_a_batch_is_refused():
    with pytest.raises(EngineError, match="hand one over"):
        make(Tiny())()
