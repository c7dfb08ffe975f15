"""What users do to run folders: a second look, a damaged recipe, a folder that may not be read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import engine
from engine import EngineError, cli

OLD = Path(__file__).parent / "old_run"
LOOK = ["--evaluation.examples", "8", "--evaluation.pgd_steps", "2", "--evaluation.pgd_restarts"]
LOOK += ["1", "--evaluation.autoattack", "none"]


@pytest.fixture
def run(tmp_path):
    return Path(shutil.copytree(OLD, tmp_path / "run"))


def kept(run):
    return [p for p in run.glob("evaluation.*.json") if p.name != "evaluation.json"]


@pytest.mark.parametrize(
    ("earlier", "keeps"),
    [
        ({"examples": 500, "autoattack_version": "none"}, True),
        ({"examples": 8, "autoattack_version": "standard"}, True),
        ({"examples": 8, "autoattack_version": "none"}, False),
        ({"examples": 4, "autoattack_version": "none"}, False),
        ({"examples": "many"}, False),
        ([], False),
    ],
)
def test_a_quick_look_keeps_an_evaluation_that_says_more(run, earlier, keeps, caplog):
    (run / "evaluation.json").write_text(json.dumps(earlier))
    assert cli.run(["eval", str(run), *LOOK]) == 0
    assert json.loads((run / "evaluation.json").read_text())["examples"] == 8
    assert [json.loads(p.read_text()) for p in kept(run)] == [earlier] * keeps
    assert ("the earlier evaluation" in caplog.text) == keeps


def test_the_packages_verdict_is_kept_when_the_engine_judges_after_it(run):
    images = {"examples": 40, "autoattack_version": "standard", "autoattack_judge": "pyautoattack"}
    (run / "evaluation.json").write_text(json.dumps(images))
    words = ["--evaluation.autoattack", "apgd", "--evaluation.judge", "engine"]
    assert cli.run(["eval", str(run), *LOOK[:-2], *words]) == 0
    assert [json.loads(p.read_text()) for p in kept(run)] == [images]


@pytest.mark.parametrize("command", ["eval", "report", "export", "train --resume"])
@pytest.mark.parametrize("text", ["", "name = 'x'\n"])
def test_a_recipe_without_its_sections_is_damaged(run, command, text, capsys):
    (run / "recipe.toml").write_text(text)
    assert cli.run([*command.split(), str(run)]) == 2
    assert "recipe.toml is damaged: it has no [data]" in capsys.readouterr().err


@pytest.mark.parametrize("eps", [8, "300/255", 1.5])
def test_a_radius_beyond_a_pixels_range_is_refused_in_python_too(eps):
    with pytest.raises(EngineError, match=r"more than a pixel's whole range \[0, 1\]"):
        engine.Linf(eps)
    assert engine.L2(8).eps == 8
    assert engine.Linf(1).eps == 1
    growing = engine.Linf(0.5).growing(torch.tensor(0.1))
    assert float(growing.eps) == pytest.approx(0.1)


LONG = "x" * 300


@pytest.mark.parametrize(
    "words",
    [
        ["eval", LONG],
        ["report", LONG],
        ["export", LONG],
        ["train", "--resume", LONG],
        ["train", "quickstart", "--run-dir", LONG],
        ["train", "quickstart", "--data.name", f"./{LONG}"],
        ["data", "info", f"./{LONG}"],
        ["compare", f"./{LONG}.toml"],
        ["compare", "quickstart", "--out", LONG],
    ],
    ids=lambda words: " ".join(words).replace(LONG, "LONG"),
)
def test_a_name_that_no_file_can_have_is_one_line(words, capsys):
    assert cli.run(words) == 2
    err = capsys.readouterr().err
    assert "File name too long" in err
    assert len(err.splitlines()) == 1


def test_a_folder_that_may_not_be_searched_is_one_line(tmp_path, capsys, monkeypatch):
    """Root may search every folder, so the look at the path is made to fail."""
    stat = os.stat

    def refused(path, *args, **options):
        if "forbidden" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", refused)
    assert cli.run(["eval", str(tmp_path / "forbidden" / "run")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("engine: cannot use ")
    assert "Permission denied" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "words",
    [
        ["train", "quickstart", "--run-dir", ""],
        ["train", "--resume", ""],
        ["eval", ""],
        ["export", ""],
        ["report", ""],
        ["compare", "quickstart", "--out", ""],
        ["profile", "quickstart", "--out", ""],
    ],
    ids=" ".join,
)
def test_a_variable_that_is_not_set_does_not_name_this_folder(words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.run(words) == 2
    assert "needs a path, got an empty word" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
