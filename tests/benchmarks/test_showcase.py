"""The showcase's table: what was measured beside what the plan says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from engine import recipes
from engine.benchmarks import showcase
from engine.errors import EngineError
from engine.performance import plan

RECIPE = recipes.load("quickstart", {"step.precision": "bf16"})


@pytest.fixture
def kept():
    scores = {"clean_mean": 0.91, "pgd_mean": 0.55, "autoattack_mean": None}
    row = {"method": "ball-2", "passes_per_step": 11, "train_seconds_mean": 90.0, **scores}
    return {
        "about": "Small",
        "environment": {"gpu": "NVIDIA H100 80GB HBM3", "torch": "2.13.0"},
        "recipes": {"ball-2": recipes.dump(RECIPE)},
        "steps": {"ball-2": {"p50_ms": 0.5}},
        "rows": [row],
    }


def test_a_row_has_the_measured_and_the_predicted_step(kept):
    (row,) = showcase.rows(kept)
    assert row["step_ms"] == 0.5
    assert row["images_per_second"] == 2000 * RECIPE.optim.batch_size
    assert row["predicted_ms"] == pytest.approx(plan.plan(RECIPE, "h100").step_ms)
    assert "| ball-2 | 11 | 0.50 |" in showcase.table([row])
    assert showcase.table([row]).endswith("| 1.5 | 91.0 | 55.0 | - |")


@pytest.mark.parametrize(
    ("device", "name"),
    [("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100"), ("Tesla T4", None), (None, None)],
)
def test_a_device_that_the_plan_does_not_know_has_no_prediction(kept, device, name):
    assert showcase.predictable(device) == name
    kept["environment"]["gpu"] = device
    assert (showcase.rows(kept)[0]["predicted_ms"] is None) == (name is None)


def test_the_command_keeps_the_table_beside_the_runs(kept, tmp_path, capsys):
    with pytest.raises(EngineError, match="run engine compare first"):
        showcase.main([str(tmp_path)])
    (tmp_path / "compare.json").write_text(json.dumps(kept))
    assert showcase.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "NVIDIA H100" in out
    assert (tmp_path / "showcase.md").read_text().strip() == out.strip()


def test_a_recipe_is_priced_in_its_own_precision():
    halved = plan.predicted(recipes.load("cifar10", {"step.precision": "bf16"}), "h100")
    whole = plan.predicted(
        replace(recipes.load("cifar10"), step=replace(RECIPE.step, precision="fp32")), "h100"
    )
    assert whole > 2 * halved
