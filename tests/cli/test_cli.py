"""The command line as a person meets it: real commands in a process of their own."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine import EngineError, cli, recipes
from engine.cli import bench
from engine.data.loaders import dali
from engine.runs.folder import Run

needs_dali = pytest.mark.skipif(dali.unavailable() is not None, reason=str(dali.unavailable()))

FAST = ["--optim.epochs", "2", "--evaluation.examples", "40", "--evaluation.autoattack", "apgd"]
FAST += ["--evaluation.pgd_restarts", "1", "--evaluation.pgd_steps", "10"]


def engine_process(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "engine", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One short quickstart run, in a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("a folder")
    done = engine_process("train", "quickstart", "--json", *FAST, "--run-dir", "my run", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_json_is_one_object_with_the_promised_fields(finished):
    _folder, done = finished
    row = json.loads(done.stdout)
    assert {
        "recipe",
        "clean",
        "pgd",
        "autoattack",
        "examples",
        "train_seconds",
        "eval_seconds",
        "passes_per_step",
        "run_dir",
    } <= set(row)
    assert row["recipe"] == "quickstart"
    assert row["examples"] == 40
    assert 0 <= row["autoattack"] <= row["clean"] <= 1
    assert "epoch" in done.stderr


def test_run_folder_holds_all_there_is_to_know(finished):
    folder, _done = finished
    run = folder / "my run"
    for name in (
        "recipe.toml",
        "environment.json",
        "metrics.jsonl",
        "evaluation.json",
        "summary.json",
        "best.safetensors",
        "last.safetensors",
        "report.html",
    ):
        assert (run / name).stat().st_size > 0, name
    rows = Run.open(run).metrics()
    assert [r["epoch"] for r in rows] == [1, 2]
    assert {
        "loss",
        "ce",
        "local",
        "adv_accuracy",
        "val_clean",
        "val_pgd",
        "train_seconds",
        "lr",
    } <= set(rows[0])
    assert Run.open(run).recipe.optim.epochs == 2
    assert json.loads((run / "environment.json").read_text())["torch"]
    assert all(t.is_contiguous() for t in load_file(run / "best.safetensors").values())
    assert not [p for p in run.iterdir() if p.name.startswith(".")]


def test_evaluation_again_gives_the_same_numbers(finished):
    folder, done = finished
    again = engine_process("eval", "my run", "--json", cwd=folder)
    assert again.returncode == 0, again.stderr
    first, second = json.loads(done.stdout), json.loads(again.stdout)
    for key in ("clean", "pgd", "autoattack", "examples"):
        assert first[key] == second[key]


def test_report_is_rebuilt(finished):
    folder, _ = finished
    (folder / "my run" / "report.html").unlink()
    done = engine_process("report", "my run", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "my run" / "report.html").exists()


def test_a_second_run_does_not_overwrite_the_first(finished):
    folder, _ = finished
    before = (folder / "my run" / "best.safetensors").read_bytes()
    again = engine_process("train", "quickstart", *FAST, "--run-dir", "my run", cwd=folder)
    assert again.returncode == 2
    assert "holds a run already" in again.stderr
    assert (folder / "my run" / "best.safetensors").read_bytes() == before


def test_a_damaged_checkpoint_is_named(finished, tmp_path):
    folder, _ = finished
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder / "my run", copy)
    whole = (copy / "best.safetensors").read_bytes()
    (copy / "best.safetensors").write_bytes(whole[: len(whole) // 2])
    done = engine_process("eval", str(copy), cwd=tmp_path)
    assert done.returncode == 2
    assert "best.safetensors is damaged" in done.stderr
    assert "Traceback" not in done.stderr


without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="these have it")
MISTAKES = [
    (["train"], "which recipe"),
    (["train", "quickstrat"], "did you mean quickstart"),
    (["train", "quickstart", "--attack.step", "2"], "did you mean --attack.steps"),
    (["train", "quickstart", "--attack.steps"], "needs a value"),
    (["train", "quickstart", "--attack.steps", "0"], "attack.steps"),
    (["train", "quickstart", "--threat.eps", "-8/255"], "threat.eps"),
    (["train", "quickstart", "--objective.rho", "0"], "objective.rho"),
    (["train", "quickstart", "--data.name", "nothing"], "nothing"),
    (["train", "quickstart", "--model.name", "fast-at-mnst"], "fast-at-mnist"),
    (["train", "quickstart", "--optim.batch_size", "100000"], "batch_size"),
    (["train", "quickstart", "--data.validation", "0"], "validation"),
    (["train", "quickstart", "--data.validation", "1.5"], "validation"),
    (["train", "quickstart", "--data.pad", "8"], "pad"),
    (["train", "quickstart", "more"], "unexpected argument"),
    (["train", "cifar10", "--data.name", "cifar10"], "engine data fetch cifar10"),
    (["eval", "."], "not a run folder"),
    (["report", "nowhere"], "not a run folder"),
    (["data", "fetch"], "which dataset"),
    (["data", "fetch", "imagenet"], "imagenet"),
    (["frain"], "invalid choice"),
    (["doctor", "--no-such"], "--no-such"),
    *(
        pytest.param(["train", "quickstart", *words], said, marks=without_gpu)
        for words, said in [
            (["--step.capture", "on"], "CUDA graphs need a CUDA device"),
            (["--step.precision", "tf32"], "tf32 needs an NVIDIA GPU"),
            (["--optim.name", "apex-sgd"], "apex-sgd needs a CUDA device"),
        ]
    ),
]


@pytest.mark.parametrize(
    ("words", "said"), MISTAKES, ids=lambda v: " ".join(v) if isinstance(v, list) else ""
)
def test_mistakes_give_one_line_and_status_2(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ENGINE_DATA", str(tmp_path / "no-data"))
    assert cli.run(words) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len([line for line in err.splitlines() if line.startswith("engine: ")]) == 1
    assert not (tmp_path / "runs").exists()


def test_run_folder_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert cli.run(["train", "quickstart", "--run-dir", str(tmp_path / "file" / "run")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_disk_full_leaves_no_half_written_file(tmp_path, monkeypatch):
    from engine import files

    files.write_text(tmp_path / "a", "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(EngineError, match="No space left"):
        files.write_text(tmp_path / "a", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_train_help_lists_every_field_with_its_meaning(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.run(["train", "--help"]) == 0
    out = capsys.readouterr().out
    for word in ("--attack.steps", "--threat.eps", "--objective.rho", "--optim.lr", "[pixel units"):
        assert word in out


def test_help_shows_values_as_a_user_types_them(capsys):
    """The values of the help, given back, are the defaults."""
    assert cli.run(["train", "--help"]) == 0
    shown = {
        words[0].removeprefix("--"): words[1]
        for words in map(str.split, capsys.readouterr().out.splitlines())
        if len(words) > 1 and words[0].startswith("--")
    }
    assert shown["schedule.milestones"] == "0.5,0.75"
    assert shown["log.to"] == "tensorboard"
    typed = {name: shown[name] for name, *_ in recipes.options() if name != "name"}
    found, default = recipes.load("quickstart", typed), recipes.Recipe(name="quickstart")
    # The help shows six digits of eps.
    assert found.threat.eps == pytest.approx(default.threat.eps, rel=1e-5)
    assert dataclasses.replace(found, threat=default.threat) == default
    assert cli.run(["train", "quickstart", "--log.to", "none", "--help", "log"]) == 0
    words = capsys.readouterr().out.split()
    assert words[words.index("--log.to") + 1] == "none"


def test_every_flag_has_a_text_and_names_its_default():
    (commands,) = (
        action.choices for action in cli.build_parser()._actions if action.dest == "command"
    )
    # `engine train --help` is written by hand; the test above reads it.
    for command in set(commands) - {"train"}:
        for action in commands[command]._actions:
            what = f"{command} {action.option_strings or action.dest}"
            assert action.help, what
            if action.default not in (None, False, [], "==SUPPRESS=="):
                text = action.help % {"default": action.default}
                assert "default" in text, what
                assert str(action.default) in text, what


def test_flags_without_a_value_of_their_own_say_what_comes_instead(capsys):
    with pytest.raises(SystemExit):
        cli.run(["compare", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "default runs/NAME-DATE-TIME" in text
    assert "runs at a time; default 1" in text
    assert "default: the protocol's, or 3" in text


def test_help_of_eval_names_every_field_of_the_evaluation(capsys):
    with pytest.raises(SystemExit):
        cli.run(["eval", "--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(recipes.Recipe().evaluation):
        assert field.name in text


def test_help_does_not_wait_for_torch():
    check = (
        "import sys; from engine import cli; cli.build_parser(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_every_benchmark_has_a_module_that_measures():
    for name in bench.BENCHMARKS.values():
        assert callable(import_module(f"engine.benchmarks.{name}").run), name


def test_doctor_shows_a_backend_for_every_op(capsys):
    assert cli.run(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    from engine.kernels.backends import OPS

    assert {row["op"] for row in found["kernels"]} == set(OPS)
    assert all(row["why"] for row in found["kernels"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--step.capture", "on"], []),
        (["--step.precision", "tf32"], []),
        (["--optim.name", "apex-adam"], ["recorded with adamw in place of apex's"]),
        (
            ["--optim.name", "apex-sgd"],
            ["recorded with sgd", "apex-sgd takes its learning rate from the host"],
        ),
        (
            ["--optim.name", "apex-lamb"],
            ["recorded with adamw", "apex-lamb takes its learning rate from the host"],
        ),
    ],
    ids=" ".join,
)
def test_doctor_audits_recipes_for_gpus_without_one(words, said, capsys):
    status = cli.run(["doctor", "--capture", "quickstart", *words])
    out = capsys.readouterr().out
    never = any("host" in line for line in said)
    assert status == never
    assert ("the step cannot be captured" if never else "the step can be captured") in out
    for line in said:
        assert line in out
    if not said:
        assert "in place of" not in out


@pytest.mark.parametrize(
    ("name", "network", "loader"),
    [
        ("cifar10", "preact-resnet18", "auto"),
        pytest.param("cifar10", "preact-resnet18", "dali", marks=needs_dali),
        ("cifar10", "preact-resnet18", "torch"),
        ("cifar10", "preact-resnet18", "null"),
        ("cifar100", "tiny-cnn", "auto"),
        ("mnist", "small-cnn", "auto"),
    ],
)
def test_full_scale_recipes_train_on_files_in_the_official_format(
    name, network, loader, tmp_path, monkeypatch, capsys
):
    """Crop, mirror, normalisation, memory: the whole path, on random images for two steps."""
    from engine.runs import images

    from ..data import official

    official.install(tmp_path / "data", name, train=24, test=8)
    monkeypatch.setenv("ENGINE_DATA", str(tmp_path / "data"))
    images._images.cache_clear()
    words = ["train", name, "--json", "--no-eval", "--run-dir", str(tmp_path / "run")]
    words += ["--model.name", network, "--optim.epochs", "1", "--optim.batch_size", "8"]
    words += ["--data.validation", "8", "--validation.steps", "1", "--threads", "1"]
    words += ["--data.loader", loader, "--data.workers", "1"]
    assert cli.run(words) == 0, capsys.readouterr().err
    assert json.loads(capsys.readouterr().out)["steps"] == 2
    assert Run.open(tmp_path / "run").metrics()[0]["loss"] > 0
    images._images.cache_clear()


@pytest.mark.parametrize("program", ["/home/me/.venv/bin/engine", "/home/me/engine/__main__.py"])
def test_a_stamp_names_the_command_and_not_where_it_lies(monkeypatch, program):
    from engine.device.machine import environment

    monkeypatch.setattr("sys.argv", [program, "train", "my recipe.toml"])
    assert environment()["command"] == "engine train 'my recipe.toml'"


def test_importing_the_engine_imports_no_triton():
    """It would be the compiler's Triton for the whole process, where tests and users want the
    interpreter's.
    """
    code = "import sys, engine, engine.runs.train; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
