"""Test the adversary memory on the host: it equals the one on the device, and it goes back."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from engine import L2, PGD, AdversaryMemory, Attack, EngineError, Linf, Schedule, recipes
from engine.adversary.host_memory import HostMemory, ahead
from engine.data import loaders
from engine.training.optimiser import Optimiser
from engine.training.step import Step
from engine.training.trainer import Trainer

from ..conftest import Tiny, blobs

SHAPE = (1, 6, 6)


def stepping(memory, threat, rates):
    torch.manual_seed(0)
    model = Tiny(batch_norm=True)
    return Step(
        model,
        objective=PGD(),
        threat=threat,
        attack=Attack(steps=1, start="memory"),
        optimiser=Optimiser(model, lr=rates),
        memory=memory,
    )


def trained(memory, threat, *, loader="torch", replays=1):
    """Train three epochs and return the trainer's step."""
    images, labels = blobs(64)
    feed = loaders.build(loader, images, labels, 16, seed=2, pad=1, flip=True, replays=replays)
    step = stepping(memory, threat, Schedule().rates(0.1, 3 * len(feed)))
    Trainer(step, feed, epochs=3).run()
    feed.close()
    return step


@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.5)], ids=str)
@pytest.mark.parametrize(("loader", "replays"), [("resident", 1), ("resident", 2), ("torch", 1)])
def test_a_run_is_that_of_a_memory_on_the_device(tmp_path, threat, loader, replays):
    device = AdversaryMemory(64, SHAPE, threat, seed=1)
    host = HostMemory(64, SHAPE, threat, batch=16, folder=tmp_path / "memory", seed=1)
    host.begin()
    assert torch.equal(host.whole, device.deltas)
    options = {"loader": loader, "replays": replays}
    a, b = (trained(memory, threat, **options) for memory in (device, host))
    assert torch.equal(host.whole, device.deltas)
    for one, other in zip(a.model.parameters(), b.model.parameters(), strict=True):
        assert torch.equal(one, other)


def moved(memory: HostMemory, rows: list[list[int]], value: int) -> None:
    """Do a step on each of `rows` that sets its perturbations to `value`."""
    for samples in ahead(_Batches(rows), memory.prefetch):
        memory.fetch(samples.samples)
        memory.deltas.fill_(value)
        memory.store()


class _Batches:
    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows

    def __iter__(self):
        for row in self.rows:
            yield loaders.Batch(torch.empty(0), torch.empty(0), torch.tensor(row))


@pytest.fixture
def memory(tmp_path):
    made = HostMemory(8, SHAPE, Linf(0.1), batch=2, folder=tmp_path / "memory")
    made.begin()
    yield made
    made.close()


def again(memory: HostMemory) -> HostMemory:
    """Return a memory of another process on the same files."""
    return HostMemory(8, SHAPE, Linf(0.1), batch=2, folder=memory.folder)


def test_it_returns_to_any_checkpoint_that_is_kept(memory):
    moved(memory, [[0, 1], [2, 3]], 1)
    memory.mark(2)
    at_two = memory.whole.clone()
    moved(memory, [[0, 4], [0, 5], [0, 4]], 2)
    memory.mark(5)
    at_five = memory.whole.clone()
    moved(memory, [[6, 7], [0, 1]], 3)
    assert memory.whole[0].unique().tolist() == [3]
    # The process is killed here; nothing was closed.
    other = again(memory)
    other.restore(5)
    assert torch.equal(other.whole, at_five)
    moved(other, [[1, 2]], 4)
    assert other.whole[1].unique().tolist() == [4]
    third = again(memory)
    third.restore(2)
    assert torch.equal(third.whole, at_two)
    with pytest.raises(EngineError, match="checkpoint of step 5 is missing"):
        third.restore(5)
    third.mark(4)
    third.drop_before(4)
    with pytest.raises(EngineError, match="checkpoint of step 2 is missing"):
        third.restore(2)


def test_a_journal_that_a_kill_cut_short(memory):
    memory.mark(0)
    before = memory.whole.clone()
    moved(memory, [[0, 1], [2, 3]], 1)
    after_one = memory.whole.clone()
    (journal,) = memory.folder.glob("*.journal")
    # The record was under way, so the rows had not been written.
    journal.write_bytes(journal.read_bytes()[:-5])
    memory.whole[2:4] = before[2:4]
    other = again(memory)
    other.restore(0)
    assert torch.equal(other.whole, before)
    assert not torch.equal(after_one, before)


def test_forgetting_can_be_undone(memory):
    memory.mark(3)
    before = memory.whole.clone()
    memory.forget(7)
    assert not torch.equal(memory.whole, before)
    other = again(memory)
    other.restore(3)
    assert torch.equal(other.whole, before)


def test_a_sample_of_two_batches_in_a_row_has_its_last_row(memory):
    moved(memory, [[0, 1]], 1)
    seen = []
    for batch in ahead(_Batches([[0, 1], [1, 2], [2, 3]]), memory.prefetch):
        memory.fetch(batch.samples)
        seen.append(copy.deepcopy(memory.deltas[:, 0, 0, 0]))
        memory.deltas.add_(1)
        memory.store()
    assert seen[0].tolist() == [1, 1]
    assert seen[1][0] == 2
    assert seen[2][0] == seen[1][1] + 1


def test_of_a_sample_twice_in_a_batch_the_last_row_stays(memory):
    memory.mark(0)
    before = memory.whole.clone()
    memory.fetch(torch.tensor([5, 5]))
    assert torch.equal(memory.deltas[0], memory.deltas[1])
    memory.deltas[0], memory.deltas[1] = 1, 2
    memory.store()
    assert (memory.whole[5] == 2).all()
    assert torch.equal(memory.whole[:5], before[:5])
    other = again(memory)
    other.restore(0)
    assert torch.equal(other.whole, before)


@pytest.mark.parametrize("resident_extra", [True, False])
def test_it_holds_extra_images_too(tmp_path, monkeypatch, resident_extra):
    if not resident_extra:
        monkeypatch.setattr(loaders.resident, "_fits", lambda images, device: False)
    images = torch.randint(256, (84, *SHAPE), dtype=torch.uint8)
    labels = torch.zeros(84, dtype=torch.int64)
    own, extra = (images[:64], labels[:64]), (images[64:], labels[64:])
    options = {"seed": 2, "pad": 1, "flip": True, "extra": extra, "share": 0.5, "numbered": True}
    feed = loaders.build("resident", *own, 16, **options)
    threat = Linf(0.1)
    memory = HostMemory(84, SHAPE, threat, batch=16, folder=tmp_path / "memory", seed=1)
    memory.begin()
    step = stepping(memory, threat, [0.1] * len(feed))
    step.train()
    seen: set[int] = set()
    for batch in feed.epoch(0):
        assert len(batch.samples) == len(batch.crops) == 16
        assert (batch.samples[:8] < 64).all()
        assert (batch.samples[8:] >= 64).all()
        # Positions and crops are those of the images.
        rows = zip(batch.x, batch.samples, batch.crops.tolist(), strict=True)
        for x, sample, (dy, dx, mirrored) in rows:
            cut = F.pad(images[sample], (1, 1, 1, 1))[:, 1 + dy : 7 + dy, 1 + dx : 7 + dx]
            assert torch.equal((x * 255).round(), (cut.flip(2) if mirrored else cut).float())
        before = memory.whole.clone()
        step(batch)
        changed = (memory.whole != before).flatten(1).any(1).nonzero().flatten().tolist()
        assert set(changed) == set(batch.samples.tolist())
        seen |= set(changed)
    assert len([sample for sample in seen if sample >= 64]) > 10


def test_files_that_do_not_fit_give_one_line(memory, tmp_path, monkeypatch):
    memory.mark(0)
    larger = HostMemory(9, SHAPE, Linf(0.1), batch=2, folder=memory.folder)
    with pytest.raises(EngineError, match="it is of another run"):
        larger.restore(0)
    huge = HostMemory(1 << 40, SHAPE, Linf(0.1), batch=2, folder=tmp_path / "huge")
    with pytest.raises(EngineError, match=r"attack.memory = host: .* GB: "):
        huge.begin()


def test_what_the_recipe_refuses():
    with pytest.raises(EngineError, match=r"attack\.memory = host has no effect"):
        recipes.load("quickstart", {"attack.memory": "host", "attack.start": "random"})
