"""The benchmark of validation attacks: its rows, from a run of a second."""

from __future__ import annotations

import pytest

from engine import recipes
from engine.benchmarks import validation
from engine.runs import train
from engine.runs.folder import Run


def test_a_row_holds_every_attack_on_the_same_images(tmp_path):
    changes = {"optim.epochs": "1", "data.validation": "64", "threads": "1", "threat.eps": "0.1"}
    run = Run.create(recipes.load("quickstart", changes), tmp_path / "run")
    train.train(run)
    row = validation.attacked(run, examples=64)
    assert (row["run"], row["checkpoint"], row["examples"]) == ("run", "best", 64)
    assert row["apgd"] <= row["clean"]
    for loss in ("ce", "margin"):
        # The step is eps / 4 at either length: the longer walk goes on from where the shorter ended.
        assert row[f"{loss}_50"] <= row[f"{loss}_10"] <= row["clean"]
    # They are the images of training's own validation.
    (logged,) = run.metrics()
    assert row["ce_10"] == pytest.approx(logged["val_pgd"])
    assert row["clean"] == pytest.approx(logged["val_clean"])
