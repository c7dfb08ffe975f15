"""Export and the checks for masked gradients: what others get, and what they can trust."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from engine import Attack, EngineError, Linf, cli, models
from engine import train as train_model
from engine.evaluation import masking
from engine.evaluation.robust_accuracy import evaluation_mode
from engine.runs.export import architecture_of, claim_of, export
from engine.runs.folder import Run, load_weights

from ..conftest import Tiny, blobs

QUICK = ["--evaluation.examples", "40", "--evaluation.autoattack", "none"]
QUICK += ["--evaluation.pgd_steps", "5", "--evaluation.pgd_restarts", "1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "run"
    words = ["train", "quickstart", "--optim.epochs", "4", "--run-dir", str(path), "--json", *QUICK]
    assert cli.run(words) == 0
    return Run.open(path)


def test_the_exported_weights_are_the_evaluated_ones(run, tmp_path, capsys):
    assert cli.run(["export", str(run.path), "--out", str(tmp_path / "out")]) == 0
    written = capsys.readouterr().out.split()
    assert [Path(p).name for p in written] == [
        "model.safetensors",
        "model.pt",
        "claim.json",
        "README.md",
    ]
    best = load_file(run.path / "best.safetensors")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    pickled = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert best.keys() == ours.keys() == pickled.keys()
    for name, t in best.items():
        assert torch.equal(t, ours[name])
        assert torch.equal(t, pickled[name])
    model = models.build("tiny-cnn", in_channels=1, image_size=8, classes=10)
    load_weights(model, tmp_path / "out" / "model.safetensors")


def test_the_claim_and_the_card_say_what_was_measured(run, tmp_path):
    export(run, tmp_path)
    claim = json.loads((tmp_path / "claim.json").read_text())
    found = run.read_json("evaluation.json")
    assert claim["clean_acc"] == found["clean_acc"]
    assert claim["dataset"] == "digits"
    # AutoAttack was not run: no number stands in its place.
    assert claim["autoattack_acc"] is None
    assert "has not been run" in claim["footnote"]
    card = (tmp_path / "README.md").read_text()
    assert f"| clean | {found['clean_acc']} |" in card
    assert "40 test images" in card
    assert "| AutoAttack" not in card
    assert "{{" not in card


def test_a_subset_is_no_claim_for_the_whole_test_set(run):
    found = {**run.read_json("evaluation.json"), "autoattack_version": "standard"}
    assert claim_of(run, found)["footnote"] == "first 40 test images only"
    whole = claim_of(run, {**found, "examples": 397})
    assert "footnote" not in whole or "397" in whole["footnote"]


def test_a_run_that_was_not_evaluated_is_refused(tmp_path, capsys):
    path = str(tmp_path / "run")
    words = ["train", "quickstart", "--optim.epochs", "1", "--run-dir", path, "--json", "--no-eval"]
    assert cli.run(words) == 0
    assert cli.run(["export", path]) == 2
    assert f"engine eval {path}" in capsys.readouterr().err


def robustbench(file: str):
    """RobustBench's own definition, its file alone: the package imports much more."""
    spec = importlib.util.find_spec("robustbench")
    if spec is None or spec.origin is None:
        pytest.skip("robustbench is not installed (make rivals)")
    path = Path(spec.origin).parent / "model_zoo" / file
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("resnet18", 10),
        ("preact-resnet18", 10),
        ("preact-resnet18", 100),
        pytest.param("wide-resnet34-10", 100, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("normalised", [False, True])
def test_robustbench_loads_the_weights_without_renaming(name, classes, normalised):
    """Into what the model card says builds it."""
    torch.manual_seed(0)
    options = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)} if normalised else {}
    ours = models.build(name, in_channels=3, image_size=32, classes=classes, **options).eval()
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    file, call = architecture_of(name, classes)
    network = eval(call, vars(robustbench(file))).eval()
    x = torch.rand(2, 3, 32, 32)
    inside = x
    if normalised:
        # As its Wong2020Fast: buffers of these names, applied before the network.
        network.register_buffer("mu", torch.zeros(1, 3, 1, 1))
        network.register_buffer("sigma", torch.zeros(1, 3, 1, 1))
    network.load_state_dict(ours.state_dict(), strict=True)
    if normalised:
        inside = (x - network.mu) / network.sigma
    with torch.no_grad():
        torch.testing.assert_close(network(inside), ours(x), rtol=1e-4, atol=1e-4)


def test_a_thin_network_is_not_said_to_be_robustbenchs():
    assert architecture_of("resnet18", 10, 64) == architecture_of("resnet18", 10)
    assert architecture_of("resnet18", 10, 16) is None


class Rounded(nn.Module):
    """The textbook's masked gradient: levels, whose derivative is nothing."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner((4 * x).round() / 4 + 0.0 * x)


@pytest.fixture(scope="module")
def trained():
    images, labels = blobs(256)
    torch.manual_seed(0)
    model = Tiny()
    train_model(model, (images, labels), Linf(0.15), epochs=6, lr=0.1, attack=Attack(steps=2))
    x, y = blobs(100, seed=7)
    return model, x.float() / 255, y


def test_an_honest_network_passes(trained):
    model, x, y = trained
    with evaluation_mode(model):
        found = masking.checks(model, x, y, Linf(0.2))
    assert all(check.ok for check in found), found
    assert len(found) == 5


def test_a_masked_gradient_is_noticed(trained):
    model, x, y = trained
    masked = Rounded(model)
    with evaluation_mode(masked):
        found = {c.name: c for c in masking.checks(masked, x, y, Linf(0.35), surrogate=model)}
    failed = {name for name, check in found.items() if not check.ok}
    assert "unbounded" in failed
    assert any("Square" in name for name in failed)
    assert any("transferred" in name for name in failed)


def test_masking_by_command(run, tmp_path, capsys):
    words = ["eval", str(run.path), "--masking", "--transfer", str(run.path), "--json"]
    status = cli.run([*words, "--evaluation.examples", "40"])
    found = json.loads(capsys.readouterr().out)
    assert status == (0 if found["passed"] else 1)
    assert found["examples"] == 40
    assert found["surrogate"] == "quickstart"
    assert "Is the gradient honest?" in (run.path / "report.html").read_text()
    export(run, tmp_path)
    assert "Checks for gradient masking" in (tmp_path / "README.md").read_text()
    assert cli.run(["eval", str(run.path), "--transfer", str(run.path)]) == 2
    assert "--masking" in capsys.readouterr().err


def test_export_needs_no_more_than_the_run(run, tmp_path):
    """From another folder, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "engine", "export", str(run.path), "--out", "here"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "here" / "README.md").exists()


def test_a_surrogate_of_another_dataset_is_refused(run, tmp_path, monkeypatch):
    from engine.runs import evaluate

    other = Run(tmp_path, run.recipe.__class__())
    object.__setattr__(other.recipe, "data", run.recipe.data.__class__(name="mnist"))
    with pytest.raises(EngineError, match="one dataset"):
        evaluate.check_masking(run, surrogate=other)
