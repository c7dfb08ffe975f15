"""The choice of the form of a step: timed once, remembered, and never for a short run."""

import json

import pytest
import torch

from engine import cli, recipes
from engine.device.distributed import World
from engine.runs import tuning
from engine.runs.tuning import Form

SHORT = {"optim.epochs": "1", "data.train_examples": "300", "validation.every": "1"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGINE_DATA", str(tmp_path / "data"))


@pytest.fixture
def timed(monkeypatch):
    """Each form takes a second here, a compiled one half of it; the calls are counted."""
    calls = []

    def take(recipe, form):
        calls.append(form)
        return 500.0 if form.compile else 1000.0

    monkeypatch.setattr(tuning, "_time", take)
    return calls


def auto(**overrides):
    return recipes.load("quickstart", {**SHORT, "step.compile": "auto", **overrides})


@pytest.mark.parametrize(
    ("word", "read"), [("true", "on"), ("False", "off"), ("on", "on"), ("auto", "auto")]
)
def test_words_of_earlier_versions_are_read(word, read):
    assert recipes.load("quickstart", {"step.compile": word}).step.compile == read
    assert recipes.parse({"name": "x", "step": {"compile": read == "on"}}).step.compile in (
        "on",
        "off",
    )


def test_an_explicit_form_is_not_timed(timed):
    for word in ("on", "off"):
        form = tuning.choose(recipes.load("quickstart", {"step.compile": word}))
        assert form == Form(compile=word == "on")
    assert timed == []


def test_a_short_run_is_not_compiled_and_nothing_is_remembered(timed, capsys):
    assert tuning.choose(auto()) == Form()
    assert timed == [Form()]
    assert tuning.remembered() == []
    assert "the run takes less than 600 s" in capsys.readouterr().err


def test_a_long_run_takes_the_fastest_form_and_remembers_it(timed, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "LONG", 0.0)
    chosen = tuning.choose(auto())
    assert chosen.compile
    number = len(timed)
    assert number >= 2
    assert tuning.choose(auto()) == chosen
    assert len(timed) == number
    assert "remembered from" in capsys.readouterr().err
    # What decides the time asks for another measurement, and what does not, does not.
    tuning.choose(auto(**{"optim.epochs": "2"}))
    assert len(timed) == number
    tuning.choose(auto(**{"optim.batch_size": "32"}))
    assert len(timed) == 2 * number
    assert cli.run(["doctor"]) == 0
    assert "not compiled 1e+03 ms a step, compiled 500 ms a step" in capsys.readouterr().out


def test_a_form_that_fails_is_left_out(timed, monkeypatch):
    def fail(recipe, form):
        if form.compile:
            raise RuntimeError("no compiler")
        return 1000.0

    monkeypatch.setattr(tuning, "LONG", 0.0)
    monkeypatch.setattr(tuning, "_time", fail)
    assert not tuning.choose(auto()).compile


def test_several_processes_take_a_remembered_form_and_time_none(timed, monkeypatch, capsys):
    assert tuning.choose(auto(), World(0, 2)) == Form()
    assert timed == []
    assert "several processes time no forms" in capsys.readouterr().err
    monkeypatch.setattr(tuning, "LONG", 0.0)
    chosen = tuning.choose(auto())
    assert tuning.choose(auto(), World(0, 2)) == chosen


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a": 1}', '{"a": {"compile": 1}}'])
def test_a_damaged_memory_holds_nothing(text, timed, monkeypatch):
    monkeypatch.setattr(tuning, "LONG", 0.0)
    place = tuning._place()
    place.parent.mkdir(parents=True)
    place.write_text(text)
    assert tuning.remembered() == []
    assert tuning.choose(auto()).compile
    assert len(json.loads(place.read_text())) == 1


def test_cudnn_searches_in_the_block_alone():
    before = torch.backends.cudnn.benchmark
    with Form(search=True).applied():
        assert torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.benchmark == before


def test_training_with_auto_times_the_step_and_trains(tmp_path, capsys):
    words = ["train", "quickstart", "--step.compile", "auto", "--run-dir", str(tmp_path / "run")]
    words += [word for key, value in SHORT.items() for word in (f"--{key}", value)]
    assert cli.run([*words, "--evaluation.autoattack", "none", "--evaluation.examples", "20"]) == 0
    told = capsys.readouterr().err
    assert "step.compile = auto: not compiled: the run takes less than 600 s; timed: " in told
    # The run folder keeps what was asked for.
    assert 'compile = "auto"' in (tmp_path / "run" / "recipe.toml").read_text()
