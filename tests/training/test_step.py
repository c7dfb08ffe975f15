"""Test the step: eager, recorded and replayed; radii, batch normalisation, dropout, mistakes."""

from __future__ import annotations

import copy
import logging
import types

import pytest
import torch

import engine
from engine import L2, PGD, AdversaryMemory, Attack, EngineError, Linf, LocalBall, Schedule, recipes
from engine.data.loaders import Batch, ResidentLoader
from engine.device.capture import WARM_UP
from engine.evaluation import robust_accuracy
from engine.models.dropout import Dropout
from engine.performance.capture_audit import Tape

from ..conftest import Tiny, blobs
from .steps import STEPS, Dropped, assert_same, make, train


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
