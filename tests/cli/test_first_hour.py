"""The first hour with the engine: one's own small data, few classes, help, tables, raw arrays."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import engine
from engine import EngineError, Linf, cli, models, recipes
from engine.cli import train_help
from engine.data import own
from engine.progress import TrainingBar, bar
from engine.runs import images as run_images
from engine.runs.folder import Run

from ..conftest import Foreign, Tiny, blobs

SMALL = ["--optim.epochs", "1", "--optim.batch_size", "32", "--threads", "1"]
SMALL += [
    "--evaluation.pgd_steps",
    "3",
    "--evaluation.pgd_restarts",
    "1",
    "--validation.steps",
    "1",
]


def written(path, classes: int, train: int = 240, test: int = 60):
    """A set of 8x8 images in one file; each class has a bright column of its own."""
    draw = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", train), ("test", test)):
        labels = np.arange(count) % classes
        pixels = draw.integers(0, 60, (count, 8, 8))
        for row, label in zip(pixels, labels, strict=True):
            row[:, 2 * label : 2 * label + 2] += 180
        arrays |= {f"{split}_images": pixels.astype(np.uint8), f"{split}_labels": labels}
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A run on two classes with the counts of a larger set, and the lines on stderr."""
    folder = tmp_path_factory.mktemp("two")
    data = written(folder / "cells.npz", classes=2)
    words = ["train", "cifar10", "--data.name", str(data), "--model.name", "tiny-cnn"]
    words += ["--model.normalise", "true", "--data.pad", "1", "--evaluation.examples", "200"]
    command = [sys.executable, "-m", "engine", *words, *SMALL]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "runs").iterdir()
    return run, done


def test_two_classes_are_trained_evaluated_and_exported(two, capsys):
    run, done = two
    assert "2 classes" in done.stderr.splitlines()[2]
    named = "apgd-ce, apgd-difference, fab-t, square"
    assert named in done.stderr
    found = json.loads((run / "evaluation.json").read_text())
    assert ", ".join(found["autoattack_attacks"]) == named
    assert found["autoattack_acc"] is not None
    assert named in (run / "report.html").read_text()
    assert named in done.stdout
    assert cli.run(["export", str(run)]) == 0
    assert named in (run / "export" / "README.md").read_text()
    claim = json.loads((run / "export" / "claim.json").read_text())
    assert claim["autoattack_acc"] is None
    assert cli.run(["eval", str(run), *SMALL[-6:-2]]) == 0
    assert cli.run(["train", "--resume", str(run)]) == 0


def test_counts_beyond_the_data_become_what_there_is(two):
    run, done = two
    assert "data.validation = 1000, but" in done.stderr
    assert "240 training images: 48 of them, a fifth, are held out" in done.stderr
    assert "evaluation.examples = 200, but" in done.stderr
    assert json.loads((run / "evaluation.json").read_text())["examples"] == 60


def test_a_run_on_ones_own_data_is_called_after_it(two):
    run, _ = two
    assert re.fullmatch(r"cells-\d{8}-\d{6}", run.name)
    named = recipes.load("cifar10", {"data.name": "/a/b/cells", "name": "mine"})
    assert named.name == "mine"


def test_the_closing_table_fits_80_columns_and_names_the_next_command(two):
    run, done = two
    table = done.stdout.splitlines()
    assert max(len(line) for line in table if str(run.name) not in line) <= 80
    assert "± " in done.stdout
    assert "8/255 (Linf)" in done.stdout
    assert any(line.split()[:3] == ["next", "engine", "export"] for line in table)
    # A path stands on its line in one piece.
    assert any(line.split()[-1:] == [f"runs/{run.name}/report.html"] for line in table)


def test_engine_load_gives_the_network_back_without_the_data(two, monkeypatch):
    run, _ = two
    monkeypatch.setattr(run_images, "_load", lambda *_: pytest.fail("read the data"))
    model = engine.load(run)
    assert not model.training
    assert model(torch.rand(3, 1, 8, 8)).shape == (3, 2)
    weights = load_file(run / "best.safetensors")
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())
    with pytest.raises(EngineError, match="not a run folder"):
        engine.load(run.parent)


def test_the_model_cards_code_builds_and_loads_the_network(two, monkeypatch):
    run, _ = two
    assert cli.run(["export", str(run)]) == 0
    monkeypatch.chdir(run / "export")
    (code,) = re.findall(r"```python\n(.*?)```", (run / "export" / "README.md").read_text(), re.S)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    x = torch.rand(3, 1, 8, 8)
    # The layouts of the weights differ, so the last bits may.
    torch.testing.assert_close(names["model"](x), engine.load(run)(x))


@pytest.mark.parametrize(("text", "count"), [("0.1", 24), ("30", 30), ("240", 48), ("1000", 48)])
def test_validation_is_a_count_or_a_share(text, count):
    recipe = recipes.load("quickstart", {"data.validation": text})
    assert recipe.data.held_out(240) == count
    assert recipes.parse(recipes.tree("quickstart")).data.held_out(10_000) > 1


# ---- weights to start from


@pytest.mark.parametrize("form", ["safetensors", "pt", "nested"])
def test_training_starts_from_a_file_of_weights(form, tmp_path):
    from engine.runs import build

    torch.manual_seed(5)
    weights = models.build("tiny-cnn", in_channels=1, image_size=8, classes=10).state_dict()
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pt")
    if form == "safetensors":
        save_file(weights, path)
    elif form == "pt":
        torch.save(weights, path)
    else:
        torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}}, path)
    recipe = recipes.load("quickstart", {"model.pretrained": str(path)})
    step, _ = build.prepare(recipe, 1)
    started = step.networks()[0].state_dict()
    assert all(torch.equal(started[name], t) for name, t in weights.items())


def test_weights_that_do_not_fit_give_one_line(tmp_path, capsys):
    other = models.build("tiny-cnn", in_channels=1, image_size=12, classes=10).state_dict()
    save_file(other, tmp_path / "width.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "network.safetensors")
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
    torch.save(Foreign(), tmp_path / "module.pt")
    for name, said in (
        ("width.safetensors", "another network"),
        ("network.safetensors", "another network"),
        ("damaged.safetensors", "damaged"),
        ("module.pt", "save model.state_dict()"),
        ("absent.pt", "absent.pt"),
        ("weights.onnx", ".safetensors, .pt, .pth"),
    ):
        words = ["train", "quickstart", "--model.pretrained", str(tmp_path / name)]
        words += ["--run-dir", str(tmp_path / "run")]
        assert cli.run(words) == 2
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", ["other classes", "no head"])
def test_a_head_of_other_classes_is_fresh_and_the_rest_is_the_files(file, tmp_path, caplog):
    from engine.runs import build

    torch.manual_seed(5)
    weights = models.build("tiny-cnn", in_channels=1, image_size=8, classes=3).state_dict()
    if file == "no head":
        weights = {name: t for name, t in weights.items() if not name.startswith("fc2")}
    save_file(weights, tmp_path / "w.safetensors")
    recipe = recipes.load("quickstart", {"model.pretrained": str(tmp_path / "w.safetensors")})
    step, _ = build.prepare(recipe, 1)
    started = step.networks()[0].state_dict()
    assert started["fc2.weight"].shape == (10, 64)
    same = [name for name in started if not name.startswith("fc2")]
    assert all(torch.equal(started[name], weights[name]) for name in same)
    assert "the head is fresh: fc2.bias, fc2.weight" in caplog.text


def test_the_fields_earlier_name_is_read_too(tmp_path):
    path = str(tmp_path / "w.pt")
    assert recipes.load("quickstart", {"model.init": path}).model.pretrained == path
    assert recipes.parse({"name": "old", "model": {"init": path}}).model.pretrained == path


# ---- help and tables


def test_help_is_grouped_lists_choices_and_fits_its_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.run(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    titles = re.findall(r"^\n?([a-z]+): ", out.partition("Fields of")[2], re.MULTILINE)
    assert titles == list(train_help._SECTIONS)
    for choice in ("local-ball", "one-cycle", "apex-lamb", "wide-resnet34-10", "standard, apgd"):
        assert choice in out
    every = [name for name, *_ in recipes.options()]
    assert all(f"--{name} " in out for name in every)
    assert all(description for _, _, _, description in recipes.options())


def test_help_for_one_section(capsys):
    assert cli.run(["train", "cifar10", "--help", "attack"]) == 0
    out = capsys.readouterr().out
    assert "--attack.steps" in out
    assert "--threat.eps" not in out
    assert cli.run(["train", "--help", "nothing"]) == 2
    assert "sections: data, model" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval", "compare"])
def test_help_names_the_evaluation_fields(command, capsys):
    with pytest.raises(SystemExit):
        cli.run([command, "--help"])
    assert "--evaluation." in capsys.readouterr().out


def test_stored_results_of_a_recipe(capsys):
    assert cli.run(["compare", "--from-store", "fashion-mnist-trades", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["objective"] for row in rows} == {"trades"}
    assert cli.run(["compare", "--from-store", "few", "--json"]) == 0
    assert {row["protocol"] for row in json.loads(capsys.readouterr().out)} == {"few"}
    assert cli.run(["compare", "--from-store", "cifar10"]) == 2
    assert "no stored result of cifar10" in capsys.readouterr().err


def test_stored_results_fit_80_columns_in_order_with_whole_names(capsys):
    assert cli.run(["compare", "--from-store"]) == 0
    out = capsys.readouterr().out
    assert cli.run(["compare", "--from-store", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    names = {line.split()[0].rstrip("*") for line in lines if line}
    assert {row["method"] for row in rows} <= names
    for block in out.split("\n\n"):
        budgets = [int(line.split()[2]) for line in block.splitlines()[2:] if line[:1] != "*"]
        assert budgets == sorted(budgets)


# ---- one's own images


def folder_of(path, split: str, size=(8, 8), sizes=None):
    for number, name in enumerate(("cat", "dog")):
        for i in range(3):
            file = path / split / name / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (sizes or {}).get((number, i), size), 40 * i).save(file)


def test_a_val_folder_serves_as_the_test_images(tmp_path, caplog):
    for split in ("train", "val"):
        folder_of(tmp_path, split)
    (images, _), names = own.read(tmp_path, "test")
    assert images.shape == (6, 1, 8, 8)
    assert names == ("cat", "dog")
    own.read(tmp_path, "test")
    said = [r.message for r in caplog.records if "val folder" in r.message]
    assert len(said) == 1
    folder_of(tmp_path, "test", size=(4, 4))
    own._test_folder.cache_clear()
    with pytest.raises(EngineError, match="one size"):
        own.read(tmp_path, "test")


def test_data_info_says_that_images_are_not_of_one_size(tmp_path, capsys):
    for split in ("train", "test"):
        folder_of(tmp_path / "wide", split, size=(12, 8))
        folder_of(tmp_path / "mixed", split, sizes={(0, 2): (9, 9)})
    assert cli.run(["data", "info", str(tmp_path / "wide")]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["shape"] == [1, 8, 12]
    assert not shown.err
    assert cli.run(["data", "info", str(tmp_path / "mixed")]) == 0
    assert "several sizes: --data.size 224 streams them" in capsys.readouterr().err
    assert cli.run(["train", "quickstart", "--data.name", str(tmp_path / "mixed")]) == 2
    assert "bring all images to one size, or stream them" in capsys.readouterr().err


# ---- the Python face


def test_arrays_train_and_evaluate_like_tensors():
    x, y = blobs(128)
    torch.manual_seed(0)
    model, same = Tiny(), Tiny()
    same.load_state_dict(model.state_dict())
    options = {"epochs": 1, "batch_size": 32, "lr": 0.1}
    engine.train(model, (x, y), Linf(0.1), **options)
    engine.train(same, (x.numpy(), y.numpy().astype(np.int32)), Linf(0.1), **options)
    for a, b in zip(model.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)
    floats = x.numpy() / 255
    checks = {"pgd_steps": 2, "pgd_restarts": 1, "autoattack_version": "none"}
    report = engine.evaluate(model, floats, y.numpy(), Linf(0.1), **checks)
    expected = engine.evaluate(model, x.float() / 255, y, Linf(0.1), **checks)
    assert (report.clean, report.pgd) == (expected.clean, expected.pgd)
    assert engine.attack(model, floats, y.numpy(), Linf(0.1)).shape == x.shape


def test_mistakes_in_python_give_one_line():
    data = blobs(64)
    sgd = torch.optim.SGD(Tiny().parameters(), lr=0.1)
    for model, options, said in (
        (Tiny().bfloat16(), {}, r"bfloat16: pass model\.float\(\)"),
        (Tiny(), {"optimiser": sgd}, "optimiser must be a name, not SGD"),
        (lambda x: x, {}, "torch.nn.Module, not function"),
    ):
        with pytest.raises(EngineError, match=said):
            engine.train(model, data, Linf(0.1), epochs=1, batch_size=32, **options)


def test_a_result_shows_itself_in_a_line():
    result = engine.train(Tiny(), blobs(64), Linf(0.1), epochs=1, batch_size=32)
    assert len(repr(result)) < 200
    assert "best_epoch=1" in repr(result)


# ---- long steps


def clock(monkeypatch, seconds_a_step: float):
    now = [0.0]
    monkeypatch.setattr("engine.progress.time.monotonic", lambda: now[0])

    def step() -> None:
        now[0] += seconds_a_step

    return step


def steps_shown(monkeypatch, capsys, seconds: float, count: int) -> list[str]:
    """The lines of a run of 2000 steps whose first `count` are made; stderr is no terminal."""
    means = lambda: {"loss": 1.0, "adv_accuracy": 0.5}  # noqa: E731
    tick = clock(monkeypatch, seconds)
    with bar() as progress:
        shown = TrainingBar(progress, "x", 1, 2000)
        assert progress.tasks[0].total == 2000
        for number in range(count):
            tick()
            shown.step(number + 1, 2000, means)
            if seconds >= 1:
                assert progress.tasks[0].completed == number + 1
    return [line for line in capsys.readouterr().err.splitlines() if line]


def test_a_long_run_is_announced_after_its_first_step(monkeypatch, capsys):
    lines = steps_shown(monkeypatch, capsys, 30.0, 5)
    assert "a step takes 30.0 s: this run takes about 16 h 40 min" in lines[0]
    assert "--optim.epochs 1" in lines[0]
    # A line a minute.
    assert [line.split("  ")[0] for line in lines[1:] if line.startswith("step")] == [
        "step 2 of 2,000",
        "step 4 of 2,000",
    ]


def test_a_short_run_is_not_announced(monkeypatch, capsys):
    assert steps_shown(monkeypatch, capsys, 0.1, 200) == []


def test_ctrl_c_is_answered_while_one_call_runs(tmp_path):
    """The line comes at once, although Python's own handler waits for the call to end."""
    code = (
        "import time, ctypes, sys\n"
        "from engine.training.signals import Watch\n"
        "with Watch() as watch:\n"
        "    print('ready', flush=True)\n"
        "    libc = ctypes.CDLL(None)\n"
        "    end = time.monotonic() + 3\n"
        "    while time.monotonic() < end:\n"
        "        libc.usleep(ctypes.c_uint(900_000))\n"
        "    print('stop', watch.stop, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, signal.SIGINT)
        began = time.monotonic()
        assert process.stderr.readline() == "\n"
        assert "stopping after this step" in process.stderr.readline()
        assert time.monotonic() - began < 2.5
        assert f"stop {int(signal.SIGINT)}" in process.stdout.read()
    assert process.returncode == 0


def test_run_is_a_run_folder(two):
    run, _ = two
    assert Run.open(run).recipe.data.name.endswith("cells.npz")
