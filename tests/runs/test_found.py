"""Finished runs that were moved, copied or edited: one line, or the numbers that stand there."""

from __future__ import annotations

import contextlib
import io
import json
import shutil

import pytest

from engine import EngineError, cli, plugins
from engine.runs import found
from engine.runs.folder import Run

QUICK = ["--optim.epochs", "1", "--evaluation.examples", "20", "--evaluation.autoattack", "none"]
QUICK += ["--evaluation.pgd_steps", "2", "--evaluation.pgd_restarts", "1"]
SUMMARY = {"train_seconds": 1.5, "passes_per_step": 9, "steps": 10}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run, and the lines that its training printed at the end."""
    path, printed = tmp_path_factory.mktemp("found") / "run", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert cli.run(["train", "quickstart", *QUICK, "--run-dir", str(path)]) == 0
    return path, printed.getvalue().splitlines()


@pytest.fixture
def run(trained, tmp_path):
    """A copy under another name; the files inside name the old place."""
    copy = tmp_path / "moved"
    shutil.copytree(trained[0], copy)
    return copy


def change(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def refusal(capsys, *words) -> str:
    capsys.readouterr()
    assert cli.run(list(words)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("engine: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_run_that_moved_is_shown_where_it_is(trained, run, capsys):
    assert cli.run(["train", "--resume", str(run)]) == 0
    out = capsys.readouterr().out
    assert f"next         engine export {run}" in out
    assert f"report       {run / 'report.html'}" in out
    assert str(trained[0]) not in out
    assert cli.run(["train", "--resume", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["run_dir"] == str(run)


@pytest.mark.parametrize("words", [["--optim.epochs", "4"], ["quickstart"], ["--threads=2"]])
def test_a_resumed_run_takes_no_recipe_and_no_field(run, words, capsys):
    assert "--resume RUN uses the run's own recipe" in refusal(
        capsys, "train", "--resume", str(run), *words
    )


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"train_seconds": None}, "train_seconds is None"),
        ({"train_seconds": "x"}, "train_seconds is 'x'"),
        ({"passes_per_step": None}, "passes_per_step"),
        ({"steps": True}, "steps"),
        ({"clean": "x"}, "clean"),
        ({"pgd": 2.0}, "pgd"),
        ({"autoattack": float("nan")}, "autoattack"),
        ({"examples": 0}, "examples"),
        ({"examples": None}, "examples is missing"),
        ({"rolled_back": 3}, "rolled_back"),
        ({"best_epoch": "1"}, "best_epoch"),
        ({"autoattack_attacks": [1]}, "autoattack_attacks"),
        ({"peak_memory_mb": "x"}, "peak_memory_mb"),
    ],
    ids=str,
)
def test_a_wrong_field_of_a_summary_is_named(run, fields, named, capsys):
    change(run / "summary.json", **fields)
    line = refusal(capsys, "train", "--resume", str(run))
    assert named in line
    assert f"remove it, and `engine train --resume {run}` writes it again" in line


@pytest.mark.parametrize("text", ["{}", '{"note": 1}'])
def test_a_summary_without_its_fields_is_refused(run, text, capsys):
    (run / "summary.json").write_text(text)
    assert "train_seconds is missing" in refusal(capsys, "train", "--resume", str(run))


def test_a_removed_summary_is_written_again(run, capsys):
    before = json.loads((run / "summary.json").read_text())
    (run / "summary.json").unlink()
    assert cli.run(["train", "--resume", str(run)]) == 0
    after = json.loads((run / "summary.json").read_text())
    assert [after[key] for key in ("clean", "pgd", "steps")] == [
        before[key] for key in ("clean", "pgd", "steps")
    ]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"clean_acc": None}, "clean_acc is None"),
        ({"clean_acc": "x"}, "clean_acc is 'x'"),
        ({"clean_acc": "nan"}, "clean_acc"),
        ({"worst_case_acc": "101"}, "worst_case_acc"),
        ({"standard_error": None}, "standard_error"),
        ({"autoattack_acc": "x"}, "autoattack_acc"),
        ({"pgd_acc": -1}, "pgd_acc"),
        ({"examples": "x"}, "examples"),
        ({"examples": True}, "examples"),
        ({"notes": "x"}, "notes"),
        ({"autoattack_attacks": 3}, "autoattack_attacks"),
    ],
    ids=str,
)
@pytest.mark.parametrize("format", ["robustbench", "hub"])
def test_a_wrong_field_of_an_evaluation_is_named(run, fields, named, format, capsys):
    change(run / "evaluation.json", **fields)
    line = refusal(capsys, "export", str(run), "--format", format)
    assert named in line
    assert f"`engine eval {run}` writes it again" in line
    assert not (run / "export").exists()


@pytest.mark.parametrize("value", ["x", None], ids=str)
def test_an_evaluation_of_one_value_gives_no_claim(run, value, capsys):
    path = run / "evaluation.json"
    path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), value)))
    refusal(capsys, "export", str(run))
    assert not (run / "export").exists()


@pytest.mark.parametrize("name", ["environment.json", "masking.json"])
def test_other_files_behind_the_card_are_named_by_their_run(run, name, capsys):
    (run / name).write_text('{"checks": [1]}')
    assert "its files are not what a run writes" in refusal(capsys, "export", str(run))


def test_percentages_are_numbers_or_text(run):
    change(run / "evaluation.json", clean_acc=97.5, worst_case_acc="74.50", pgd_acc=None)
    assert found.evaluation(Run.open(run))["clean_acc"] == 97.5


def test_a_number_beyond_every_float_is_refused(run):
    (run / "summary.json").write_text(json.dumps({**SUMMARY, "train_seconds": 10**400}))
    with pytest.raises(EngineError, match="train_seconds"):
        found.summary(Run.open(run))


def test_the_next_command_imports_the_users_modules(run, monkeypatch, capsys):
    monkeypatch.setattr(plugins, "_imported", ["mynets"])
    assert cli.run(["train", "--resume", str(run)]) == 0
    assert f"next         engine export {run} --import mynets\n" in capsys.readouterr().out


def test_training_closes_with_the_worst_case_of_all_attacks(trained, run, capsys):
    (after_training,) = [line for line in trained[1] if "worst case of all attacks" in line]
    assert cli.run(["eval", str(run)]) == 0
    assert after_training in capsys.readouterr().out.splitlines()
