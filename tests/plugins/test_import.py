"""`--import MODULE`: networks and objectives from a folder outside the repository."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from engine import cli, models, objectives, plugins, recipes, registers
from engine.errors import EngineError
from engine.models import foreign
from engine.objectives import base
from engine.performance import capture_audit
from engine.runs.folder import Run

FLAGS = ["--import", "mynets"]
MINE = ["--model.name", "my-net", "--objective.name", "pairing"]
SHORT = [
    *("--data.train_examples", "64", "--optim.batch_size", "32", "--optim.epochs", "2"),
    *("--data.validation", "8", "--validation.steps", "1", "--evaluation.examples", "8"),
    *("--evaluation.pgd_steps", "2", "--evaluation.pgd_restarts", "1"),
    *("--evaluation.autoattack", "none"),
]


@pytest.fixture
def forget(monkeypatch):
    """Return a function that forgets what was imported and registered, as a new process would."""
    before = dict(base.OBJECTIVES)

    def call() -> None:
        monkeypatch.setattr(models, "_registered", {})
        monkeypatch.setattr(foreign, "_known", {})
        monkeypatch.setattr(plugins, "_imported", [])
        for register in (registers.optimisers, registers.loaders):
            monkeypatch.setattr(register, "_makers", {})
        sys.modules.pop("mynets", None)
        for name in base.OBJECTIVES.keys() - before.keys():
            del base.OBJECTIVES[name]

    monkeypatch.setattr(sys, "path", list(sys.path))
    call()
    yield call
    call()


@pytest.fixture
def outside(tmp_path, monkeypatch, forget):
    """A folder of the user's with mynets.py in it."""
    shutil.copy(Path(__file__).with_name("mynets.py"), tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_of_ones_own_network_and_objective(outside, forget, capsys):
    assert cli.run(["train", "quickstart", *FLAGS, *MINE, *SHORT, "--run-dir", "run"]) == 0
    run = outside / "run"
    assert json.loads((run / "environment.json").read_text())["imports"] == ["mynets"]
    assert 'name = "pairing"' in (run / "recipe.toml").read_text()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all("pairing" in row for row in rows)
    # In a new process, every command asks for the option, and none imports by itself.
    for words in (["eval"], ["export"], ["report"], ["train", "--resume"]):
        forget()
        capsys.readouterr()
        assert cli.run([*words, str(run)]) == 2
        assert capsys.readouterr().err == (
            "engine: objective 'pairing' is not known: it came from --import mynets; pass that "
            "option again\n"
        )
        assert "mynets" not in sys.modules
        forget()
        assert cli.run([*words, str(run), *FLAGS]) == 0
    forget()
    with pytest.raises(EngineError, match="unknown model 'my-net'"):
        models.build("my-net", in_channels=1, image_size=8, classes=3)


def test_the_network_alone_is_named_too(outside, forget):
    plugins.load(["mynets"])
    run = Run.create(recipes.load("quickstart", {"model.name": "my-net"}), outside / "run").path
    forget()
    with pytest.raises(EngineError, match="network 'my-net' is not known: it came from --import"):
        Run.open(run)
    # A stranger's folder may say anything there.
    for hint in (["os; rm"], "mynets", [3], None):
        (run / "environment.json").write_text(json.dumps({"imports": hint}))
        assert Run.open(run).recipe.model.name == "my-net"


def test_options_and_help_of_a_registered_objective(outside, forget, capsys):
    words = ["train", "quickstart", *FLAGS, "--objective.name", "pairing"]
    assert cli.run([*words, "--objective.weight", "0.3", "--help", "objective"]) == 0
    out = capsys.readouterr().out
    assert "--objective.weight" in out
    assert "0.3" in out
    assert "weight of the pairing term" in out
    assert cli.run(["train", *FLAGS, "--help", "model"]) == 0
    assert "my-net" in capsys.readouterr().out
    for option, value, said in (
        ("weight", "-1", "objective.weight: must be greater than or equal to 0, got '-1'"),
        ("wait", "1", "did you mean --objective.weight?"),
    ):
        assert cli.run([*words, f"--objective.{option}", value, "--run-dir", "no"]) == 2
        assert said in capsys.readouterr().err
    recipe = recipes.load("quickstart", {"objective.name": "pairing", "objective.weight": "0.3"})
    assert recipes.parse(tomllib.loads(recipes.dump(recipe))) == recipe


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "there is no module 'broken' in this folder or this Python"),
        ("import nowhere_at_all", r"No module named 'nowhere_at_all' \(broken.py, line 1\)"),
        ("x = 1\nraise ValueError('no\\nluck')", r"ValueError: no luck \(broken.py, line 2\)"),
        ("def f(:", "SyntaxError"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("import engine\nengine.models.register('resnet18')(print)", "there is a network 'res"),
        ("import engine\nengine.objectives.register(int)", "is no objective"),
        (
            "import engine\nengine.optimisers.register('sgd')(print)",
            "the optimiser 'sgd' exists already",
        ),
        ("import engine\nengine.loaders.register(' ')(print)", "name of a loader is a plain word"),
    ],
)
def test_an_import_that_fails_gives_one_line(text, said, outside, capsys):
    if text is not None:
        (outside / "broken.py").write_text(text)
    sys.modules.pop("broken", None)
    assert cli.run(["train", "quickstart", "--import", "broken", "--run-dir", "run"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("engine: --import broken: ")
    assert re.search(said, err)
    assert err.count("\n") == 1
    assert not (outside / "run").exists()


def test_a_path_is_no_module(outside):
    for name in ("mynets.py", "./mynets", "a b", ""):
        with pytest.raises(EngineError, match="give a module's name, not a path"):
            plugins.load([name])


def test_a_file_of_the_folder_hides_no_module_of_pythons(outside):
    (outside / "colorsys.py").write_text("raise RuntimeError")
    sys.modules.pop("colorsys", None)
    plugins.load(["mynets", "colorsys"])


def test_the_engines_own_objectives_are_registered():
    assert recipes.objectives() == objectives.OBJECTIVES
    with pytest.raises(EngineError, match="already"):
        objectives.register(objectives.PGD)


def test_processes_of_a_run_import_the_same(outside):
    plugins.load(["mynets"])
    plugins.load(["mynets"])
    assert plugins.words() == ["--import", "mynets"]


@pytest.mark.parametrize("part", ["GroupNorm", "BatchNorm2d", "replaced buffer", "F.dropout"])
def test_the_capture_audit_of_a_registered_network(part, forget):
    """GroupNorm, BatchNorm and dropout can be captured; the audit names what cannot be."""

    class Net(nn.Module):
        def __init__(self, channels, size, classes):
            super().__init__()
            norm = nn.BatchNorm2d(8) if part == "BatchNorm2d" else nn.GroupNorm(2, 8)
            conv = nn.Conv2d(channels, 8, 3, padding=1)
            self.net = nn.Sequential(
                conv, norm, nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(2)
            )
            self.head = nn.Linear(32, classes)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            h = self.net(x).flatten(1)
            if part == "replaced buffer" and self.training:
                self.seen = self.seen + 1
            if part == "F.dropout":
                h = nn.functional.dropout(h, 0.5, self.training)
            return self.head(h)

    models.register("audited")(Net)
    found = capture_audit.audit(recipes.load("quickstart", {"model.name": "audited"}))
    said = {
        "replaced buffer": "moved in memory between steps",
        "F.dropout": "draws random numbers from a generator",
    }
    if part in said:
        assert any(said[part] in line for line in found.complaints), found.complaints
    else:
        assert found.complaints == []


LION = ["--optim.name", "lion", "--optim.lr", "1e-3", "--data.loader", "in-order"]


def test_an_optimiser_and_a_loader_of_ones_own_resume_bit_for_bit(outside, forget, capsys):
    words = ["train", "quickstart", *FLAGS, *LION, *SHORT, "--no-eval", "--threads", "1"]
    words += ["--optim.ema", "0.9", "--checkpoint.seconds", "0", "--checkpoint.keep", "3"]
    assert cli.run([*words, "--run-dir", "whole"]) == 0
    assert cli.run([*words, "--run-dir", "cut"]) == 0
    cut = outside / "cut"
    # As if it had been stopped after its first step.
    steps = sorted((cut / "checkpoints").glob("*.json"))
    for path in steps[1:]:
        path.unlink()
    (cut / "summary.json").unlink()
    forget()
    capsys.readouterr()
    assert cli.run(["train", "--resume", "cut", "--no-eval"]) == 2
    assert "optimiser 'lion' is not known: it came from --import mynets" in capsys.readouterr().err
    forget()
    assert cli.run(["train", "--resume", "cut", "--no-eval", *FLAGS]) == 0
    a, b = (load_file(outside / run / "last.safetensors") for run in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_name_that_nobody_registered(outside, capsys):
    for option, given, said in (
        ("optim.name", "adamv", "did you mean 'adamw'?"),
        ("data.loader", "in-order", "must be one of auto, resident, dali, torch, null"),
    ):
        assert cli.run(["train", "quickstart", f"--{option}", given, "--run-dir", "no"]) == 2
        assert said in capsys.readouterr().err
    plugins.load(["mynets"])
    assert cli.run(["train", "quickstart", "--help", "optim"]) == 0
    assert "lion" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("register", "option", "said"),
    [
        ("optimisers", "optim.name", "returned no torch.optim.Optimizer"),
        ("loaders", "data.loader", "returned no engine.data.loaders.Loader"),
    ],
)
def test_a_maker_that_returns_something_else(outside, capsys, register, option, said):
    (outside / "wrong.py").write_text(
        f"import engine\nengine.{register}.register('odd')(lambda *a, **k: 3)\n"
    )
    sys.modules.pop("wrong", None)
    words = ["train", "quickstart", "--import", "wrong", f"--{option}", "odd", *SHORT]
    assert cli.run([*words, "--run-dir", "run"]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_foreign_network_is_planned_and_profiled(outside, capsys):
    assert cli.run(["plan", "quickstart", *FLAGS, *MINE, "--gpu", "h100", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["step_ms"] > 0
    assert cli.run(["plan", "quickstart", *FLAGS, "--optim.name", "lion", "--gpu", "h100"]) == 0
    assert "optim.name = lion at the price of adamw" in capsys.readouterr().out
    words = ["quickstart", *FLAGS, *MINE, *SHORT[:4], "--steps", "2", "--json"]
    assert cli.run(["profile", *words]) == 0
    assert min(json.loads(capsys.readouterr().out)["step_ms"]) > 0


def test_methods_of_ones_own_are_compared(outside, capsys):
    """Each training of a comparison is a process of its own, which must import the module too."""
    (outside / "mine.toml").write_text(
        'extends = "quickstart"\nname = "mine"\n[model]\nname = "my-net"\n'
        '[objective]\nname = "pairing"\n[optim]\nname = "lion"\nlr = 1e-3\n'
    )
    words = ["compare", "mine.toml", *FLAGS, "--seeds", "1", "--out", "compared", *SHORT]
    assert cli.run(words) == 0
    runs = [path.parent for path in (outside / "compared").rglob("recipe.toml")]
    assert runs
    text = (runs[0] / "recipe.toml").read_text()
    assert 'name = "pairing"' in text
    assert 'name = "lion"' in text


@pytest.mark.slow
def test_processes_that_share_a_run_import_the_module_too(outside):
    words = ["train", "quickstart", *FLAGS, *MINE, *LION, *SHORT, "--nproc", "2", "--no-eval"]
    command = [sys.executable, "-m", "engine", *words, "--run-dir", "run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=outside)
    assert done.returncode == 0, done.stderr
    assert (outside / "run" / "best.safetensors").exists()
