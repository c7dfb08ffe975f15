"""Trainer, optimiser, memory, loader: what training does, on problems of a second."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import engine
from engine import L2, PGD, AdversaryMemory, Attack, EngineError, Linf, LocalBall, Schedule
from engine.data.loaders import ResidentLoader, TensorLoader
from engine.performance.capture_audit import Tape
from engine.training.optimiser import Optimiser
from engine.training.step import Step
from engine.training.trainer import Trainer

from ..conftest import Foreign, Tiny, blobs

# ---- loader ----------------------------------------------------------------------------------


def test_every_epoch_shows_every_image_once_in_another_order():
    images, labels = blobs(64)
    loader = ResidentLoader(images, labels, 16, seed=3)
    orders = [torch.cat([b.samples for b in loader.epoch(e)]) for e in range(2)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(64))
    assert not torch.equal(*orders)


def test_batches_depend_on_seed_and_epoch_alone():
    images, labels = blobs(64)
    make = lambda: ResidentLoader(images, labels, 16, seed=3, pad=1, flip=True)  # noqa: E731
    first, second = make(), make()
    list(first.epoch(0))
    for a, b in zip(first.epoch(1), second.epoch(1), strict=True):
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.y, b.y)
        assert torch.equal(a.crops, b.crops)


def test_taking_a_batch_from_the_steps_own_state_is_the_epochs_batch():
    """So a captured step makes its batches: position and augmentation from device state alone."""
    images, labels = blobs(64)
    for data, options in ((images, {"pad": 1, "flip": True}), (images.float() / 255, {})):
        made, taken = (ResidentLoader(data, labels, 16, seed=3, **options) for _ in range(2))
        places = [t.data_ptr() for t in taken.tensors()]
        state = engine.rng.state(3)
        for epoch in range(2):
            taken.begin(epoch)
            for batch in made.epoch(epoch):
                for ours, theirs in zip(taken.take(state), batch, strict=True):
                    assert (ours is None and theirs is None) or torch.equal(ours, theirs)
                state[1] += 1
        assert [t.data_ptr() for t in taken.tensors()] == places


def test_a_run_replayed_without_the_host_is_the_eager_run():
    """Several epochs, every step one replay, batches included; then the same handed over from outside."""
    images, labels = blobs(64)
    results = []
    for recorder, own in ((None, True), (Tape(), True), (None, False)):
        torch.manual_seed(0)
        model, memory = Tiny(batch_norm=True), AdversaryMemory(64, (1, 6, 6), Linf(0.1))
        loader = ResidentLoader(images, labels, 16, seed=2, pad=1, flip=True, memory=memory)
        step = Step(
            model,
            objective=LocalBall(),
            threat=Linf(0.1),
            attack=Attack(steps=2, start="memory"),
            optimiser=Optimiser(model, lr=Schedule().rates(0.1, 12), ema=0.9),
            memory=memory,
            take=loader.take if own else None,
            seed=2,
            recorder=recorder,
        )
        rows = Trainer(step, loader, epochs=3).run().rows
        results.append(([row["loss"] for row in rows], step.tensors()))
    (losses, tensors), *others = results
    for other_losses, other in others:
        assert losses == other_losses
        for name, t in tensors.items():
            assert torch.equal(t, other[name]), name


def test_batch_holds_the_pixels_it_names():
    images, labels = blobs(32)
    for b in ResidentLoader(images, labels, 8).epoch(0):
        assert torch.equal(b.x, images[b.samples].float() / 255)
        assert torch.equal(b.y, labels[b.samples])


def test_last_short_batch_is_dropped_and_a_large_one_refused():
    images, labels = blobs(20)
    assert [len(b.y) for b in ResidentLoader(images, labels, 8).epoch(0)] == [8, 8]
    with pytest.raises(EngineError, match="batch"):
        ResidentLoader(images, labels, 21)


# ---- memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5)], ids=str)
def test_memory_gives_back_what_it_was_told(threat):
    images, labels = blobs(32)
    memory = AdversaryMemory(32, (1, 6, 6), threat)
    batch = next(ResidentLoader(images, labels, 16, pad=0, flip=True).epoch(0))
    delta = 0.01 * torch.randn_like(batch.x)
    adversary = (batch.x + delta).clamp(0, 1)
    memory.remember(batch.samples, batch.x, adversary, batch.crops)
    back = memory.recall(batch.samples, batch.x, batch.crops)
    assert (back - adversary).abs().max() <= threat.eps / 127 / 2 + 1e-6
    others = torch.tensor([i for i in range(32) if i not in set(batch.samples.tolist())])
    fresh = AdversaryMemory(32, (1, 6, 6), threat)
    assert torch.equal(memory.deltas[others], fresh.deltas[others])


def test_memory_moves_with_crop_and_mirror():
    """The perturbation stays on the pixel it belongs to, wherever the crop shows that pixel."""
    image = torch.full((1, 1, 6, 6), 128, dtype=torch.uint8)
    loader = ResidentLoader(image, torch.zeros(1, dtype=torch.int64), 1, pad=2, flip=True, seed=1)
    memory = AdversaryMemory(1, (1, 6, 6), Linf(0.1))
    memory.deltas.zero_()
    memory.deltas[0, 0, 3, 1] = 127
    seen = set()
    for epoch in range(40):
        batch = next(loader.epoch(epoch))
        dy, dx, mirrored = batch.crops[0].tolist()
        row, column = 3 - dy, (5 - (1 - dx)) if mirrored else 1 - dx
        start = memory.recall(batch.samples, batch.x, batch.crops)
        moved = (start - batch.x)[0, 0]
        expected = torch.zeros(6, 6)
        if 0 <= row < 6 and 0 <= column < 6:
            expected[row, column] = 0.1
        torch.testing.assert_close(moved, expected, atol=1e-6, rtol=0)
        seen.add((dy, dx, mirrored))
    assert len(seen) > 10


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5)], ids=str)
def test_batches_bring_the_start_from_what_was_last_remembered(threat):
    images, labels = blobs(64)
    memory = AdversaryMemory(64, (1, 6, 6), threat)
    loader = ResidentLoader(images, labels, 16, pad=1, flip=True, memory=memory)
    for epoch in range(2):
        for batch in loader.epoch(epoch):
            wanted = memory.recall(batch.samples, batch.x, batch.crops)
            assert torch.equal(batch.start, wanted)
            # Written between two batches and seen by the next visit: the loader does not run ahead.
            memory.remember(batch.samples, batch.x, batch.x, batch.crops)
    assert next(ResidentLoader(images, labels, 16).epoch(0)).start is None


def test_training_is_the_same_wherever_the_start_is_formed():
    images, labels = blobs(64)

    def losses(in_loader, data):
        torch.manual_seed(0)
        model, memory = Tiny(), AdversaryMemory(64, (1, 6, 6), Linf(0.1))
        step = Step(
            model,
            objective=PGD(),
            threat=Linf(0.1),
            attack=Attack(steps=1, start="memory"),
            optimiser=Optimiser(model, lr=Schedule().rates(0.1, 6)),
            memory=memory,
        )
        loader = ResidentLoader(data, labels, 32, memory=memory if in_loader else None)
        return [row["loss"] for row in Trainer(step, loader, epochs=3).run().rows], memory.deltas

    for data in (images, images.float() / 255):
        (here, written), (there, expected) = losses(True, data), losses(False, data)
        assert here == there
        assert torch.equal(written, expected)


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5)], ids=str)
def test_first_visit_starts_at_random_inside_the_ball(threat):
    memory = AdversaryMemory(64, (1, 6, 6), threat, seed=2)
    x = torch.full((64, 1, 6, 6), 0.5)
    delta = (memory.recall(torch.arange(64), x) - x).flatten(1)
    size = delta.abs().amax(1) if threat.norm == "Linf" else delta.norm(dim=1)
    assert (size <= threat.eps * 1.001).all()
    assert size.mean() > 0.8 * threat.eps
    assert not torch.equal(memory.deltas, AdversaryMemory(64, (1, 6, 6), threat, seed=3).deltas)


def test_memory_makes_weak_adversaries_strong():
    """A frozen network: one step an epoch from memory comes to what many steps find."""
    torch.manual_seed(0)
    model, threat = Tiny(), Linf(0.1)
    with torch.no_grad():
        model.fc.weight.mul_(5)
    images, labels = blobs(64)
    x = images.float() / 255
    one = Attack(steps=1, start="memory")
    memory = AdversaryMemory(64, (1, 6, 6), threat)
    samples, losses = torch.arange(64), []
    for i in range(8):
        start = memory.recall(samples, x)
        found, _ = one(model, x, labels, threat, start=start, state=engine.rng.state(i))
        memory.remember(samples, x, found)
        losses.append(float(F.cross_entropy(model(found), labels).detach()))
    assert losses[-1] > losses[0] * 1.05


# ---- optimiser -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sgd", "adamw", "torch-sgd", "torch-adamw"])
def test_optimiser_is_torchs_optimiser(name):
    torch.manual_seed(0)
    ours, theirs = Foreign(), None
    theirs = copy.deepcopy(ours)
    rates = [0.1 / (step + 1) for step in range(6)]
    optimiser = Optimiser(ours, lr=rates, name=name, momentum=0.9, weight_decay=0.01, ema=0.5)
    average = copy.deepcopy(ours)
    if name.endswith("sgd"):
        plain = torch.optim.SGD(theirs.parameters(), lr=1.0, momentum=0.9, weight_decay=0.01)
    else:
        plain = torch.optim.AdamW(theirs.parameters(), lr=1.0, weight_decay=0.01)
    images, labels = blobs(64)
    x = images.float() / 255
    for step in range(6):
        for group in plain.param_groups:
            group["lr"] = rates[step]
        for net, opt in ((ours, optimiser), (theirs, plain)):
            opt.zero_grad()
            F.cross_entropy(net(x), labels).backward()
            opt.step(torch.tensor([step])) if net is ours else opt.step()
        decay = min(0.5, (1 + step) / (10 + step))
        for e, p in zip(average.parameters(), theirs.parameters(), strict=True):
            e.data.lerp_(p.data, 1 - decay)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)
    for p, q in zip(optimiser.average.parameters(), average.parameters(), strict=True):
        torch.testing.assert_close(p.data, q.data, atol=1e-6, rtol=1e-5)


def test_average_holds_batch_norm_statistics_too():
    model = Tiny(batch_norm=True)
    optimiser = Optimiser(model, lr=[0.1], ema=0.9)
    model(torch.rand(8, 1, 6, 6)).sum().backward()
    optimiser.step(torch.tensor([0]))
    decay = 1 / 10
    expected = (1 - decay) * model.bn.running_mean
    torch.testing.assert_close(optimiser.average.bn.running_mean, expected)
    assert optimiser.average.bn.num_batches_tracked == 1


# ---- training --------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["random", "memory"])
@pytest.mark.parametrize("objective", [PGD(), LocalBall(), LocalBall(global_weight=0.5)], ids=str)
def test_training_makes_a_robust_network(objective, start):
    images, labels = blobs(512)
    threat = Linf(0.15)
    torch.manual_seed(0)
    model = Tiny()
    result = engine.train(
        model,
        (images, labels),
        threat,
        attack=Attack(steps=2, start=start),
        objective=objective,
        epochs=6,
        batch_size=64,
        lr=0.1,
    )
    x, y = blobs(200, seed=9)
    report = engine.evaluate(
        result.model,
        x.float() / 255,
        y,
        threat,
        pgd_steps=10,
        pgd_restarts=1,
        autoattack_version="none",
    )
    assert report.pgd > 0.9
    assert result.steps == 6 * 8
    assert result.train_seconds > 0


def test_clean_training_is_not_robust():
    """The test above can fail: without adversaries the same network and budget are not robust."""
    images, labels = blobs(512)
    torch.manual_seed(0)
    model = Tiny()
    result = engine.train(
        model, (images, labels), Linf(0.0), objective=PGD(), epochs=6, batch_size=64, lr=0.1
    )
    x, y = blobs(200, seed=9)
    report = engine.evaluate(
        result.model,
        x.float() / 255,
        y,
        Linf(0.3),
        pgd_steps=10,
        pgd_restarts=1,
        autoattack_version="none",
    )
    assert report.clean > 0.95
    assert report.pgd < 0.9


def test_same_seed_same_weights_and_another_seed_others():
    images, labels = blobs(128)

    def weights(seed):
        torch.manual_seed(0)
        model = Tiny()
        engine.train(
            model,
            (images, labels),
            Linf(0.1),
            epochs=2,
            batch_size=32,
            seed=seed,
            flip=True,
            pad=1,
            attack=Attack(steps=1, start="memory"),
        )
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_best_epoch_is_chosen_on_validation_and_both_are_kept():
    images, labels = blobs(256)
    torch.manual_seed(0)
    model = Tiny()
    x, y = blobs(64, seed=5)
    saved = []
    hooks = engine.Hooks(checkpoint=lambda name, net, row: saved.append((name, row["epoch"])))
    result = engine.train(
        model,
        (images, labels),
        Linf(0.2),
        epochs=4,
        batch_size=64,
        lr=0.2,
        validation=(x.float() / 255, y),
        hooks=hooks,
    )
    scores = [row["val_pgd"] for row in result.rows]
    assert result.best_epoch == max(i + 1 for i, s in enumerate(scores) if s == max(scores))
    assert [e for name, e in saved if name == "last"] == [1, 2, 3, 4]
    assert [e for name, e in saved if name == "best"][-1] == result.best_epoch
    assert [row["epoch"] for row in result.rows] == [1, 2, 3, 4]


def test_a_dataloader_and_a_foreign_module():
    images, labels = blobs(256)
    data = DataLoader(TensorDataset(images.float() / 255, labels), batch_size=64, shuffle=True)
    torch.manual_seed(0)
    result = engine.train(Foreign(), data, Linf(0.1), epochs=5, lr=0.1)
    assert result.rows[-1]["adv_accuracy"] > 0.8


def test_memory_without_indices_is_refused():
    data = DataLoader(TensorDataset(*blobs(64)), batch_size=32)
    with pytest.raises(EngineError, match="memory"):
        engine.train(Foreign(), data, Linf(0.1), attack=Attack(start="memory"))


def test_a_loss_that_is_not_finite_stops_the_run():
    images, labels = blobs(64)
    with pytest.raises(EngineError, match="not finite"):
        engine.train(Foreign(), (images, labels), Linf(0.1), lr=1e30, epochs=3, batch_size=32)


def test_an_empty_loader_is_refused():
    model = Foreign()
    step = Step(
        model,
        objective=PGD(),
        threat=Linf(0.1),
        attack=Attack(),
        optimiser=Optimiser(model, lr=[0.1]),
    )
    with pytest.raises(EngineError, match="no batch"):
        Trainer(step, TensorLoader([]), epochs=1)
