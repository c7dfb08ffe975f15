"""Kill runs by SIGKILL between steps, resume them, and compare them with unbroken runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from engine import cli

from .soak import KILLED, differing, rows, same


def kill(run: Path, words: list[str], after: int) -> None:
    """Train into `run` in a process of its own, which dies after so many steps."""
    environment = {**os.environ, "KILL_AT": str(after)}
    command = [sys.executable, "-c", KILLED, "train", *words, "--no-eval", "--run-dir", str(run)]
    killed = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert killed.returncode == -signal.SIGKILL, killed.stderr


def check_resumes(whole: Path, cut: Path) -> None:
    """Resume `cut`; it must end with the weights and the log of `whole`."""
    assert cli.run(["train", "--resume", str(cut), "--no-eval"]) == 0
    assert not differing(rows(whole), rows(cut))
    ours, theirs = (load_file(run / "last.safetensors") for run in (cut, whole))
    assert same(ours, theirs)


def train(run: Path, words: list[str]) -> None:
    assert cli.run(["train", *words, "--no-eval", "--run-dir", str(run)]) == 0


@pytest.mark.parametrize("kill_at", [pytest.param(3, marks=pytest.mark.slow), 9])
def test_a_memory_on_the_host_survives_a_kill(tmp_path, kill_at, capsys):
    """A run is killed before its first checkpoint or after some: it ends as one on the device."""
    words = ["quickstart", "--data.train_examples", "128", "--optim.batch_size", "32"]
    words += ["--data.loader", "torch", "--data.workers", "0", "--data.pad", "1", "--threads", "1"]
    words += ["--attack.start", "memory", "--optim.epochs", "3", "--validation.steps", "1"]
    words += ["--checkpoint.seconds", "0" if kill_at == 9 else "1000"]
    train(tmp_path / "device", words)
    cut = tmp_path / "cut"
    kill(cut, [*words, "--attack.memory", "host"], kill_at)
    assert (cut / "memory" / "deltas.int8").stat().st_size == 128 * 64
    check_resumes(tmp_path / "device", cut)
    # The end needs no memory.
    assert not list((cut / "memory").iterdir())


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Make the current folder hold a colour set, set.npz, and extra images, extra.npz."""
    monkeypatch.setenv("ENGINE_DATA", str(tmp_path / "root"))
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)

    def images(count: int) -> np.ndarray:
        return draw.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)

    names = {"train": 80, "test": 20}
    arrays = {f"{name}_images": images(count) for name, count in names.items()}
    arrays |= {f"{name}_labels": np.arange(count) % 10 for name, count in names.items()}
    np.savez("set.npz", **arrays)
    np.savez("extra.npz", image=images(40), label=np.arange(40) % 10)
    return tmp_path


SMALL = ["--data.name", "set.npz", "--data.extra", "extra.npz", "--data.validation", "16"]
SMALL += ["--model.width", "4", "--optim.batch_size", "16", "--optim.epochs", "2"]
SMALL += ["--threads", "1", "--validation.steps", "1", "--checkpoint.seconds", "0"]
MEMORY = ["--attack.start", "memory", "--attack.memory", "host"]


@pytest.mark.parametrize(
    ("recipe", "options"),
    # Extra images, weight perturbation, CutMix and label smoothing together; and a memory that
    # holds the extra images too.
    [("cifar10-combined", []), ("cifar10-extra", [*MEMORY, "--weights.perturb", "0.005"])],
)
def test_a_recipe_with_extra_images_survives_a_kill(pictures, recipe, options, capsys):
    words = [recipe, *SMALL, *options]
    train(pictures / "whole", words)
    cut = pictures / "cut"
    # The second epoch has begun.
    kill(cut, words, 6)
    assert len(rows(cut)) == 1
    if options:
        assert (cut / "memory" / "deltas.int8").stat().st_size == (64 + 40) * 3 * 16 * 16
    assert not same(*(load_file(run / "last.safetensors") for run in (pictures / "whole", cut)))
    check_resumes(pictures / "whole", cut)
