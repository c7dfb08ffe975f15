"""The step benchmark: rivals that do the same thing, rows that say what was measured."""

import contextlib
import json

import pytest
import torch

from engine import PGD, cli
from engine.benchmarks import measure, rivals, step, tables
from engine.objectives import Passes

TINY = step.Setting(
    "tiny-cnn", (8, 1, 8, 8), [step.METHODS[1], step.PGD10, step.TRADES10], False, True, 0.2
)


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
    """Else they would be timed with our stem's gradients, and a claim against them would be against ourselves."""
    setting = step.Setting("fast-at-mnist", (4, 1, 28, 28), [], False, False, 0.0)
    called = []
    for ours in (True, False):
        net = step.network(setting, ours=ours)
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
    notes: list[str] = []
    setting = step.Setting("tiny-cnn", (8, 1, 8, 8), [], True, False, 0.1)
    assert [name for name, _ in step._rivals(setting, notes)] == ["torch.compile of it"]
    assert (
        notes[0] == "torchattacks is not there (No module named 'torchattacks'): see `make rivals`"
    )


def test_packages_train_where_they_are_installed():
    x, y = torch.rand(8, 1, 8, 8), torch.randint(0, 10, (8,))
    setting = step.Setting("tiny-cnn", (8, 1, 8, 8), [], True, False, 0.1)
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
    slow = measure.Timing(0, 0, 0, (2.0, 20.0, 2.2))
    fast = measure.Timing(0, 0, 0, (1.0, 10.0, 1.0))
    assert slow.over(fast) == 2.0


def test_command_line(monkeypatch, capsys):
    small = step.Setting("tiny-cnn", (8, 1, 8, 8), [step.METHODS[3]], False, False, 0.1)
    monkeypatch.setattr(step, "settings", lambda quick: [small])
    assert cli.run(["bench", "step", "--quick", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["objective"] == "pgd, memory"
    assert isinstance(step.METHODS[3].objective, PGD)
