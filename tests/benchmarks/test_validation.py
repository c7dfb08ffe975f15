"""The benchmark of validation attacks: its rows, from a run of a second."""

from __future__ import annotations

import pytest

from engine import recipes
from engine.benchmarks import validation
from engine.runs import train
from engine.runs.folder import Run


def test_a_row_holds_every_attack_on_the_same_images(tmp_path):
    changes = {"optim.epochs": "1", "data.validation": "64", "threads": "1", "threat.eps": "0.1"}
    changes |= {"validation.steps": "20"}
    run = Run.create(recipes.load("quickstart", changes), tmp_path / "study" / "run")
    train.train(run)
    row = validation.attacked(run, examples=64)
    assert (row["run"], row["checkpoint"], row["examples"]) == ("study/run", "best", 64)
    assert row["apgd"] <= row["clean"]
    attacks = ("constant_ce", "constant_margin", "decaying_ce", "decaying_margin")
    assert all(row[attack] <= row["clean"] for attack in attacks)
    # They are the images of training's own validation.
    (logged,) = run.metrics()
    assert row["constant_ce"] == pytest.approx(logged["val_pgd"])
    assert row["clean"] == pytest.approx(logged["val_clean"])
