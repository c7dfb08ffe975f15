"""Test what only a CUDA device can show: `make test-gpu`.

On the CPU other tests stand in for these, with a tape in place of a graph.
"""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch

from engine import Attack, Linf, LocalBall, Schedule, cli
from engine.adversary.memory import AdversaryMemory
from engine.data import loaders
from engine.data.loaders import ResidentLoader, dali
from engine.device.capture import CudaGraphs
from engine.training.optimiser import Optimiser
from engine.training.step import Step

from ..conftest import Tiny, blobs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")
STEPS = 16


@pytest.fixture
def graphs():
    with CudaGraphs(DEVICE) as recorder:
        yield recorder


@pytest.fixture(autouse=True)
def repeatable(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def make(model, *, where=DEVICE, optimiser="sgd", memory=False, objective=None, **options) -> Step:
    """A step and the loader of its batches."""
    model = copy.deepcopy(model).to(where).train()
    images, labels = (t.to(where) for t in blobs(64))
    threat = Linf(0.1)
    remembered = None
    if memory:
        remembered = AdversaryMemory(64, images.shape[1:], threat, seed=5, device=where)
    step = Step(
        model,
        objective=objective or LocalBall(global_weight=0.5),
        threat=threat,
        attack=Attack(steps=2, start="memory" if memory else "random"),
        optimiser=Optimiser(
            model, lr=Schedule().rates(0.05, STEPS), name=optimiser, weight_decay=1e-3, ema=0.9
        ),
        memory=remembered,
        seed=5,
        device=where,
        **options,
    )
    step.loader = ResidentLoader(images, labels, 16, seed=5, pad=1, flip=True, memory=remembered)
    return step


def train(step: Step, steps: int = STEPS) -> Step:
    epoch = step.done // len(step.loader)
    while step.done < steps:
        for batch in step.loader.epoch(epoch):
            if step.done < steps:
                step(batch)
        epoch += 1
    return step


def assert_close(ours: Step, theirs: Step, *, rtol: float = 1e-4) -> None:
    mine, yours = ours.tensors(), theirs.tensors()
    assert mine.keys() == yours.keys()
    for name, t in mine.items():
        if t.is_floating_point():
            torch.testing.assert_close(t.cpu(), yours[name].cpu(), atol=1e-5, rtol=rtol, msg=name)


def network() -> Tiny:
    torch.manual_seed(0)
    return Tiny(batch_norm=True)


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
@pytest.mark.parametrize("optimiser", ["sgd", "adamw", "torch-sgd", "torch-adamw"])
def test_a_replayed_step_is_the_eager_step(graphs, optimiser, precision, memory):
    model, how = network(), {"optimiser": optimiser, "precision": precision, "memory": memory}
    eager, captured = train(make(model, **how)), train(make(model, recorder=graphs, **how))
    assert captured.why_eager is None
    # The weights moved, and every replay drew numbers of its own.
    assert not torch.equal(captured.model.conv1.weight.cpu(), model.conv1.weight)
    assert_close(captured, eager)
    assert captured.state.tolist() == eager.state.tolist()


def test_the_device_trains_what_the_cpu_trains():
    model = network()
    here, there = make(model, precision="fp32"), make(model, where=torch.device("cpu"))
    assert_close(train(here, 4), train(there, 4), rtol=1e-2)


def test_a_captured_step_takes_its_own_batches(graphs):
    model = network()
    eager, captured = make(model), make(model, recorder=graphs)
    captured.take = captured.loader.take
    captured.loader.begin(0)
    for _ in range(len(captured.loader)):
        captured()
    assert captured.why_eager is None
    assert_close(captured, train(eager, captured.done))


def test_a_batch_of_another_size_runs_eagerly_and_the_graph_goes_on(graphs):
    model = network()
    eager, captured = make(model), make(model, recorder=graphs)
    for step in (eager, captured):
        first, second, *_ = (b for b in step.loader.epoch(0))
        step(first)
        step(type(second)(*(None if t is None else t[:7].clone() for t in second)))
        step(first)
    assert "a batch of 7 does not fit" in str(captured.why_eager)
    assert_close(captured, eager)


def test_a_capture_that_fails_says_what_went_wrong_first_and_training_goes_on(request):
    """Run in a process of its own: up to PyTorch 2.12 a failed capture spoils all later ones."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.device.failed_capture"],
        cwd=request.config.rootpath,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(dali.unavailable() is not None, reason=str(dali.unavailable()))
def test_dali_gives_the_resident_loaders_batches():
    draw = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (50, 3, 8, 6), dtype=torch.uint8, generator=draw)
    labels = torch.randint(0, 5, (50,), generator=draw)
    options = {"seed": 3, "pad": 2, "flip": True, "cutout": 3}
    epochs = (
        loaders.build(name, images, labels, 8, device=DEVICE, **options).epoch(1)
        for name in ("dali", "resident")
    )
    for ours, theirs in zip(*epochs, strict=True):
        torch.testing.assert_close(ours.x, theirs.x, atol=1e-6, rtol=0)
        for name in ("y", "samples", "crops"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


@pytest.mark.parametrize("compile", ["false", "true"])
def test_a_run_by_command_is_captured(tmp_path, capsys, compile):
    words = ["train", "quickstart", "--optim.epochs", "2", "--step.capture", "on", "--no-eval"]
    words += ["--step.compile", compile, "--run-dir", str(tmp_path / "run"), "--json"]
    assert cli.run(words) == 0
    said = capsys.readouterr()
    assert "without a CUDA graph" not in said.err


def test_profiles_and_audits_of_a_captured_recipe_are_written(tmp_path):
    words = ["quickstart", "--step.capture", "on"]
    assert cli.run(["profile", *words, "--steps", "5", "--out", str(tmp_path)]) == 0
    assert list(tmp_path.iterdir())
    assert cli.run(["doctor", "--capture", "quickstart"]) == 0
