"""The step benchmark: rivals that do the same thing, rows that say what was measured."""

import contextlib
import itertools
import json
import sys
from dataclasses import replace
from unittest.mock import MagicMock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine import PGD, cli
from engine.benchmarks import rivals, step, tables
from engine.device import machine
from engine.models import compiled
from engine.objectives import Passes
from engine.performance import timing
from engine.performance.capture_audit import Tape

TINY = step.Setting(
    "tiny-cnn", (8, 1, 8, 8), [step.METHODS[1], step.PGD10, step.TRADES10], False, True, 0.2
)


class Places(TorchDispatchMode):
    """Where the tensors lie that are touched within the block; numbers left out."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        self.found |= {t.device.type for t in tensors if t.dim()}
        return out


def test_all_that_is_timed_is_on_the_device_and_waited_for(monkeypatch):
    """A device that has shapes and no numbers stands in for a GPU: what is left on the CPU meets it
    and fails.
    """
    where, timed = torch.device("meta"), {}

    def side_by_side(calls, *, device, **_):
        assert device == where
        for name, call in calls.items():
            if "k=10" in name:
                continue  # as with two steps
            places = Places()
            # The loop of Fast-AT ends its step by reading its loss, which here is no number.
            reads = pytest.raises(RuntimeError, match="item")
            may = reads if name == "fast_adversarial-style" else contextlib.nullcontext()
            if "k=2" in name:
                call()  # the first shuffles on the host, and captures
            with may, places:
                call()
            timed[name] = places.found
        return {name: timing.quantiles([1e-3]) for name in calls}

    graphs = []
    for name in ("fast_adversarial", "trades"):
        loop = getattr(rivals, name)
        monkeypatch.setattr(rivals, name, lambda *a, loop=loop: loop(*a[:3], 1))
    monkeypatch.setattr(machine, "device", lambda: where)
    monkeypatch.setattr(timing, "side_by_side", side_by_side)
    monkeypatch.setattr(step, "agrees", lambda *_: True)
    monkeypatch.setattr(step, "unavailable", lambda device: None if device == where else "no")
    monkeypatch.setattr(step, "CudaGraphs", lambda device: graphs.append(device) or Tape())
    step._measure(TINY, [])
    ours = [f"{mode} local-ball, ce, memory k=2" for mode in ("ours", "bare", "captured")]
    assert timed == {name: {"meta"} for name in (*ours, "fast_adversarial-style", "TRADES-style")}
    assert graphs == [where] * len(TINY.methods)


def test_a_captured_step_replays_what_it_recorded(monkeypatch):
    """And makes its own batches, epoch after epoch, as in training."""
    tapes = []

    def graphs(device):
        assert device == machine.device()
        tapes.append(Tape())
        return tapes[-1]

    monkeypatch.setattr(step, "CudaGraphs", graphs)
    built, loader = step.built_step(TINY, step.METHODS[1], captured=True)
    (tape,) = tapes
    tape.known = lambda: [*built.tensors().values(), *loader.tensors()]
    monkeypatch.setattr(step, "built_step", lambda *_, **__: (built, loader))
    call = step.our_step(TINY, step.METHODS[1], captured=True)
    weights = [built.model.fc2.weight.detach().clone()]
    for _ in range(2 * len(loader) + 1):
        call()
        weights.append(built.model.fc2.weight.detach().clone())
    assert built.why_eager is None
    assert tape.complaints == []
    assert any(call.op.namespace == "engine" for call in tape.calls)
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(weights))


def test_a_call_is_over_when_the_gpu_is_done(monkeypatch):
    done = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: done.append("waited"))
    timing.side_by_side(
        {"one": lambda: done.append("called")}, device="cuda", seconds=0.0, sample_ms=0.0
    )
    assert done == ["called", "waited"] * (len(done) // 2)
    assert len(done) >= 2 * 6
    done.clear()
    timing.side_by_side({"one": lambda: done.append("called")}, seconds=0.0, sample_ms=0.0)
    assert set(done) == {"called"}


def test_all_calculate_alike(monkeypatch):
    """By itself PyTorch rounds in convolutions on a GPU, the rivals' that is: our steps say what
    they want.
    """
    convolutions, found = torch.backends.cudnn, []
    monkeypatch.setattr(machine, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(convolutions, "allow_tf32", True)
    monkeypatch.setattr(step, "_measure", lambda *_: found.append(convolutions.allow_tf32) or [])
    monkeypatch.setattr(step, "settings", lambda quick: [TINY])
    step.run(quick=True)
    assert found == [False]
    assert convolutions.allow_tf32


@pytest.mark.parametrize(("device", "asked"), [("cpu", "cpu"), ("meta", "gpu")])
def test_packages_work_where_the_network_is(monkeypatch, device, asked):
    names = ("foolbox", "art", "art.defences", "art.defences.trainer", "art.estimators")
    fakes = {name: MagicMock() for name in (*names, "art.estimators.classification")}
    for name, module in fakes.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(machine, "device", lambda: torch.device(device))
    nets = [step.network(TINY, ours=False) for _ in range(2)]
    rivals.foolbox_pgd(nets[0], 0.1, 0.02, 2)
    rivals.toolbox(nets[1], 0.1, 0.02, 2, TINY.shape, 10)
    foolbox = fakes["foolbox"].PyTorchModel.call_args.kwargs
    toolbox = fakes["art.estimators.classification"].PyTorchClassifier.call_args.kwargs
    assert foolbox["device"] == torch.device(device)
    assert toolbox["device_type"] == asked


@pytest.mark.parametrize(
    ("loop", "method"),
    [(rivals.fast_adversarial, step.PGD10), (rivals.trades, step.TRADES10)],
    ids=["fast_adversarial", "trades"],
)
def test_a_rivals_step_and_ours_make_the_same_weights(loop, method):
    """What a sceptic asks first: ten attack steps and an update from one start, by both."""
    assert step.agrees(loop, method)


@pytest.mark.parametrize(
    ("loop", "method"),
    [(rivals.fast_adversarial, step.PGD10), (rivals.trades, step.TRADES10)],
    ids=["fast_adversarial", "trades"],
)
def test_a_rival_that_does_something_else_is_noticed(loop, method):
    def weaker(model, eps, alpha, k):
        return loop(model, eps, alpha, k - 1)

    def shorter(model, eps, alpha, k):
        return loop(model, eps, 0.9 * alpha, k)

    assert not step.agrees(weaker, method)
    assert not step.agrees(shorter, method)


def test_rivals_train_a_network_without_our_ops():
    """Else they would be timed with our stem's gradients, and a claim against them would be against
    ourselves.
    """
    setting = step.Setting("fast-at-mnist", (4, 1, 28, 28), [], False, False, 0.0)
    called = []
    for ours in (True, False):
        # On the CPU, where our stems have ops.
        net = step.network(setting, ours=ours).cpu()
        x = torch.rand(setting.shape, requires_grad=True)
        with torch.profiler.profile() as session:
            net(x).sum().backward()
        names = {event.key for event in session.key_averages()}
        called.append({name for name in names if name.startswith("engine::")})
    assert called == [{"engine::stem_input_grad", "engine::stem_weight_grad"}, set()]


def test_bare_passes_are_the_passes_declared():
    """Counted where they happen: rows through a layer forward, and back to its input and weight."""
    counts = {"forward": 0, "input_grad": 0, "weight_grad": 0}

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h, weight):
            ctx.save_for_backward(h, weight)
            counts["forward"] += 1
            return h @ weight

        @staticmethod
        def backward(ctx, grad):
            h, weight = ctx.saved_tensors
            wanted = torch._C._will_engine_execute_node
            counts["input_grad"] += 1
            counts["weight_grad"] += wanted(ctx.next_functions[1][0])
            return grad @ weight.t(), h.t() @ grad

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.weight = torch.nn.Linear(4, 4), torch.nn.Parameter(torch.eye(4))

        def forward(self, x):
            return Counted.apply(self.first(x), 1 * self.weight)  # no leaf: the engine tells

    for method in step.METHODS:
        passes = method.objective.passes(method.attack)
        run = step.bare_passes(Net(), torch.rand(3, 4), passes)
        counts.update(dict.fromkeys(counts, 0))
        run()
        assert Passes(**counts) == passes, method.label


def test_rows_say_what_was_measured(monkeypatch):
    monkeypatch.setattr(step, "settings", lambda quick: [TINY])
    monkeypatch.setattr(step, "unavailable", lambda device: "not in this test")
    rows = step.run(quick=True)
    assert [(row["objective"], row["k"]) for row in rows] == [
        ("local-ball, ce, memory", 2),
        ("pgd", 10),
        ("trades", 10),
    ]
    for row in rows:
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["overhead_vs_passes"] > 0
        assert row["mode"] == "eager"
    local, pgd, trades = rows
    assert local["passes"] == 11
    assert pgd["share_of_pgd10"] == 1.0
    assert set(pgd["speedup_vs"]) == {"fast_adversarial-style"}
    assert set(trades["speedup_vs"]) == {"TRADES-style"}
    assert "| pgd | 10 | eager | 23 |" in tables.step(rows)


def test_a_rival_that_disagrees_gets_no_ratio(monkeypatch):
    monkeypatch.setattr(step, "settings", lambda quick: [TINY])
    monkeypatch.setattr(step, "agrees", lambda loop, method: method is step.TRADES10)
    monkeypatch.setattr(step, "unavailable", lambda device: "not in this test")
    rows = step.run(quick=True)
    assert rows[1]["speedup_vs"] == {}
    assert rows[0]["note"] == "fast_adversarial-style disagrees with our step: no ratio"
    assert rows[2]["speedup_vs"]


def test_a_package_that_is_missing_is_named(monkeypatch):
    def missing(*_):
        raise ImportError("No module named 'torchattacks'")

    monkeypatch.setattr(rivals, "torchattacks_pgd", missing)
    monkeypatch.setattr(rivals, "foolbox_pgd", missing)
    monkeypatch.setattr(rivals, "toolbox", missing)
    # PyTorch compiles nothing in a folder with a space in its path.
    monkeypatch.setattr(compiled, "unavailable", lambda device: None)
    notes: list[str] = []
    setting = step.Setting("tiny-cnn", (8, 1, 8, 8), [], True, False, 0.1)
    assert [name for name, _ in step._rivals(setting, notes)] == ["torch.compile of it"]
    assert (
        notes[0] == "torchattacks is not there (No module named 'torchattacks'): see `make rivals`"
    )


def test_a_folder_that_cannot_be_compiled_in_is_noted_and_not_timed(monkeypatch):
    """A mode named "compiled" that ran uncompiled would be a wrong number."""
    monkeypatch.setattr(compiled, "unavailable", lambda device: "a space in its path: /a b")
    setting = replace(TINY, methods=[step.PGD10], packages=True)
    monkeypatch.setattr(step, "settings", lambda quick: [setting])
    monkeypatch.setattr(step, "unavailable", lambda device: "not in this test")
    rows = step.run(quick=True)
    assert [row["mode"] for row in rows] == ["eager"]
    assert "torch.compile of it" not in rows[0]["speedup_vs"]
    assert "not compiled: a space in its path: /a b" in rows[0]["note"]


def test_packages_train_where_they_are_installed():
    setting = step.Setting("tiny-cnn", (8, 1, 8, 8), [], True, False, 0.1)
    x, y = (t[:8] for t in step._data(setting))
    ran = 0
    for make in (
        lambda net: rivals.torchattacks_pgd(net, 0.1, 0.02, 2),
        lambda net: rivals.foolbox_pgd(net, 0.1, 0.02, 2),
        lambda net: rivals.toolbox(net, 0.1, 0.02, 2, (8, 1, 8, 8), 10),
    ):
        with contextlib.suppress(ImportError):
            net = step.network(setting, ours=False)
            before = net.fc2.weight.detach().clone()
            make(net)(x, y)
            assert not torch.equal(before, net.fc2.weight)
            ran += 1
    if ran == 0:
        pytest.skip("none of torchattacks, foolbox and the toolbox is installed: `make rivals`")


def test_ratios_pair_what_was_timed_together():
    slow = timing.Timing(0, 0, 0, (2.0, 20.0, 2.2))
    fast = timing.Timing(0, 0, 0, (1.0, 10.0, 1.0))
    assert slow.over(fast) == 2.0


def test_command_line(monkeypatch, capsys):
    small = step.Setting("tiny-cnn", (8, 1, 8, 8), [step.METHODS[3]], False, False, 0.1)
    monkeypatch.setattr(step, "settings", lambda quick: [small])
    monkeypatch.setattr(step, "unavailable", lambda device: "not in this test")
    assert cli.run(["bench", "step", "--quick", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["objective"] == "pgd, memory"
    assert isinstance(step.METHODS[3].objective, PGD)
