"""Test that an evaluation's batches are dealt out, kept across a stop, and answered once."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

import engine
from engine import EngineError, cli
from engine.evaluation.autoattack import ensemble
from engine.evaluation.work import Work
from engine.runs import evaluate
from engine.runs.folder import Run

QUICK = ["--evaluation.examples", "16", "--evaluation.autoattack", "apgd"]
QUICK += ["--evaluation.pgd_steps", "3", "--evaluation.pgd_restarts", "2"]
QUICK += ["--evaluation.batch_size", "7"]
WEIGHTS = ("best.safetensors", "best.safetensors.sha256")
JUDGES = ("engine", "pyautoattack")


@pytest.fixture(scope="module", autouse=True)
def short():
    """Few steps of the engine's attacks in this process; another process makes all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ensemble, "STEPS", 10)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("work") / "run"
    words = ["train", "quickstart", "--optim.epochs", "2", "--run-dir", str(path), "--json"]
    assert cli.run([*words, "--log.to", "none", "--no-eval", *QUICK]) == 0
    return Run.open(path)


def judged(run, **changes):
    """The run with other fields of `evaluation`."""
    options = dataclasses.replace(run.recipe.evaluation, **changes)
    return Run(run.path, dataclasses.replace(run.recipe, evaluation=options))


@pytest.fixture(scope="module")
def whole(run):
    """The fields of an evaluation that nothing stops, by judge."""
    return {judge: evaluated(judged(run, judge=judge)) for judge in JUDGES}


def evaluated(run):
    evaluate.evaluate_run(run)
    return without_time(run)


def without_time(run):
    return {k: v for k, v in run.read_json("evaluation.json").items() if k != "eval_seconds"}


def stopped(run, after):
    """Evaluate until so many batches have been attacked; return their keys."""
    with pytest.MonkeyPatch.context() as patch:
        calls = Calls(patch, after)
        with pytest.raises(KeyboardInterrupt):
            evaluate.evaluate_run(run)
    assert len(calls.keys) == after
    return calls.keys


class Calls:
    """Count the batches that are attacked; stop at one of them."""

    def __init__(self, monkeypatch, stop=None):
        self.keys = []
        plain = Work.fallen

        def fallen(work, attack, batches, judge):
            def counted(number, rows):
                if len(self.keys) == stop:
                    raise KeyboardInterrupt
                self.keys.append((attack, number))
                return judge(number, rows)

            return plain(work, attack, batches, counted)

        monkeypatch.setattr(Work, "fallen", fallen)


@pytest.mark.parametrize(("judge", "stop"), [("engine", 1), ("engine", 8), ("pyautoattack", 7)])
def test_a_stopped_evaluation_goes_on_where_it_was(run, whole, judge, stop, monkeypatch):
    (run.path / "evaluation.json").unlink(missing_ok=True)
    run = judged(run, judge=judge)
    before = stopped(run, stop)
    assert not (run.path / "evaluation.json").exists()
    # A power cut has cut the last line short.
    journal = run.path / "evaluation" / "0.jsonl"
    journal.write_text(journal.read_text()[:-5])
    after = Calls(monkeypatch)
    assert evaluated(run) == whole[judge]
    assert set(before) & set(after.keys) == {before[-1]}
    assert not (run.path / "evaluation").exists()


@pytest.mark.parametrize("change", [{"pgd_steps": 4}, {"batch_size": 9}, {"autoattack": "none"}])
def test_the_answers_of_another_evaluation_are_not_used(run, change, monkeypatch):
    run = judged(run, judge="engine")
    stopped(run, 4)
    calls = Calls(monkeypatch)
    evaluated(judged(run, **change))
    assert calls.keys[0] == ("PGD restart 1 of 2", 0)
    assert len(calls.keys) == len(set(calls.keys))


def test_the_answers_of_other_weights_are_not_used(run, monkeypatch):
    run = judged(run, judge="engine")
    stopped(run, 4)
    network = engine.load(run.path)
    with torch.no_grad():
        next(network.parameters()).mul_(1.01)
    before = {name: (run.path / name).read_bytes() for name in WEIGHTS}
    run.save("best", network, shape="1x8x8", classes=10)
    calls = Calls(monkeypatch)
    evaluated(run)
    for name, data in before.items():
        (run.path / name).write_bytes(data)
    assert calls.keys[0] == ("PGD restart 1 of 2", 0)


def test_seconds_before_the_stop_count(run):
    run = judged(run, judge="engine")
    stopped(run, 3)
    journal = run.path / "evaluation" / "0.jsonl"
    *lines, last = journal.read_text().splitlines()
    entry = {**json.loads(last), "seconds": 5000.0}
    journal.write_text("\n".join([*lines, json.dumps(entry)]) + "\n")
    evaluated(run)
    assert 5000 < run.read_json("evaluation.json")["eval_seconds"] < 5600


@pytest.mark.parametrize("judge", ["engine", pytest.param("pyautoattack", marks=pytest.mark.slow)])
def test_two_processes_give_the_answers_of_one(run, judge, capsys):
    """Also from the journal of one process that was stopped."""
    words = ["eval", str(run.path), "--evaluation.judge", judge, "--json"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ensemble, "STEPS", 100)
        Calls(patch, 3)
        assert cli.run(words) == 130
    assert "the same command goes on" in capsys.readouterr().err
    done = subprocess.run(
        [sys.executable, "-m", "engine", *words, "--nproc", "2"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["examples"] == 16
    both = without_time(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ensemble, "STEPS", 100)
        assert both == evaluated(judged(run, judge=judge))
    assert not (run.path / "evaluation").exists()


def test_batches_are_dealt_in_turn(monkeypatch, tmp_path):
    from engine.device import distributed
    from engine.device.distributed import World

    batches = torch.arange(10).split(2)
    seen = []

    def judge(number, rows):
        seen.append(number)
        return rows[:1]

    others = ([2, 6], ["a note"])
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [value, others])
    work = Work(world=World(0, 2), journal=tmp_path / "j", about={"a": (1, 2)})
    assert work.fallen("x", batches, judge).tolist() == [0, 2, 4, 6, 8]
    assert seen == [0, 2, 4]
    assert work.notes == ["a note"]
    # The journal has this process's own answers.
    again = Work(journal=tmp_path / "j", about={"a": [1, 2]})
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [value])
    assert again.fallen("x", batches, judge).tolist() == [0, 2, 4, 6, 8]
    assert seen == [0, 2, 4, 1, 3]


def test_bad_numbers_of_processes_are_one_line(run, capsys):
    assert cli.run(["eval", str(run.path), "--nproc", "0"]) == 2
    assert "--nproc must be at least 1" in capsys.readouterr().err
    assert cli.run(["eval", str(run.path), "--nproc", "2", "--masking"]) == 2
    assert "--masking runs in one process" in capsys.readouterr().err


def test_a_link_in_place_of_the_journal_is_refused(run, tmp_path):
    (tmp_path / "outside").mkdir()
    (run.path / "evaluation").symlink_to(tmp_path / "outside")
    try:
        with pytest.raises(EngineError, match="symbolic link"):
            evaluate.evaluate_run(run)
    finally:
        (run.path / "evaluation").unlink()
    assert not list((tmp_path / "outside").iterdir())
