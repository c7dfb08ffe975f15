"""Time to accuracy: seconds of training until a target, over seeds, and what is said where it is
not reached.
"""

from __future__ import annotations

import json
import math

import pytest
import torch

from engine import cli, recipes
from engine.benchmarks import accuracy, against, tables
from engine.benchmarks.accuracy import Outcome, Setting

FEW = {"data.train_examples": "128", "data.validation": "24", "validation.steps": "2"}
PAIR = ("quickstart", "quickstart-pgd10")


def logged(*accuracies):
    return [
        {"epoch": n, "train_seconds": 1.5 * n, "val_clean": 0.9, "val_pgd": pgd}
        for n, pgd in enumerate(accuracies, start=1)
    ]


def test_the_first_epoch_that_reaches_the_target_counts():
    assert accuracy.outcome(logged(0.2, 0.7, 0.6, 0.8), 0.7) == Outcome(3.0, 2, 0.9, 0.8)
    assert accuracy.outcome(logged(0.2, 0.69), 0.7) == Outcome(math.inf, math.inf, 0.9, 0.69)


def rows_of(*outcomes, target=0.7):
    setting = Setting(PAIR, target, len(outcomes[0]), {})
    chosen = {name: recipes.load(name) for name in PAIR}
    return accuracy._rows(setting, chosen, dict(zip(PAIR, outcomes, strict=True)))


def run_of(seconds, epochs=3, pgd=0.8):
    return Outcome(seconds, epochs, 0.9, pgd)


def test_rows_are_quantiles_over_seeds_and_ratios_of_the_same_seed():
    fast, slow = rows_of(
        [run_of(10.0), run_of(3.0, 2), run_of(5.0, 4, 0.6)],
        [run_of(20.0), run_of(9.0), run_of(12.5)],
    )
    assert (fast["p20_s"], fast["p50_s"], fast["p80_s"]) == (3.0, 5.0, 10.0)
    assert fast["reached"] == fast["seeds"] == 3
    assert fast["epochs_to_target"] == 3.0
    assert fast["share_of_last"] == 0.4  # of 0.5, 0.333, 0.4
    assert slow["share_of_last"] == 1.0
    assert fast["pgd"] == pytest.approx((0.8 + 0.8 + 0.6) / 3)
    assert (fast["passes"], slow["passes"]) == (12, 23)


def test_a_target_that_is_not_reached_is_no_number():
    never = run_of(math.inf, math.inf)
    some, all_ = rows_of([run_of(4.0), never, never], [run_of(9.0)] * 3)
    assert some["reached"] == 1
    assert (some["p20_s"], some["p50_s"], some["p80_s"]) == (4.0, None, None)
    assert some["epochs_to_target"] is some["share_of_last"] is None
    assert all_["share_of_last"] == 1.0
    json.dumps([some, all_], allow_nan=False)
    table = tables.accuracy([some, all_])
    assert "| quickstart | 12 | 70% | 1 of 3 | 4.0 / - / - | - | - |" in table
    assert "| quickstart-pgd10 | 23 | 70% | 3 of 3 | 9.0 / 9.0 / 9.0 | 3 | 100% |" in table


def test_two_versions_are_compared_by_the_median():
    before = rows_of([run_of(4.0)] * 3, [run_of(9.0)] * 3)
    after = rows_of([run_of(8.0)] * 3, [run_of(math.inf, math.inf)] * 3)
    (found,) = against.judge([after], [before])
    assert found["recipe"] == "quickstart"
    assert found["ratio"] == 2.0


def test_runs_are_trained_a_seed_of_each_in_turn(monkeypatch, capsys):
    setting = Setting(PAIR, 0.0, 2, {**FEW, "optim.epochs": "2"})
    monkeypatch.setattr(accuracy, "settings", lambda quick: setting)
    threads = torch.get_num_threads()
    assert cli.run(["bench", "accuracy", "--quick", "--json"]) == 0
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if ", seed " in line]
    assert said == [f"{name}, seed {seed}" for seed in (0, 1) for name in PAIR]
    rows = json.loads(out)
    assert [row["recipe"] for row in rows] == list(PAIR)
    for row in rows:
        assert row["reached"] == 2
        assert row["epochs_to_target"] == 1
        assert 0 < row["p20_s"] <= row["p50_s"] <= row["p80_s"]
        assert 0 <= row["pgd"] <= row["clean"] <= 1
        assert (row["images"], row["epochs"], row["target"]) == (128, 2, 0.0)
    assert torch.get_num_threads() == threads
