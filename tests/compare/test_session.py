"""Comparisons: protocols, budgets, runs that resume, and what the rows say."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch

from engine import cli, files, recipes
from engine.compare import scores, session
from engine.compare.protocol import Job, is_protocol, jobs, read
from engine.errors import EngineError
from engine.runs.folder import Run

COMMON = """
base = "quickstart"
[common]
data = { train_examples = 300, validation = 50 }
validation = { steps = 2 }
evaluation = { examples = 20, pgd_steps = 2, pgd_restarts = 1, autoattack = "none" }
"""
TWO = (
    COMMON
    + """
[methods.weak]
attack = { steps = 1 }
objective = { name = "n-fgsm" }
[methods.ball]
"""
)


def written(tmp_path, text=TWO, **budgets):
    path = tmp_path / "small.toml"
    path.write_text(text)
    return read([str(path)], {}, **budgets)


def test_protocol_file_merges_base_common_and_method(tmp_path):
    found = written(tmp_path, seeds=2, epochs=[1, 3])
    plan = jobs(found, {})
    assert [job.folder for job in plan[:4]] == [
        "weak-e1-s0",
        "weak-e3-s0",
        "ball-e1-s0",
        "ball-e3-s0",
    ]
    assert [job.recipe.seed for job in plan] == [0] * 4 + [1] * 4
    weak, ball = plan[0].recipe, plan[2].recipe
    assert weak.objective.name == "n-fgsm"
    assert ball.objective.name == "local-ball"
    assert weak.data == ball.data
    assert weak.data.train_examples == 300
    assert ball.optim.epochs == 1


def test_a_replay_counts_as_an_epoch(tmp_path):
    text = TWO + "optim = { replays = 4 }\n"
    plan = jobs(written(tmp_path, text, seeds=1, epochs=[6, 16]), {})
    assert [(job.folder, job.recipe.optim.epochs) for job in plan] == [
        ("weak-e6-s0", 6),
        ("weak-e16-s0", 16),
        ("ball-e8-s0", 2),
        ("ball-e16-s0", 4),
    ]


def test_minutes_become_epochs_of_each_methods_own_length(tmp_path):
    found = written(tmp_path, seeds=1, minutes=[0.1])
    epochs = {
        job.method: job.recipe.optim.epochs for job in jobs(found, {"weak": 100.0, "ball": 400.0})
    }
    # 300 images in batches of 64: 4 steps an epoch.
    assert epochs == {"weak": 15, "ball": 4}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base = 'quickstart'\nmethods = 3", "methods"),
        ("base = 'quickstart'\n[methods]", "methods"),
        ("[methods.a]", "base"),
        ("[methods.a]", 'base is missing, and must be the name or the path of a recipe, "mnist"'),
        (
            "base = 'quickstart'\nepochs = ['x']\n[methods.a]",
            "epochs is ['x'], and must be a list of whole numbers, [5, 15]",
        ),
        (
            "base = 'quickstart'\nminutes = 2\n[methods.a]",
            "minutes is 2, and must be a list of numbers, [1, 2.5]",
        ),
        (
            "base = 'quickstart'\nscore = 'luck'\n[methods.a]",
            """score is 'luck', and must be "test" or "validation\"""",
        ),
        ("base = 'quickstart'\nseed = 1\n[methods.a]", "did you mean seeds"),
        ("base = 'quickstart'\nseeds = 0\n[methods.a]", "toml: seeds is 0, and must be a whole"),
        ("base = 'quickstart'\nepochs = [0]\n[methods.a]", "above 0"),
        ("base = 'quickstart'\nepochs = [1]\nminutes = [1]\n[methods.a]", "not both"),
        ("base = 'quickstat'\n[methods.a]", "did you mean quickstart"),
        ("base = 'quickstart'\n[methods.a]\nattack = 3", "attack"),
    ],
)
def test_mistakes_in_a_protocol_give_one_line(tmp_path, text, said):
    with pytest.raises(EngineError) as caught:
        jobs(written(tmp_path, text), {})
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    path = folder / "small.toml"
    path.write_text(TWO)
    words = ["compare", str(path), "--seeds", "2", "--epochs", "1", "--out", str(folder / "out")]
    assert cli.run([*words, "--jobs", "2", "--json"]) == 0
    return folder, words


def test_runs_are_made_summarised_and_drawn(made):
    folder, _ = made
    found = json.loads((folder / "out" / "compare.json").read_text())
    assert len(found["points"]) == 4
    weak, ball = found["rows"]
    assert (weak["method"], ball["method"]) == ("weak", "ball")
    for row in (weak, ball):
        mine = [p for p in found["points"] if p["method"] == row["method"]]
        assert row["seeds"] == 2
        assert row["pgd_mean"] == pytest.approx(sum(p["pgd"] for p in mine) / 2)
        assert row["pgd_se"] == pytest.approx(row["pgd_sd"] / 2**0.5)
        # The time axis is steps times the step as timed beside the others.
        step = found["steps"][row["method"]]["p50_ms"]
        assert row["train_seconds_mean"] == pytest.approx(mine[0]["steps"] * step / 1e3)
    assert weak["train_seconds_mean"] < ball["train_seconds_mean"]
    assert (folder / "out" / "compare.png").stat().st_size > 5000


def test_a_users_own_set_is_named_without_its_folder(made):
    folder, _ = made
    job = Job("weak", Run.open(folder / "out" / "weak-e1-s0").recipe)
    assert session._point(job, folder / "out", {"p50_ms": 1.0})["dataset"] == "digits"
    own = dataclasses.replace(job.recipe.data, name=str(folder / "pets.npz"))
    there = Job("weak", dataclasses.replace(job.recipe, data=own))
    assert session._point(there, folder / "out", {"p50_ms": 1.0})["dataset"] == "pets"


def test_finished_runs_are_not_run_again_and_unfinished_ones_are(made, monkeypatch, capsys):
    folder, words = made
    started = []
    begin = session._start
    monkeypatch.setattr(session, "_start", lambda *a: started.append(a[0].folder) or begin(*a))
    assert cli.run([*words, "--json"]) == 0
    assert started == []
    first = json.loads(capsys.readouterr().out)
    # As a kill during the evaluation leaves it.
    (folder / "out" / "ball-e1-s1" / "summary.json").unlink()
    (folder / "out" / "compare.json").unlink()
    assert cli.run([*words, "--json"]) == 0
    assert started == ["ball-e1-s1"]
    again = json.loads(capsys.readouterr().out)
    # Same seed, same numbers.
    assert [row["pgd_mean"] for row in again] == [row["pgd_mean"] for row in first]


def test_the_timed_steps_are_gone_before_runs_start(tmp_path, monkeypatch):
    """Their weights, graphs and buffers would lie beside those of the runs."""
    steps, told = [], []

    class Step:
        def __init__(self):
            self.itself = self  # a cycle, as a captured step's

        def __call__(self):
            pass

    def step_of(recipe):
        made = Step()
        steps.append(weakref.ref(made))
        return made

    monkeypatch.setattr(session.build, "step_of", step_of)
    monkeypatch.setattr(session, "_STEPS_SECONDS", 0.01)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "empty_cache", lambda: told.append([ref() is None for ref in steps])
    )
    monkeypatch.setattr(session, "environment", dict)
    assert set(session._step_times(written(tmp_path), tmp_path / "steps.json")) == {"weak", "ball"}
    assert told == [[True, True]]


def test_results_of_an_earlier_sitting_stand_for_their_runs(made, tmp_path, monkeypatch, capsys):
    folder, words = made
    files.write_text(tmp_path / "compare.json", (folder / "out" / "compare.json").read_text())
    started = []
    monkeypatch.setattr(
        session,
        "_make",
        lambda plan, out, score, workers, finished: started.extend(j.folder for j in plan) or [],
    )
    words = [*words[: words.index("--out")], "--out", str(tmp_path), "--json"]
    assert cli.run(words) == 0
    assert started == []
    rows = json.loads(capsys.readouterr().out)
    assert [row["seeds"] for row in rows] == [2, 2]
    # One more seed is run, and a method whose recipe has changed is run anew.
    assert cli.run([*words, "--seeds", "3"]) == 0
    assert started == ["weak-e1-s2", "ball-e1-s2"]
    started.clear()
    # Asked for less, or for another budget, it still has what was measured. The recipe's own
    # epochs decide nothing: a budget replaces them.
    for fewer in (["--seeds", "1"], ["--epochs", "2"], ["--optim.epochs", "7"]):
        capsys.readouterr()
        assert cli.run([*words, *fewer]) == 0
        assert [row["seeds"] for row in json.loads(capsys.readouterr().out)] == [2, 2]
    # One method's third seed alone: the other's results stay.
    started.clear()
    capsys.readouterr()
    assert cli.run([*words, "--seeds", "3", "--methods", "ball"]) == 0
    assert started == ["ball-e1-s2"]
    captured = capsys.readouterr()
    assert [row["seeds"] for row in json.loads(captured.out)] == [2, 2]
    assert "left out" not in captured.err
    started.clear()
    stored = (tmp_path / "compare.json").read_text()
    assert cli.run([*words, "--attack.alpha", "0.07"]) == 0
    assert started == [f"{m}-e1-s{s}" for s in (0, 1) for m in ("weak", "ball")]
    # What is of other recipes is no longer shown, and not lost either.
    (aside,) = tmp_path.glob("compare.2*.json")
    assert aside.read_text() == stored
    assert f"4 results in {tmp_path / 'compare.json'}" in capsys.readouterr().err


def test_a_run_cut_short_goes_on(made, tmp_path, monkeypatch):
    """Its folder has a recipe and no summary: it is resumed, not begun again."""
    folder, _ = made
    begun = []
    monkeypatch.setattr(session.subprocess, "Popen", lambda words, **_: begun.append(words))
    whole = Run.open(folder / "out" / "ball-e1-s1")
    copy = tmp_path / "ball-e1-s1"
    shutil.copytree(whole.path, copy)
    session._start(Job("ball", whole.recipe), tmp_path, "test", 1)
    assert "--resume" in begun[0]
    assert (copy / "recipe.toml").exists()
    changed = dataclasses.replace(whole.recipe, threads=3)
    session._start(Job("ball", changed), tmp_path, "test", 1)
    assert "--resume" not in begun[1]
    assert not (copy / "recipe.toml").exists()


def test_another_recipe_in_the_folder_is_refused(made, capsys):
    _, words = made
    assert cli.run([*words, "--data.validation", "60"]) == 2
    assert "another recipe" in capsys.readouterr().err


def test_a_damaged_summary_of_a_run_is_named(made, tmp_path, capsys):
    folder, words = made
    shutil.copytree(folder / "out", tmp_path / "out")
    (tmp_path / "out" / "ball-e1-s1" / "summary.json").write_text('{"note": "x"}')
    capsys.readouterr()
    assert cli.run([*words, "--out", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "ball-e1-s1/summary.json is damaged (train_seconds is missing)" in line


@pytest.fixture
def timed(monkeypatch):
    """Whether the methods' steps were timed; the timing ends the comparison here."""
    calls = []

    def time_steps(*_):
        calls.append(True)
        raise EngineError("timed")

    monkeypatch.setattr(session, "_step_times", time_steps)
    return calls


def test_a_file_in_place_of_the_folder_shows_before_the_timing(tmp_path, timed, capsys):
    path = tmp_path / "small.toml"
    path.write_text(TWO)
    assert cli.run(["compare", str(path), "--out", str(path)]) == 2
    assert f"cannot write {path}: it is a file, not a folder" in capsys.readouterr().err
    assert timed == []


def test_a_read_only_folder_shows_before_the_timing(tmp_path, timed, monkeypatch, capsys):
    path, out = tmp_path / "small.toml", tmp_path / "out"
    path.write_text(TWO)

    def refused(dir):
        raise OSError(errno.EROFS, "Read-only file system")

    # The superuser writes into every folder, so permissions would prove nothing.
    monkeypatch.setattr(files.tempfile, "TemporaryFile", refused)
    assert cli.run(["compare", str(path), "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"engine: cannot write {out}: Read-only file system\n"
    assert timed == []


def test_a_folder_that_can_be_written_leads_to_the_timing(tmp_path, timed):
    path, out = tmp_path / "small.toml", tmp_path / "new" / "out"
    path.write_text(TWO)
    assert cli.run(["compare", str(path), "--out", str(out)]) == 2
    assert timed == [True]
    assert list(out.iterdir()) == []


def test_a_study_is_no_recipe(tmp_path, capsys):
    path = tmp_path / "small.toml"
    path.write_text(TWO)
    for words in (["train", str(path)], ["compare", str(path), "quickstart"]):
        assert cli.run(words) == 2
        line = capsys.readouterr().err
        assert f"is a study of several methods, not a recipe: engine compare {path}\n" in line


@pytest.mark.parametrize("target", ["7", "0", "-0.5", "nan", "1.01"])
def test_a_target_is_a_share(target, capsys):
    assert cli.run(["compare", "--from-store", "few", "--target", target]) == 2
    assert "--target must be above 0 and at most 1" in capsys.readouterr().err


def test_a_target_of_all_images_is_taken(capsys):
    assert cli.run(["compare", "--from-store", "few", "--target", "1"]) == 0
    assert "s to 100%" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--out", "--jobs", "--seeds", "--epochs", "--minutes"])
def test_stored_results_take_no_flag_of_a_training(flag, capsys):
    assert cli.run(["compare", "--from-store", "few", flag, "1"]) == 2
    assert f"{flag}: stored results cannot be changed" in capsys.readouterr().err


def test_a_failing_run_is_named_and_the_others_are_made(tmp_path, monkeypatch, capsys):
    path = tmp_path / "small.toml"
    path.write_text(
        TWO.replace("[methods.ball]", '[methods.ball]\noptim = { lr = 1e30, name = "sgd" }')
    )
    words = ["compare", str(path), "--seeds", "1", "--epochs", "2", "--out", str(tmp_path / "out")]
    assert cli.run(words) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "ball-e2-s0" in said
    assert "not finite" in said
    assert Run.open(tmp_path / "out" / "weak-e2-s0").read_json("summary.json")["pgd"] >= 0


def row(method, seconds, accuracy, epochs=1):
    return {
        "method": method,
        "epochs": epochs,
        "train_seconds_mean": seconds,
        "autoattack_mean": accuracy,
    }


def test_time_to_target_lies_between_budgets():
    rows = [row("a", 10, 0.5), row("a", 20, 0.7, 2), row("b", 5, 0.55), row("c", 1, 0.1)]
    assert scores.time_to(rows, 0.6) == {"a": pytest.approx(15), "b": None, "c": None}
    assert scores.time_to(rows, 0.5) == {"a": 10, "b": 5, "c": None}


def test_pareto_front_has_what_nothing_beats():
    def point(method, seconds, accuracy):
        return {
            **dict.fromkeys(("dataset", "network", "norm", "eps", "objective", "k", "start")),
            "method": method,
            "epochs": 1,
            "examples": 10,
            "autoattack_version": "standard",
            "passes_per_step": 5,
            "seconds": seconds,
            "pgd": accuracy,
        }

    rows = scores.summarise([point("slow", 9, 0.6), point("fast", 1, 0.5), point("bad", 5, 0.4)])
    assert {r["method"] for r in rows if r["pareto"]} == {"slow", "fast"}


def test_a_method_that_a_protocol_does_not_have_is_named(tmp_path):
    with pytest.raises(EngineError, match=r"--methods bal: small has no such method.*ball"):
        written(tmp_path, methods=["bal"])


def test_two_recipes_of_one_name_are_refused():
    with pytest.raises(EngineError, match="one name"):
        read(["quickstart", "quickstart"], {})


@pytest.mark.parametrize(
    "path",
    sorted((Path(__file__).parents[2] / "benchmarks" / "studies").glob("*.toml")),
    ids=lambda p: p.stem,
)
def test_every_study_is_valid(path):
    if is_protocol(str(path)):
        protocol = read([str(path)], {})
        names = [job.folder for job in jobs(protocol, {})]
        assert len(names) == len(set(names)) > 0
    else:
        assert recipes.load(str(path))


def test_many_methods_at_one_budget_are_named_at_their_points():
    """A key to twenty colours is a riddle; a few methods as curves keep theirs, and the front."""
    from engine import pictures
    from engine.compare import picture

    def drawn(methods, budgets, *, fallen=None):
        points = [
            {
                **dict.fromkeys(("dataset", "network", "norm", "eps", "objective")),
                "k": 1,
                "start": "random",
                "examples": 10,
                "autoattack_version": "standard",
                "passes_per_step": 5,
                "steps": 10,
                "method": f"m{m}",
                "epochs": e,
                "seed": seed,
                "autoattack": 0.1 if (m, seed) == (fallen, 1) else 0.4 + 0.01 * m,
                "seconds": 10.0 * e + m,
            }
            for m in range(methods)
            for e in budgets
            for seed in range(5)
        ]
        with pictures.style():
            _, (ax,) = pictures.panels(1, width=6.0, height=4.6)
            picture.draw_curves(ax, scores.summarise(points), points, passes=False)
        return ax

    many = drawn(12, [1])
    assert {text.get_text() for text in many.texts} == {f"m{m}" for m in range(12)}
    assert many.get_legend() is None
    # A run that collapsed is out of the picture and not hushed up; its method stays.
    corner = [t.get_text() for t in drawn(12, [1], fallen=7).texts if "m7 " in t.get_text()]
    assert corner == ["below: a run of m7 10.0%"]
    few = drawn(3, [1, 2])
    assert not few.texts
    keyed = [text.get_text() for text in few.get_legend().get_texts()]
    assert keyed == ["m0", "m1", "m2", "Pareto front"]
