"""Many processes as one: real processes that meet over gloo on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine import EngineError, cli
from engine.device import distributed
from engine.device.distributed import World, join
from engine.rng import of_rank

from ..runs.soak import differing, rows
from ..runs.test_resume import start, wait_for

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed"
)
# No draw that differs between the parts of a batch: adversaries start from the memory.
PLAIN = ["--objective.name", "pgd", "--attack.start", "memory", "--attack.steps", "2"]
PLAIN += ["--optim.batch_size", "64", "--threads", "1"]


def train(folder: Path, *words: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "engine", "train", *words, "--no-eval", "--json"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.mark.parametrize(
    "options",
    [
        ["--optim.name", "sgd", "--optim.lr", "0.05"],
        ["--data.loader", "torch", "--data.pad", "1", "--data.flip", "true", "--data.workers", "0"],
        ["--optim.name", "sgd", "--optim.lr", "0.05", "--weights.perturb", "0.005"],
    ],
    ids=["resident", "torch, crops", "perturbed weights"],
)
def test_two_processes_train_the_network_of_one(tmp_path, options):
    """After 52 steps, within the rounding of sums in another order."""
    words = ["quickstart", *PLAIN, *options, "--optim.epochs", "2", "--optim.batch_size", "50"]
    alone = train(tmp_path, *words, "--run-dir", "one")
    assert alone.returncode == 0, alone.stderr
    both = train(tmp_path, *words, "--run-dir", "two", "--nproc", "2")
    assert both.returncode == 0, both.stderr
    assert json.loads(both.stdout)["steps"] == json.loads(alone.stdout)["steps"] > 45
    assert "Traceback" not in both.stderr
    assert "Warning" not in both.stderr
    ours, theirs = (load_file(tmp_path / run / "last.safetensors") for run in ("two", "one"))
    for name, t in theirs.items():
        torch.testing.assert_close(ours[name], t, rtol=1e-3, atol=2e-4)
    for a, b in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["adv_accuracy"] == pytest.approx(b["adv_accuracy"], abs=0.01)
        assert a["val_clean"] == pytest.approx(b["val_clean"], abs=0.01)


def workers(run: str) -> list[int]:
    """The processes of a run that torchrun has started: those with a rank."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            environment = (path / "environ").read_bytes()
        except OSError:
            continue
        if run.encode() in words and b"\0RANK=" in environment:
            found.append((b"\0RANK=1\0" in environment, int(path.name)))
    return [pid for _, pid in sorted(found)]


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_comes_back_and_nothing_is_lost(tmp_path, rank):
    words = ["quickstart", *PLAIN, "--optim.epochs", "12", "--nproc", "2"]
    whole = train(tmp_path, *words, "--run-dir", "whole")
    assert whole.returncode == 0, whole.stderr
    words += ["--checkpoint.seconds", "0.02"]
    process = start(*words, "--run-dir", "broken", "--no-eval", cwd=tmp_path)
    try:
        wait_for(tmp_path / "broken" / "metrics.jsonl", process)
        os.kill(workers("broken")[rank], signal.SIGKILL)
        _, err = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert differing(rows(tmp_path / "broken"), rows(tmp_path / "whole")) == 0
    ours, theirs = (load_file(tmp_path / run / "last.safetensors") for run in ("broken", "whole"))
    assert all(torch.equal(t, ours[name]) for name, t in theirs.items())


def test_a_signal_to_the_launcher_stops_all_with_a_checkpoint(tmp_path):
    words = ["quickstart", "--optim.epochs", "400", "--nproc", "2", "--run-dir", "run"]
    process = start(*words, "--no-eval", cwd=tmp_path)
    try:
        wait_for(tmp_path / "run" / "metrics.jsonl", process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 143, err
    assert "Traceback" not in err
    assert "engine train --resume run" in err
    assert list((tmp_path / "run" / "checkpoints").glob("*.json"))


def test_mistakes_are_found_before_any_process_starts(tmp_path, capsys):
    words = ["train", "quickstart", "--run-dir", str(tmp_path / "run")]
    assert cli.run([*words, "--nproc", "3", "--optim.batch_size", "64"]) == 2
    assert "cannot be shared by 3" in capsys.readouterr().err
    assert cli.run([*words, "--nproc", "0"]) == 2
    assert "--nproc" in capsys.readouterr().err
    host = ["--attack.start", "memory", "--attack.memory", "host"]
    assert cli.run([*words, "--nproc", "2", *host]) == 2
    assert "attack.memory = host is for one process: drop --nproc" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert cli.run([*words, "--step.sync_batch_norm", "true"]) == 2
        assert "sync_batch_norm needs CUDA" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_shares_and_seeds():
    assert World(rank=1, size=4).share(128) == 32
    with pytest.raises(EngineError, match="take a multiple"):
        World(rank=1, size=3).share(128)
    assert of_rank(5, 0) == 5
    assert len({of_rank(5, rank) for rank in range(100)}) == 100
    assert all(0 <= of_rank((1 << 31) - 1, rank) < 1 << 63 for rank in range(100))


def test_nccl_is_told_its_device(monkeypatch):
    told = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda local: told.update(current=local))
    monkeypatch.setattr(
        torch.distributed,
        "init_process_group",
        lambda backend, **options: told.update(backend=backend, **options),
    )
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert join() == World(rank=5, size=8)
    assert (told["backend"], told["current"]) == ("nccl", 1)
    assert told["device_id"] == torch.device("cuda", 1)


@pytest.mark.parametrize("newer", [False, True])
def test_either_name_of_pytorchs_serves(monkeypatch, newer):
    """PyTorch 2.13 renamed a call and an option, and warns of the older names."""
    told = []

    class Parallel:
        def __init__(self, module, **options):
            told.append(options)

    class Older(Parallel):
        def __init__(self, module, broadcast_buffers=True, **options):
            super().__init__(module, broadcast_buffers=broadcast_buffers, **options)

    class Newer(Parallel):
        def __init__(self, module, broadcast_buffers=None, forward_sync_buffers=None, **options):
            assert broadcast_buffers is None
            super().__init__(module, forward_sync_buffers=forward_sync_buffers, **options)

    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(torch.nn.parallel, "DistributedDataParallel", Newer if newer else Older)
    distributed.averaged(torch.nn.Linear(2, 2), lambda *_: None)
    name = "forward_sync_buffers" if newer else "broadcast_buffers"
    assert told == [{name: False, "gradient_as_bucket_view": True}]

    def both(into, t):
        into.copy_(torch.cat([t, t + 1]))

    names = ("all_gather_single", "all_gather_into_tensor")
    for present, name in zip((newer, True), names, strict=True):
        if present:
            serves = both if name == names[0] or not newer else None
            monkeypatch.setattr(torch.distributed, name, serves, raising=False)
        else:
            monkeypatch.delattr(torch.distributed, name, raising=False)
    assert distributed.gather(torch.tensor([1, 5])).tolist() == [1, 5, 2, 6]
