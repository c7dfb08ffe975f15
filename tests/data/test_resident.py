"""Test the resident loader: order, augmentation, and batches that the step takes itself."""

from __future__ import annotations

import pytest
import torch

import engine
from engine import AdversaryMemory, Attack, EngineError, Linf, LocalBall, Schedule
from engine.data.loaders import ResidentLoader
from engine.performance.capture_audit import Tape
from engine.training.optimiser import Optimiser
from engine.training.step import Step
from engine.training.trainer import Trainer

from ..conftest import Tiny, blobs


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
    """Train with one replay a step, batches included; then with batches from outside."""
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
