"""Test mixed, erased and recoloured batches, and runs with them."""

from __future__ import annotations

import pytest
import torch

from engine import EngineError, cli, registers, rng
from engine.data.loaders import ResidentLoader, build
from engine.kernels import MixedLabels

from ..conftest import blobs


def constant(count, first=1):
    """Images of one value each, their number from `first` on, and this number as label."""
    labels = torch.arange(first, first + count)
    images = labels.to(torch.uint8)[:, None, None, None].expand(count, 1, 6, 6).contiguous()
    return images, labels


def shares(x, label):
    """Return the share of each image's pixels that have the value of its label."""
    return ((x * 255).round() == label[:, None, None, None]).float().mean((1, 2, 3))


def test_labels_are_mixed_as_the_images_are():
    loader = ResidentLoader(*constant(64), 16, cutmix=True, pad=0)
    seen = torch.zeros(0)
    for batch in (b for epoch in range(4) for b in loader.epoch(epoch)):
        labels = batch.labels
        assert isinstance(labels, MixedLabels)
        torch.testing.assert_close(shares(batch.x, labels.first), labels.share)
        torch.testing.assert_close(shares(batch.x, labels.second), 1 - labels.share)
        assert labels.share.min() >= 0.5
        seen = torch.cat([seen, labels.share])
    assert seen.min() < 0.6
    assert seen.max() == 1


def test_extra_images_are_mixed_with_extra_images():
    extra = constant(50, first=101)
    loader = ResidentLoader(*constant(64), 16, cutmix=True, extra=extra, share=0.7)
    for batch in loader.epoch(0):
        labels = batch.labels
        # Extra images are drawn with replacement.
        apart = labels.first != labels.second
        for part, share in ((labels.first, labels.share), (labels.second, 1 - labels.share)):
            torch.testing.assert_close(shares(batch.x, part)[apart], share[apart])
        for part in (labels.first, labels.second):
            assert (part[:5] < 100).all()
            assert (part[5:] > 100).all()


def test_a_taken_batch_is_the_epochs_batch_and_replays_keep_their_boxes():
    options = {"cutmix": True, "erase": 0.5, "pad": 1, "replays": 2, "seed": 3}
    made, taken = (ResidentLoader(*blobs(64), 16, **options) for _ in range(2))
    state, before = rng.state(3), None
    taken.begin(1)
    state[1] = len(taken)
    for number, batch in enumerate(made.epoch(1)):
        for ours, theirs in zip(taken.take(state), batch, strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs)
        if number % 2:
            assert torch.equal(batch.x, before.x)
            assert torch.equal(batch.share, before.share)
        before = batch
        state[1] += 1


@pytest.mark.parametrize("option", [{"cutmix": True}, {"erase": 0.5}, {"jitter": 0.5}], ids=str)
def test_other_loaders_refuse_the_changes(option):
    with pytest.raises(EngineError, match=rf"data\.{next(iter(option))} with the torch loader"):
        build("torch", *blobs(64), 16, **option)


def test_a_registered_loader_is_not_asked_for_extra_images(monkeypatch):
    """They would be left out in silence: nobody hands them to its maker."""
    asked = {}

    def make(*_, **options):
        asked.update(options)
        return build("resident", *blobs(64), 16)

    monkeypatch.setitem(registers.loaders._makers, "mine", make)
    with pytest.raises(EngineError, match=r"data\.extra with the mine loader"):
        build("mine", *blobs(64), 16, extra=blobs(64), share=0.5)
    assert asked == {}
    # The changes of images are its maker's to make.
    build("mine", *blobs(64), 16, cutmix=True)
    assert asked["cutmix"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data.jitter", "0.4"], "data.jitter needs images of 3 channels; digits has 1"),
        (
            ["--data.erase", "0.5", "--data.loader", "torch"],
            "data.erase with data.loader = torch: take resident",
        ),
        (
            ["--data.cutmix", "true", "--attack.start", "random", "--data.loader", "dali"],
            "data.cutmix with data.loader = dali: take resident",
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    assert cli.run(["train", "quickstart", "--no-eval", *words]) == 2
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
