"""Extra training images: their share of every batch, their files, and runs with them."""

import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from engine import AdversaryMemory, Attack, EngineError, Linf, cli
from engine.data import datasets
from engine.data.loaders import ResidentLoader, Sampling, build, resident
from engine.data.loaders.resident import extras_of
from engine.objectives import PGD

from ..conftest import Tiny, blobs
from ..training.steps import assert_same, make


def loader(memory=None, share=0.7, **options):
    extra = torch.full((50, 1, 6, 6), 255, dtype=torch.uint8), torch.full((50,), 3)
    return ResidentLoader(*blobs(64), 16, extra=extra, share=share, memory=memory, **options)


def test_every_batch_has_exactly_its_share_and_rounds_show_every_image_once():
    made = loader()
    # 0.7 of 16, rounded.
    assert made.sampling.extra == 11 == extras_of(16, 0.7)
    assert len(made) == 64 // 16
    batches = [batch for epoch in range(3) for batch in made.epoch(epoch)]
    for batch in batches:
        assert batch.x.shape == (16, 1, 6, 6)
        assert (batch.x[5:] == 1).all()
        assert (batch.y[5:] == 3).all()
        assert len(batch.samples) == len(batch.crops) == 5
        assert torch.equal(batch.y[:5], made.labels[batch.samples])
    # A round is 12 batches of 5: three epochs.
    seen = torch.cat([batch.samples for batch in batches])
    assert len(seen.unique()) == len(seen) == 60


def test_a_batch_is_a_function_of_seed_and_step():
    ours, theirs = list(loader(pad=1, seed=3).epoch(1)), list(loader(pad=1, seed=3).epoch(1, 2))
    for a, b in zip(ours[2:], theirs, strict=True):
        assert all(torch.equal(s, t) for s, t in zip(a[:4], b[:4], strict=True))
    draws = Sampling(64, (1, 6, 6), 16, extra=11, extra_count=50)
    assert not torch.equal(draws.extras(0), draws.extras(1))
    assert draws.extras(0).max() < 50


def test_without_extra_images_the_order_is_what_it_was():
    order = torch.randperm(70, generator=torch.Generator().manual_seed(2 * 1_000_003 + 5))
    assert torch.equal(Sampling(70, (1, 6, 6), 16, seed=2).order(5), order[:64].view(4, 16))


def test_two_ranks_share_a_batch():
    whole = Sampling(64, (1, 6, 6), 16, extra=6, extra_count=50)
    parts = [Sampling(64, (1, 6, 6), 8, rank=r, world=2, extra=3, extra_count=50) for r in range(2)]
    for draw in (Sampling.order, Sampling.extras):
        both = torch.cat([draw(part, 1) for part in parts], dim=1)
        assert sorted(both.flatten().tolist()) == sorted(draw(whole, 1).flatten().tolist())


def test_batches_from_the_host_are_those_from_the_device(monkeypatch):
    ours = list(loader(pad=1, flip=True, replays=2).epoch(1))
    monkeypatch.setattr(resident, "_fits", lambda images, device: False)
    hosted = loader(pad=1, flip=True, replays=2)
    assert hosted.take is None
    for a, b in zip(ours, hosted.epoch(1), strict=True):
        assert all(torch.equal(s, t) for s, t in zip(a[:4], b[:4], strict=True))


def test_the_memory_holds_the_sets_own_images_alone():
    steps = []
    for own_start in (True, False):
        torch.manual_seed(0)
        memory = AdversaryMemory(64, (1, 6, 6), Linf(0.1), seed=1)
        before = memory.deltas.clone()
        made = loader(memory if own_start else None, pad=1)
        step = make(Tiny(), memory=memory, objective=PGD(), attack=Attack(steps=1, start="memory"))
        for batch in made.epoch(0):
            step(batch)
        changed = (memory.deltas != before).flatten(1).any(1).sum()
        assert changed == 20
        steps.append(step)
    # The loader's start and the memory's own are one.
    assert_same(*steps)


@pytest.mark.parametrize("share", [0.01, 0.99])
def test_a_share_that_leaves_one_side_empty_is_refused(share):
    with pytest.raises(EngineError, match="at least one must be extra"):
        extras_of(16, share)


def test_other_loaders_refuse_extra_images():
    with pytest.raises(EngineError, match=r"data\.loader = resident"):
        build("torch", *blobs(64), 16, extra=blobs(8), share=0.5)


def write(path, count=40, side=8, labels=10, save=np.savez, seed=0):
    draw = np.random.default_rng(seed)
    images = draw.integers(0, 256, (count, side, side, 1), dtype=np.uint8)
    save(path, image=images, label=draw.integers(0, labels, count))
    return images


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_is_read_and_mapped(tmp_path, monkeypatch, save):
    monkeypatch.setenv("ENGINE_DATA", str(tmp_path / "root"))
    images = write(tmp_path / "more.npz", save=save)
    digits = datasets.load("digits", "train")
    for _ in range(2):
        found = datasets.load_extra(str(tmp_path / "more.npz"), digits)
        assert np.array_equal(found.images.numpy(), images.transpose(0, 3, 1, 2))
    assert len(list((tmp_path / "root" / "cache").glob("extra-*.safetensors"))) == 1


def test_a_known_set_gives_its_training_images():
    digits = datasets.load("digits", "train")
    assert torch.equal(datasets.load_extra("digits", digits).images, digits.images)


def _refused(capsys, *words):
    assert cli.run(["train", "quickstart", "--no-eval", *words]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"side": 9}, "extra images of 1x9x9, where digits has 1x8x8"),
        ({"labels": 12}, "is not in 0..9"),
    ],
)
def test_bad_files_give_one_line(tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.setenv("ENGINE_DATA", str(tmp_path / "root"))
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "more.npz", **options)
    assert said in _refused(capsys, "--data.extra", "more.npz")
    assert "no such file" in _refused(capsys, "--data.extra", "none.npz")


@pytest.fixture
def stopped_at_7(monkeypatch):
    """Runs stop at their seventh step, as by SIGTERM, and leave a checkpoint."""
    from engine.runs.train import _Session

    whole = _Session.safe_point

    def safe_point(session):
        if session.trainer.step.done == 7:
            session.watch.stop = signal.SIGTERM
        whole(session)

    with monkeypatch.context() as patch:
        patch.setattr(_Session, "safe_point", safe_point)
        yield patch.undo


COMBINED = ["--data.cutmix", "true", "--data.erase", "0.3", "--attack.start", "random"]
COMBINED += ["--objective.label_smoothing", "0.1"]


@pytest.mark.parametrize("more", [[], COMBINED], ids=["extra, AWP", "extra, AWP, CutMix"])
def test_a_run_resumes_bit_for_bit_and_refuses_changed_images(
    tmp_path, monkeypatch, capsys, stopped_at_7, more
):
    monkeypatch.setenv("ENGINE_DATA", str(tmp_path / "root"))
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "more.npz")
    words = ["train", "quickstart", "--no-eval", "--data.extra", "more.npz", "--optim.epochs", "2"]
    words += ["--weights.perturb", "0.005", "--weights.from_epoch", "2", "--json", *more]
    for name in ("broken", "changed"):
        assert cli.run([*words, "--run-dir", name]) == 143
    stopped_at_7()
    assert cli.run([*words, "--run-dir", "whole"]) == 0
    assert cli.run(["train", "--resume", "broken", "--no-eval"]) == 0
    ours, theirs = (load_file(tmp_path / run / "last.safetensors") for run in ("broken", "whole"))
    assert all(torch.equal(t, ours[name]) for name, t in theirs.items())
    write(tmp_path / "more.npz", seed=1)
    from engine.runs import images

    for cache in (images._load_extra, images.extra_sum):
        cache.cache_clear()
    capsys.readouterr()
    assert cli.run(["train", "--resume", "changed", "--no-eval"]) == 2
    assert "have changed since this run began" in capsys.readouterr().err


def test_a_run_labels_images_for_another(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ENGINE_DATA", str(tmp_path / "root"))
    monkeypatch.chdir(tmp_path)
    words = ["train", "quickstart", "--no-eval", "--optim.epochs", "1"]
    words += ["--data.train_examples", "300", "--data.validation", "200"]
    assert cli.run([*words, "--run-dir", "run"]) == 0
    assert cli.run(["data", "label", "digits", "--run", "run", "--out", "more.npz"]) == 0
    digits = datasets.load("digits", "train")
    with np.load(tmp_path / "more.npz") as made:
        images, labels = made["image"], made["label"]
    assert len(images) == len(digits.images) - 500
    assert labels.shape == (len(images),)
    # None of them was trained or validated on.
    from engine import recipes
    from engine.runs import images as of_run

    parts = of_run.split(recipes.load("run/recipe.toml"))
    seen = torch.cat([parts.train[0], parts.validation[0]]).flatten(1)
    theirs = torch.from_numpy(images).flatten(1)
    every = digits.images.flatten(1)
    together = torch.cat([seen, theirs])
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, every.tolist()))
    assert cli.run([*words, "--data.extra", "more.npz", "--run-dir", "two"]) == 0
    assert cli.run(["data", "label", "digits", "--run", "run"]) == 2
    assert "needs --run RUN and --out FILE" in capsys.readouterr().err
