"""Test the adversary memory: storage, crops, first visits and the strength that it adds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import engine
from engine import L2, PGD, AdversaryMemory, Attack, Linf, Schedule
from engine.data.loaders import ResidentLoader
from engine.training.optimiser import Optimiser
from engine.training.step import Step
from engine.training.trainer import Trainer

from ..conftest import Tiny, blobs


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
