"""The end-to-end benchmark: whole trainings in turn, each what `engine train` makes of it."""

from __future__ import annotations

import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine import cli, recipes
from engine.benchmarks import end_to_end, tables
from engine.performance import plan, timing
from engine.progress import TrainingBar, bar
from engine.runs import build, evaluate, images, train
from engine.runs.folder import Run

FEW = {"data.train_examples": "320", "data.validation": "24", "validation.steps": "2"}
TINY = end_to_end.Setting(end_to_end._DIGITS, "quickstart-pgd10", 2, FEW)


@pytest.fixture(scope="module")
def rows():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(end_to_end, "settings", lambda quick: TINY)
        patch.setattr(timing, "peak_gflops", lambda *_: 50.0)
        return {row["training"]: row for row in end_to_end.run(quick=True)}


def test_rows_say_what_was_trained(rows):
    assert list(rows) == [*end_to_end._DIGITS, end_to_end.PLAIN]
    assert [row["passes"] for row in rows.values()] == [12, 5, 23, 23]
    for row in rows.values():
        assert row["data"] == "digits"
        assert row["images"] == 320
        assert row["epochs"] == 2
        assert row["threads"] == 1
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]


def test_rates_are_of_whole_epochs(rows):
    for row in rows.values():
        seconds = row["p50_ms"] / 1e3
        assert row["images_per_s"] == pytest.approx(320 / seconds, rel=0.01)
        assert row["passes_per_s"] == pytest.approx(320 * row["passes"] / seconds, rel=0.01)
        # Five batches of 64.
        assert row["gflop_per_s"] == pytest.approx(5 * row["gflop_per_step"] / seconds, rel=0.02)
        assert row["share_of_peak"] == pytest.approx(row["gflop_per_s"] / 50, rel=0.02, abs=2e-4)
    ours = [row for name, row in rows.items() if name != end_to_end.PLAIN]
    # Validation, weights and checkpoints take some of it; the plain loop has none.
    assert all(0.1 < row["share_in_steps"] < 1.0 for row in ours)
    assert rows[end_to_end.PLAIN]["share_in_steps"] > 0.9
    assert rows[end_to_end.PLAIN]["speedup_vs_plain"] == 1.0


def test_the_plain_loop_does_the_arithmetic_that_it_is_known_for(rows):
    """Eleven passes forward, eleven back to every weight, ten back to the image."""
    recipe = recipes.load("quickstart-pgd10")
    parts = images.split(recipe)
    model = build.build_model(recipe, None, 10, parts.train[0].shape[1:])
    x = torch.rand(64, *parts.train[0].shape[1:])
    forward = plan.count(lambda: model(x)).total()
    stem = plan.count(lambda: model.conv1(x)).total()
    plain = rows[end_to_end.PLAIN]["gflop_per_step"]
    assert plain == pytest.approx((33 * forward - stem) / 1e9, abs=1e-4)
    ours = rows["quickstart-pgd10"]["gflop_per_step"]
    assert ours == pytest.approx((23 * forward - stem) / 1e9, abs=1e-4)


def test_turns_train_what_engine_train_trains(tmp_path):
    """Bit for bit, with everything else that an epoch of a run has."""
    changes = {**FEW, "optim.epochs": "3", "attack.start": "memory", "optim.ema": "0.9"}
    recipe = recipes.load("quickstart", changes)
    whole = Run.create(recipe, tmp_path / "whole")
    train.train(whole)
    with bar() as progress:
        training = end_to_end.Training(recipe, tmp_path / "turns", TrainingBar(progress, "", 3))
        for _ in range(3):
            training.epoch()
        training.close()
    turns = Run.open(tmp_path / "turns")
    assert training.seconds == turns.metrics()[-1]["train_seconds"]
    clock = {"train_seconds", "images_per_second"}
    one, other = (
        [{k: v for k, v in row.items() if k not in clock} for row in run.metrics()]
        for run in (whole, turns)
    )
    assert one == other
    assert len(one) == 3
    assert all("val_pgd" in row for row in one)
    for name in ("best", "last"):
        nets = [evaluate.load_model(run, name).state_dict() for run in (whole, turns)]
        assert all(torch.equal(a, nets[1][key]) for key, a in nets[0].items())
    assert len(list((turns.path / "checkpoints").glob("*.json"))) == recipe.checkpoint.keep


def test_quick_takes_what_is_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGINE_DATA", str(tmp_path))
    assert end_to_end.settings(quick=True).plain == "quickstart-pgd10"
    assert end_to_end.settings(quick=False).plain == "fashion-mnist-pgd10"


def test_the_peak_is_the_best_of_several(monkeypatch):
    taken = iter([1.0, 0.5, 1.0, 4.0, 4.0, 4.0])
    monkeypatch.setattr(timing, "timed", lambda call: next(taken))
    assert timing.peak_gflops() == pytest.approx(2e-9 * 1024**3 / 0.5)


def test_a_peak_holds_no_casts_and_few_launches(monkeypatch):
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            ops.append(str(func))
            return func(*args, **kwargs or {})

    ops = []

    def timed(call):
        with Seen():
            call()
        return 0.5

    monkeypatch.setattr(timing, "timed", timed)
    assert timing.peak_gflops(precision="bf16") == pytest.approx(2e-9 * 1536**3 / 0.5)
    assert set(ops) == {"aten.mm.default"}
    told = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: told.append("wait"))
    call, times = timing.several(lambda: told.append("launch"), "cuda")
    call()
    assert told == ["launch"] * times + ["wait"]
    assert times >= 10


def test_command_line_and_table(monkeypatch, capsys):
    one = {"quickstart": ("quickstart", {})}
    monkeypatch.setattr(
        end_to_end, "settings", lambda quick: end_to_end.Setting(one, "quickstart-pgd10", 1, FEW)
    )
    monkeypatch.setattr(timing, "peak_gflops", lambda *_: 50.0)
    threads = torch.get_num_threads()
    assert cli.run(["bench", "end-to-end", "--quick", "--json"]) == 0
    out, err = capsys.readouterr()
    rows = json.loads(out)
    assert "digits: 320 images, 1 epochs of each in turn" in err
    assert torch.get_num_threads() == threads
    table = tables.end_to_end(rows)
    assert "| quickstart | 12 |" in table
    assert f"| {end_to_end.PLAIN} | 23 |" in table
