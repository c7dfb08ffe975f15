"""Loaders: the same batches from each, every sample once, the same again from any position."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from engine import Attack, EngineError, Linf, LocalBall, cli
from engine.adversary.memory import AdversaryMemory
from engine.data import loaders
from engine.data.loaders import Sampling, dali
from engine.training.optimiser import Optimiser
from engine.training.step import Step
from engine.training.trainer import Trainer

from ..conftest import Tiny, blobs

needs_dali = pytest.mark.skipif(dali.unavailable() is not None, reason=str(dali.unavailable()))
NAMES = [
    pytest.param("resident", id="resident"),
    pytest.param("dali", id="dali", marks=needs_dali),
    pytest.param("torch", id="torch"),
]
OPTIONS = {"seed": 3, "pad": 2, "flip": True, "cutout": 3}


def data(n=50, shape=(3, 8, 6)):
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, *shape), dtype=torch.uint8, generator=draw)
    return images, torch.randint(0, 5, (n,), generator=draw)


def make(name, images, labels, batch_size=8, workers=0, **options):
    return loaders.build(name, images, labels, batch_size, workers=workers, **options)


def copied(batch):
    return [None if t is None else t.clone() for t in batch[:4]]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"pad": 2}, {"flip": True}, OPTIONS], ids=str)
@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 8, 6)], ids=str)
def test_every_loader_gives_the_resident_loaders_batches(name, options, shape):
    images, labels = data(shape=shape)
    ours = make(name, images, labels, **options)
    theirs = make("resident", images, labels, **options)
    for epoch in (0, 1, 5):
        count = 0
        for a, b in zip(ours.epoch(epoch), theirs.epoch(epoch), strict=True):
            # Within one grey level: DALI multiplies by 1/255 where the op divides by 255.
            torch.testing.assert_close(a.x, b.x, atol=1e-6, rtol=0)
            assert a.x.dtype == torch.float32
            assert torch.equal(a.y, b.y)
            assert torch.equal(a.samples, b.samples)
            assert torch.equal(a.crops, b.crops)
            assert a.crops.dtype == torch.int32
            count += 1
        assert count == len(ours) == 6
    ours.close()


@pytest.mark.parametrize("name", NAMES)
def test_the_memory_finds_the_pixels_that_the_batch_names(name):
    """A memory that holds the images, recalled at the batch's `crops`, gives the batch."""
    images, labels = data()
    memory = AdversaryMemory(len(images), images.shape[1:], Linf(1.0))
    for batch in make(name, images, labels, seed=1, pad=2, flip=True).epoch(0):
        memory.remember(batch.samples, torch.zeros_like(batch.x), batch.x, batch.crops)
        back = memory.recall(batch.samples, torch.zeros_like(batch.x), batch.crops)
        torch.testing.assert_close(back, batch.x, atol=0.5 / 127, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_an_epoch_has_every_sample_once(name):
    images, labels = data(48)
    loader = make(name, images, labels)
    seen = [torch.cat([b.samples.clone() for b in loader.epoch(e)]) for e in (0, 1)]
    for order in seen:
        assert sorted(order.tolist()) == list(range(48))
    assert not torch.equal(*seen)


@pytest.mark.parametrize("name", NAMES)
def test_going_on_in_the_middle_gives_the_same_batches(name):
    images, labels = data()
    whole = [copied(b) for e in (0, 1, 2) for b in make(name, images, labels, **OPTIONS).epoch(e)]
    again = make(name, images, labels, **OPTIONS)
    resumed = [copied(b) for b in again.epoch(1, first=4)] + [copied(b) for b in again.epoch(2)]
    for a, b in zip(whole[6 + 4 :], resumed, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    # Left in the middle, as an interrupt leaves it, and asked for another epoch.
    stream = again.epoch(0)
    next(stream)
    stream.close()
    for a, b in zip(whole[:6], again.epoch(0), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, copied(b), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_replays_repeat_a_batch_and_its_crops(name):
    images, labels = data()
    loader = make(name, images, labels, replays=3, **OPTIONS)
    assert len(loader) == 18
    batches = [copied(b) for b in loader.epoch(1)]
    for i, batch in enumerate(batches):
        first = batches[i - i % 3]
        assert all(torch.equal(a, b) for a, b in zip(batch, first, strict=True))
    assert not torch.equal(batches[0][0], batches[3][0])


@pytest.mark.parametrize("name", [p for p in NAMES if p.id != "resident"])
def test_ranks_share_the_batches_of_one_process(name):
    images, labels = data()
    alone = make(name, images, labels, 8, **OPTIONS)
    shares = [make(name, images, labels, 4, rank=r, world=2, **OPTIONS) for r in (0, 1)]
    for whole, *parts in zip(alone.epoch(1), *(s.epoch(1) for s in shares), strict=True):
        for i in range(4):
            assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))


@pytest.mark.parametrize("name", NAMES)
def test_images_of_another_kind_are_refused(name):
    images, labels = data()
    for bad, why in (
        ((images.double(), labels), "uint8"),
        ((images, labels[:3]), "3 labels"),
        ((images[:4], labels[:4]), "batch of 8"),
        ((images.flatten(1), labels), "uint8"),
    ):
        with pytest.raises(EngineError, match=why):
            make(name, *bad, pad=1)


def test_worker_processes_give_the_same_batches():
    images, labels = data()
    loader = make("torch", images, labels, workers=2, **OPTIONS)
    for epoch in (0, 1):
        for a, b in zip(
            loader.epoch(epoch),
            make("resident", images, labels, **OPTIONS).epoch(epoch),
            strict=True,
        ):
            torch.testing.assert_close(a.x, b.x)
            assert torch.equal(a.samples, b.samples)
    loader.close()
    gc.collect()
    assert not torch.multiprocessing.active_children()


@needs_dali
def test_dali_threads_end_with_the_loader():
    import os

    def threads():
        return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0

    images, labels = data()
    next(make("dali", images, labels, workers=2).epoch(0))  # what it starts once and keeps
    gc.collect()
    before = threads()
    for _ in range(5):
        loader = make("dali", images, labels, workers=2)
        list(loader.epoch(0))
        loader.close()
    gc.collect()
    assert threads() <= before + 1
    assert threading.active_count() < 20


def test_null_loader_repeats_its_batch():
    images, labels = data()
    loader = make("null", images, labels, **OPTIONS)
    batches = [b for e in (0, 1) for b in loader.epoch(e)]
    assert len(batches) == 12
    assert all(b.x is batches[0].x for b in batches)


def test_auto_is_resident_on_the_cpu():
    images, labels = data()
    assert loaders.choose(images, "cpu") == "resident"
    assert isinstance(make("auto", images, labels), loaders.ResidentLoader)


def test_without_dali_it_is_named(monkeypatch, capsys):
    import builtins

    real = builtins.__import__

    def missing(name, *rest, **more):
        if name.startswith("nvidia.dali"):
            raise ImportError("No module named 'nvidia.dali'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    assert cli.run(["train", "quickstart", "--data.loader", "dali"]) == 2
    said = capsys.readouterr().err
    assert "nvidia-dali-cuda130" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("name", [*NAMES, pytest.param("null", id="null")])
def test_training_learns_through_every_loader(name):
    """One training loop, whoever feeds it; the same losses wherever the batches are the same."""
    images, labels = blobs(256)

    def losses(name):
        torch.manual_seed(0)
        model = Tiny()
        memory = AdversaryMemory(256, images.shape[1:], Linf(0.1))
        loader = make(name, images, labels, 32, memory=memory)
        step = Step(
            model,
            objective=LocalBall(direction="ce", local_weight=1.0),
            threat=Linf(0.1),
            attack=Attack(steps=1, start="memory"),
            optimiser=Optimiser(model, lr=[1e-2] * 3 * len(loader), name="adamw"),
            memory=memory,
        )
        rows = Trainer(step, loader, epochs=3).run().rows
        loader.close()
        return [row["loss"] for row in rows]

    found = losses(name)
    assert found[-1] < 0.7 * found[0]
    if name != "null":
        assert found == pytest.approx(losses("resident"), rel=1e-4)


def test_sampling_is_a_function_of_seed_and_step():
    one = Sampling(100, (1, 9, 9), 10, seed=4, pad=3, flip=True)
    two = Sampling(100, (1, 9, 9), 10, seed=4, pad=3, flip=True)
    other = Sampling(100, (1, 9, 9), 10, seed=5, pad=3, flip=True)
    assert torch.equal(one.crops(7), two.crops(7))
    assert torch.equal(one.order(2), two.order(2))
    assert not torch.equal(one.crops(7), one.crops(8))
    assert not torch.equal(one.crops(7), other.crops(7))
    assert not torch.equal(one.order(2), other.order(2))
    drawn = torch.cat([one.crops(step) for step in range(200)])
    assert drawn[:, :2].min() == -3
    assert drawn[:, :2].max() == 3
    assert set(drawn[:, 2].tolist()) == {0, 1}
    assert set(drawn[:, 3].tolist()) == set(range(9))


def test_the_resident_loader_leaves_the_images_where_they_are():
    images = torch.empty((8, 1, 6, 6), dtype=torch.uint8, device="meta")
    loader = loaders.ResidentLoader(images, torch.zeros(8, dtype=torch.int64), 4)
    assert {t.device.type for t in loader.tensors()} == {"meta"}
    assert loader.take(torch.zeros(2, dtype=torch.int64, device="meta")).x.is_meta


class OnHost:
    """Tells how it is brought to a device."""

    def __init__(self, told, device="cpu"):
        self.told, self.device = told, torch.device(device)

    def pin_memory(self):
        self.told.append("pinned")
        return self

    def to(self, device, non_blocking=False):
        self.told.append((str(device), non_blocking))
        return self


@pytest.mark.parametrize(
    ("here", "there", "wanted"),
    [
        ("cpu", "cuda", ["pinned", ("cuda", True)]),
        ("cuda", "cuda", [("cuda", True)]),
        ("cpu", "cpu", [("cpu", True)]),
    ],
)
def test_the_host_waits_for_no_copy(here, there, wanted):
    told = []
    loader = loaders.TensorLoader([(OnHost(told, here), OnHost(told, here))], there)
    next(loader.epoch(0))
    assert told == 2 * wanted
