"""Adversarial weight perturbation: its formula, its passes, and what it leaves alone."""

import copy

import pytest
import torch
from torch.nn import functional as F

from engine import AdversaryMemory, Attack, Linf
from engine.adversary.held import Points
from engine.objectives import FGSMPGI, GAT, LIET, LLR, MART, PGD, TRADES, GradAlign, LocalBall
from engine.rng import state as rng_state
from engine.training.perturbation import Perturbation

from ..conftest import Tiny, blobs
from ..objectives.test_objectives import CHEAP, CountingForeign, CountingStem
from .steps import Dropped, assert_same, make, train

GAMMA = 0.02


def batch():
    from engine.data.loaders import Batch

    images, labels = blobs(16)
    return Batch(images.float() / 255, labels, torch.arange(16), None)


def perturbed(model, *, first=0, **options):
    return make(model, perturbation=Perturbation(model, GAMMA, first), **options)


def test_the_gradient_is_that_of_the_papers_code():
    """Written out: find the adversary, move a copy's layers, differentiate there."""
    torch.manual_seed(0)
    model = Tiny()
    other, b = copy.deepcopy(model), batch()
    step = perturbed(model, objective=PGD(), attack=Attack(steps=2))
    adversary, _ = step.attack(other, b.x, b.y, step.threat, state=step.state)
    F.cross_entropy(other(adversary), b.y).backward()
    with torch.no_grad():
        for p in other.parameters():
            if p.dim() > 1:
                p += GAMMA * p.norm() / p.grad.norm() * p.grad
            p.grad = None
    F.cross_entropy(other(adversary), b.y).backward()
    _, found = step._perturbed_gradients(b.x, b.y, None)
    torch.testing.assert_close(found, adversary)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_the_weights_come_back_bit_for_bit_and_statistics_learn_once():
    model = Dropped()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    step, b = perturbed(model, objective=TRADES()), batch()
    step._perturbed_gradients(b.x, b.y, None)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
    # TRADES makes two training passes.
    assert model.bn.num_batches_tracked == 2
    assert not torch.equal(model.bn.running_mean, before["bn.running_mean"])


def test_an_overflow_changes_nothing_but_the_count_of_skipped_steps():
    model = Tiny(batch_norm=True)
    step, b = perturbed(model, objective=PGD()), batch()
    step.scale.scale.fill_(float("inf"))
    before = {k: t.clone() for k, t in model.state_dict().items()}
    step(b)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
    assert all(t.isfinite().all() for t in model.state_dict().values())


@pytest.mark.parametrize("network", [CountingStem, CountingForeign])
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("objective", CHEAP, ids=repr)
def test_passes_at_held_points_are_those_declared(objective, steps, network):
    model, b = network(), batch()
    x = torch.nn.functional.interpolate(b.x, size=6)[:, :1]
    points, state = Points(), rng_state(1)
    arguments = (model, x, b.y, Linf(0.1), Attack(steps=steps))
    with points.record():
        first = objective(*arguments, state=state)
    first.loss.backward()
    model.counts.update(forward=0, input_grad=0, weight_grad=0)
    with points.replay():
        second = objective(*arguments, state=state)
    second.loss.backward()
    declared = objective.loss_passes()
    assert {k: v / len(x) for k, v in model.counts.items()} == {
        "forward": declared.forward,
        "input_grad": declared.input_grad,
        "weight_grad": declared.weight_grad,
    }
    # The same points, and the same loss at the same weights.
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.adversary, second.adversary)


@pytest.mark.parametrize(
    "objective", [MART(), GAT(), FGSMPGI(), LIET(), LLR(), GradAlign(), LocalBall()], ids=repr
)
def test_every_objective_trains_with_perturbed_weights(objective):
    torch.manual_seed(0)
    step = perturbed(Tiny(), objective=objective)
    step.perturbation.gamma = 0.001
    train(step, steps=8)
    assert step.means()["loss"] == pytest.approx(step.means()["loss"])
    assert step.means()["skipped"] == 0


def test_it_begins_at_its_first_step_and_runs_with_a_memory_and_free_steps():
    runs = []
    for first in (4, 99):
        torch.manual_seed(0)
        model = Tiny(batch_norm=True)
        memory = AdversaryMemory(64, (1, 6, 6), Linf(0.1), seed=3)
        step = perturbed(
            model,
            first=first,
            memory=memory,
            attack=Attack(steps=0, start="memory"),
            objective=PGD(),
        )
        train(step, memory, steps=4)
        runs.append(step)
    assert_same(*runs)
    for step in runs:
        train(step, step.memory, steps=5)
    assert not torch.equal(*(run.model.fc.weight for run in runs))


def test_the_capture_is_taken_anew_where_perturbation_begins():
    class Replays:
        """Record by running the same work again, as a graph would."""

        recorded = 0

        def context(self):
            import contextlib

            return contextlib.nullcontext()

        def warm_up(self, work):
            work()

        def record(self, work):
            self.recorded += 1
            return work

        def close(self):
            pass

    runs = []
    for recorder in (None, Replays()):
        torch.manual_seed(0)
        step = perturbed(Dropped(), first=6, recorder=recorder)
        train(step, steps=12)
        runs.append(step)
    assert recorder.recorded == 2
    assert_same(*runs)
