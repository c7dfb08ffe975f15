"""Runs on folders of JPEGs of all sizes: to the end, killed, and by two processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine import cli
from engine.data.loaders import dali
from engine.evaluation import robust_accuracy
from engine.models import sources
from engine.runs import evaluate, images
from engine.runs.folder import Run

from ..data.generated import folder
from .soak import KILLED, differing, rows

needs_dali = pytest.mark.skipif(dali.unavailable() is not None, reason="DALI is not installed")
NO_TIMM = sources.unavailable("timm/resnet18")
needs_timm = pytest.mark.skipif(NO_TIMM is not None, reason=str(NO_TIMM))
LOADERS = [pytest.param("dali", marks=needs_dali), "torch"]
SMALL = [
    *("--attack.start", "random", "--attack.steps", "1", "--objective.name", "n-fgsm"),
    *("--optim.batch_size", "20", "--data.flip", "true", "--data.validation", "20"),
    *("--validation.steps", "1", "--evaluation.pgd_steps", "2", "--evaluation.pgd_restarts", "1"),
    *("--evaluation.autoattack", "apgd", "--evaluation.judge", "engine", "--threads", "1"),
    *("--data.workers", "1", "--threat.eps", "4/255", "--model.name", "fast-at-mnist"),
]


@pytest.fixture(autouse=True)
def _root(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("ENGINE_DATA", str(tmp_path_factory.getbasetemp() / "photo-data"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return folder(tmp_path_factory.mktemp("photos") / "flowers", train=20, test=2)


def words(photos: Path, run: Path, size: int, *more: str) -> list[str]:
    start = ["quickstart", "--data.name", str(photos), "--data.size", str(size)]
    return [*start, *SMALL, "--run-dir", str(run), *more]


def _cases(*cases: tuple[str, int, str], slow: bool = False) -> list[Any]:
    """Return the parameters of cases (network, size, loader) with their marks."""
    found = []
    for case in cases:
        marks = [pytest.mark.slow] if slow else []
        marks += [needs_dali] if case[2] == "dali" else []
        found.append(pytest.param(*case, marks=marks))
    return found


def trains_to_its_report(
    photos: Path, run: Path, capsys: pytest.CaptureFixture[str], *more: str, size: int, steps: int
) -> None:
    """Train on the folder, evaluate, and look at what the run leaves."""
    options = ["--data.scale", "0.25,1", "--data.jitter", "0.2", "--optim.epochs", "1"]
    options += ["--model.normalise", "true", "--evaluation.batch_size", "4", *more]
    assert cli.run(["train", *words(photos, run, size, *options), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"] == steps
    assert 0 <= found["pgd"] <= found["clean"] <= 1
    (row,) = rows(run)
    assert 0 <= row["val_pgd"] <= row["val_clean"] <= 1
    assert (run / "report.html").stat().st_size > 10_000
    assert "flowers" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("network", "size", "loader"),
    [
        # Each pair of two choices is among the first four.
        *_cases(("photo-conv", 64, "dali"), ("photo-conv", 224, "torch")),
        *_cases(("photo-vit", 64, "torch"), ("photo-vit", 224, "dali")),
        *_cases(("photo-conv", 64, "torch"), ("photo-conv", 224, "dali"), slow=True),
        *_cases(("photo-vit", 64, "dali"), ("photo-vit", 224, "torch"), slow=True),
    ],
)
def test_a_folder_of_jpegs_trains_to_its_report(photos, tmp_path, capsys, network, size, loader):
    # The report's pictures take as long as all the rest.
    examples, attack = ("6", "apgd") if size == 64 else ("2", "none")
    options = ["--data.loader", loader, "--model.name", network]
    options += ["--import", "tests.runs.photo_nets"]
    options += ["--evaluation.examples", examples, "--evaluation.autoattack", attack]
    trains_to_its_report(photos, tmp_path / "run", capsys, *options, size=size, steps=9)


@needs_timm
@pytest.mark.parametrize(
    ("network", "size", "loader"),
    [
        # As above; together they take under a minute of two cores, most of it for the reports.
        *_cases(("timm/resnet18", 64, "dali"), ("timm/resnet18", 224, "torch")),
        *_cases(("timm/test_vit", 64, "torch"), ("timm/test_vit", 224, "dali")),
        *_cases(("timm/resnet18", 64, "torch"), ("timm/resnet18", 224, "dali"), slow=True),
        *_cases(("timm/test_vit", 64, "dali"), ("timm/test_vit", 224, "torch"), slow=True),
    ],
)
def test_a_folder_of_jpegs_trains_timms_networks(photos, tmp_path, capsys, network, size, loader):
    options = ["--data.loader", loader, "--model.name", network]
    options += ["--evaluation.examples", "2", "--evaluation.autoattack", "none"]
    steps = 9
    if size == 224:
        # A step of resnet18 on 20 such images takes seconds.
        options += ["--data.train_examples", "40", "--data.validation", "4"]
        steps = 2
    trains_to_its_report(photos, tmp_path / "run", capsys, *options, size=size, steps=steps)


@pytest.mark.parametrize("loader", LOADERS)
def test_a_run_that_is_killed_in_mid_epoch_goes_on_with_the_same_batches(
    photos, tmp_path, loader, capsys
):
    options = ["--data.loader", loader, "--data.scale", "0.25,1", "--data.jitter", "0.2"]
    options += ["--optim.epochs", "2", "--no-eval", "--checkpoint.seconds", "0"]
    assert cli.run(["train", *words(photos, tmp_path / "whole", 64, *options)]) == 0
    cut = tmp_path / "cut"
    command = [sys.executable, "-c", KILLED, "train", *words(photos, cut, 64, *options)]
    environment = {**os.environ, "KILL_AT": "12"}
    killed = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    steps = sorted(int(p.stem) for p in (cut / "checkpoints").glob("*.json"))
    # The second epoch's steps are 10 to 18.
    assert 9 < steps[-1] < 18
    assert cli.run(["train", "--resume", str(cut), "--no-eval"]) == 0
    assert not differing(rows(tmp_path / "whole"), rows(cut))
    a, b = (load_file(p / "last.safetensors") for p in (tmp_path / "whole", cut))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="no torch.distributed")
def test_two_processes_see_each_file_once_an_epoch(photos, tmp_path):
    """Two processes over gloo write down the samples of their batches."""
    options = ["--data.loader", "auto", "--data.scale", "0.25,1", "--optim.epochs", "1"]
    options += ["--nproc", "2", "--no-eval"]
    seen = tmp_path / "seen"
    seen.mkdir()
    # torchrun starts its processes by `-m engine`; sitecustomize reaches each of them.
    (tmp_path / "sitecustomize.py").write_text(_NOTED)
    path = os.pathsep.join([str(tmp_path), str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "SEEN": str(seen), "PYTHONPATH": path}
    command = [sys.executable, "-m", "engine", "train"]
    done = subprocess.run(
        [*command, *words(photos, tmp_path / "run", 64, *options)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    parts = [json.loads((seen / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert len(parts[0]) == len(parts[1]) == 90
    # 180 training pictures in batches of 20.
    assert sorted(parts[0] + parts[1]) == list(range(180))


_NOTED = """
import os
if "RANK" in os.environ:
    import atexit, json
    from engine.data.loaders import streamed
    seen, batch = [], streamed.PhotoLoader.batch
    def noted(self, *arguments):
        made = batch(self, *arguments)
        seen.extend(made.samples.tolist())
        return made
    streamed.PhotoLoader.batch = noted
    def write():
        place = os.path.join(os.environ["SEEN"], os.environ["RANK"] + ".json")
        with open(place, "w") as file:
            json.dump(seen, file)
    atexit.register(write)
"""


def test_an_evaluation_in_parts_agrees_with_one_of_the_whole(photos, tmp_path, monkeypatch, capsys):
    """Never more than a part is in memory; clean accuracy and PGD's are those of the whole set."""
    options = ["--data.scale", "0.5,1", "--optim.epochs", "2", "--no-eval", "--optim.lr", "0.01"]
    options += ["--data.loader", "torch", "--evaluation.batch_size", "4"]
    assert cli.run(["train", *words(photos, tmp_path / "run", 32, *options)]) == 0
    run = Run.open(tmp_path / "run")
    monkeypatch.setattr(images, "_PART_NUMBERS", 8 * 3 * 32 * 32)
    held = []
    judge = robust_accuracy.JUDGES["engine"]

    def counted(model, x, *rest, **options):
        held.append(len(x))
        return judge(model, x, *rest, **options)

    monkeypatch.setitem(robust_accuracy.JUDGES, "engine", counted)
    report = evaluate.evaluate_run(run)
    assert held == [8, 8, 4]
    assert report.examples == 20
    x, y = images.test_set(run.recipe)
    whole = robust_accuracy.evaluate(
        evaluate.load_model(run),
        x,
        y,
        run.recipe.threat,
        pgd_steps=2,
        pgd_restarts=1,
        autoattack_version="apgd",
        judge="engine",
        batch_size=4,
    )
    assert report.clean == whole.clean > 0
    assert report.after.keys() == whole.after.keys()
    assert report.autoattack == pytest.approx(whole.autoattack, abs=0.11)
    assert report.after["apgd-t"] == pytest.approx(report.autoattack)


def test_a_damaged_file_stops_a_run_before_its_folder_exists(tmp_path, capsys, caplog):
    path = folder(tmp_path / "set", classes=2, train=12, test=2)
    (path / "train/class0/3.jpg").write_text("no picture")
    run = tmp_path / "run"
    options = ["--data.loader", "torch", "--optim.epochs", "1", "--no-eval"]
    options += ["--optim.batch_size", "8", "--data.validation", "4"]
    assert cli.run(["train", *words(path, run, 32, *options)]) == 2
    line = capsys.readouterr().err
    assert "train/class0/3.jpg: no picture in it" in line
    assert line.count("\n") == 1
    assert not run.exists()
    assert cli.run(["train", *words(path, run, 32, *options, "--data.damaged", "skip")]) == 0
    assert caplog.text.count("3.jpg") == 1
