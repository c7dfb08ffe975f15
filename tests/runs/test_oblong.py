"""Images that are not square: every part of a run, with both loaders, crop, mirror and memory."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import engine
from engine import cli, models

H, W = 24, 40
SHORT = [
    *("--data.pad", "2", "--data.flip", "true", "--data.cutout", "6", "--attack.start", "memory"),
    *("--data.validation", "16", "--validation.steps", "2", "--optim.batch_size", "16"),
    *("--optim.epochs", "3", "--evaluation.pgd_steps", "2", "--evaluation.pgd_restarts", "1"),
    *("--model.normalise", "true", "--threat.eps", "0.03", "--seed", "1"),
]


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    """Four classes: a bright band of rows, each a quarter of the height."""
    draw, labels = np.random.default_rng(0), np.arange(160) % 4
    images = draw.integers(0, 100, (160, H, W, 3), dtype=np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[6 * label : 6 * label + 6] += 120
    path = tmp_path_factory.mktemp("data") / "stripes.npz"
    train, test = slice(0, 128), slice(128, 160)
    np.savez(
        path,
        x_train=images[train],
        y_train=labels[train],
        x_test=images[test],
        y_test=labels[test],
    )
    return path


@pytest.mark.parametrize("loader", ["resident", "torch"])
def test_a_run_on_oblong_images(loader, stripes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["train", "quickstart", "--data.name", str(stripes), "--data.loader", loader, *SHORT]
    words += ["--evaluation.autoattack", "none", "--run-dir", "run", "--json"]
    assert cli.run(words) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["clean"] > 0.9
    assert (tmp_path / row["report"]).is_file()
    assert cli.run(["export", "run"]) == 0
    assert f"image_size=({H}, {W})" in (tmp_path / "run/export/README.md").read_text()
    assert engine.load("run")(torch.rand(2, 3, H, W)).shape == (2, 4)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_autoattack_on_oblong_images(norm):
    torch.manual_seed(0)
    model = models.build("tiny-cnn", in_channels=3, image_size=(H, W), classes=4)
    x = torch.rand(4, 3, H, W)
    y = model(x).argmax(1)
    threat = engine.ThreatModel(norm, 0.02 if norm == "Linf" else 0.5)
    verdict = engine.autoattack(model, x, y, threat)
    assert verdict.robust.shape == (4,)


@pytest.mark.parametrize("name", models.MODELS)
def test_every_network_takes_oblong_images(name):
    model = models.build(name, in_channels=1, image_size=(H, W), classes=3)
    assert model(torch.rand(2, 1, H, W)).shape == (2, 3)
