"""Export and the checks for masked gradients: what others get, and what they can trust."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import resource
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from pyautoattack import AutoAttack
from safetensors.torch import load_file, save_file
from torch import nn

import engine
from engine import Attack, EngineError, Linf, cli, models
from engine import train as train_model
from engine.cli.export import FORMATS as OFFERED
from engine.evaluation import masking
from engine.evaluation.robust_accuracy import evaluation_mode
from engine.runs import graphs
from engine.runs.card import architecture_of, claim_of
from engine.runs.export import FORMATS, export
from engine.runs.folder import Run, load_weights
from engine.runs.images import test_set as images_of

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


def test_attacks_in_bf16_are_named_wherever_accuracies_are_shown(tmp_path, capsys):
    path = str(tmp_path / "run")
    words = ["train", "quickstart", "--optim.epochs", "1", "--run-dir", path, *QUICK]
    words += ["--evaluation.precision", "bf16"]
    assert cli.run([*words, "--evaluation.autoattack", "apgd"]) == 2
    assert "evaluation.judge = engine" in capsys.readouterr().err
    words += ["--evaluation.judge", "engine", "--evaluation.autoattack", "apgd"]
    assert cli.run([*words, "--evaluation.examples", "20"]) == 0
    assert "Attacks in bf16; adversaries verified in fp32." in capsys.readouterr().out
    run = Run.open(Path(path))
    assert run.read_json("evaluation.json")["precision"] == "bf16"
    assert "attacks in bf16, verified in fp32" in (run.path / "report.html").read_text()
    for format in ("robustbench", "hub"):
        export(run, tmp_path / format, format)
        card = (tmp_path / format / "README.md").read_text()
        assert "The attacks ran in bf16" in card
    assert "eps 0.15, attacks in bf16)" in card
    found = run.read_json("evaluation.json")
    standard = {"autoattack_version": "standard", "autoattack_attacks": [], "examples": 397}
    claim = claim_of(run, {**found, **standard, "autoattack_judge": "pyautoattack"})
    assert claim["footnote"] == "attacks in bf16, verified in fp32"


def test_a_run_that_was_not_evaluated_is_refused(tmp_path, capsys):
    path = str(tmp_path / "run")
    words = ["train", "quickstart", "--optim.epochs", "1", "--run-dir", path, "--json", "--no-eval"]
    assert cli.run(words) == 0
    assert cli.run(["export", path]) == 2
    assert f"engine eval {path}" in capsys.readouterr().err


def read(format, path):
    """A written graph as a stranger opens it: without this package."""
    if format == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (name,) = [i.name for i in session.get_inputs()]
        return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])
    if format == "torchscript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.load(path)
    return torch.export.load(path).module()


def exported(run, out, format):
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason=f"{package} is not installed")
    return export(run, out, format)


@pytest.mark.parametrize("format", ["onnx", "torchscript", "pt2"])
def test_a_graph_gives_the_networks_logits_for_any_batch(run, tmp_path, format):
    (path,) = exported(run, tmp_path / "out", format)
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, f"{path.name}.sha256"]
    subprocess.run(["sha256sum", "-c", f"{path.name}.sha256"], cwd=path.parent, check=True)
    network, written = engine.load(run.path), read(format, path)
    for count in (1, 2, 7):
        x = torch.rand(count, 1, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(written(x), network(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "torchscript", "pt2"])
@pytest.mark.parametrize("name", [n for n in models.MODELS if n != "tiny-cnn"])
def test_every_network_has_a_graph_in_every_format(name, format, tmp_path):
    channels, size = (1, 28) if name in ("fast-at-mnist", "small-cnn") else (3, 32)
    options = {"mean": [0.5] * channels, "std": [0.2] * channels}
    network = models.build(name, in_channels=channels, image_size=size, classes=10, **options)
    graphs.check_packages(format)
    graph, x = graphs.GRAPHS[format], torch.rand(3, channels, size, size)
    graph.write(network.eval(), x[:2], tmp_path / graph.file)
    with torch.no_grad():
        written = graph.read(tmp_path / graph.file)(x)
        torch.testing.assert_close(written, network(x), rtol=1e-4, atol=1e-4)


def test_the_command_offers_every_format():
    assert OFFERED == FORMATS


class Shifted(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) + 0.01


def test_a_file_with_other_logits_is_not_exported(run, tmp_path, monkeypatch, capsys):
    graph = graphs.GRAPHS["pt2"]
    wrong = dataclasses.replace(
        graph, write=lambda model, x, path: graph.write(Shifted(model), x, path)
    )
    monkeypatch.setitem(graphs.GRAPHS, "pt2", wrong)
    words = ["export", str(run.path), "--format", "pt2", "--out", str(tmp_path / "out")]
    assert cli.run(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "model.pt2 gives other logits than the network, by up to 0.01" in line
    assert list(tmp_path.iterdir()) == []


class Branching(nn.Module):
    """No exporter can follow a branch on the images' values."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) if x.sum() > 10 else self.model(-x)


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_a_network_that_cannot_be_exported_is_one_line(run, tmp_path, monkeypatch, capsys, format):
    if format == "onnx":
        pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    graph = graphs.GRAPHS[format]
    branching = dataclasses.replace(
        graph, write=lambda model, x, path: graph.write(Branching(model), x, path)
    )
    monkeypatch.setitem(graphs.GRAPHS, format, branching)
    words = ["export", str(run.path), "--format", format, "--out", str(tmp_path / "out")]
    assert cli.run(words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"engine: {format} cannot hold the network tiny-cnn: ")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_extra_is_one_line(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(graphs, "_ONNX", ("no_such_package", "torch"))
    words = ["export", str(run.path), "--format", "onnx", "--out", str(tmp_path / "out")]
    assert cli.run(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "needs no_such_package: pip install 'robust-engine[export]'" in line
    assert list(tmp_path.iterdir()) == []


def test_an_export_replaces_its_own_files_and_no_others(run, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "claim.json").write_text("old")
    export(run, tmp_path)
    names = {p.name for p in tmp_path.iterdir()}
    weights = {"model.safetensors", "model.pt"}
    sums = {f"{name}.sha256" for name in weights}
    assert names == {"notes.txt", "claim.json", "README.md"} | weights | sums
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert json.loads((tmp_path / "claim.json").read_text())["dataset"] == "digits"


@pytest.mark.parametrize("existing", [False, True])
def test_an_export_that_breaks_off_leaves_the_folder_alone(run, tmp_path, monkeypatch, existing):
    out = tmp_path / "out"
    if existing:
        out.mkdir()
        (out / "model.pt").write_text("old")

    def broken(*words, **more):
        raise EngineError("the disk is full")

    monkeypatch.setattr("engine.runs.export.model_card", broken)
    with pytest.raises(EngineError, match="disk is full"):
        export(run, out)
    assert [p.name for p in tmp_path.rglob("*")] == (["out", "model.pt"] if existing else [])


@contextlib.contextmanager
def disk_with_room_for(size: int):
    """Let no file grow beyond `size` bytes: a write fails as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_is_one_line(run, tmp_path, capsys, format):
    if format == "onnx":
        pytest.importorskip("onnx")
    # RobustBench's second file of weights, model.pt, is larger than its first.
    weights = (run.path / "best.safetensors").stat().st_size
    room = weights if format == "robustbench" else 1000
    words = ["export", str(run.path), "--format", format, "--out", str(tmp_path / "out")]
    with disk_with_room_for(room):
        status = cli.run(words)
    assert status == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("engine: ")]
    assert len(lines) == 1
    assert "cannot write" in lines[0]
    assert "Traceback" not in captured.err
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_folder_for_a_hub_is_loaded_without_its_run(run, tmp_path):
    written = export(run, tmp_path / "hub", "hub")
    assert [p.name for p in written] == ["model.safetensors", "config.json", "README.md"]
    x = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(engine.load(tmp_path / "hub")(x), engine.load(run.path)(x))
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["architecture"] == "tiny-cnn"
    assert config["num_classes"] == 10
    assert config["input_shape"] == [1, 8, 8]
    assert export(run, format="hub")[0] == run.path / "export" / "hub" / "model.safetensors"


def test_the_published_card_begins_with_the_measured_accuracies(run, tmp_path):
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    odd = dataclasses.replace(run.recipe, name='odd: "name" <b>')
    export(Run(run.path, odd), tmp_path, "hub")
    text = (tmp_path / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    about = yaml.safe_load(front)
    assert about["library_name"] == "robust-engine"
    assert {"adversarial-robustness"} <= set(about["tags"])
    assert about["license"] == "unknown"
    (model,) = about["model-index"]
    assert model["name"] == 'odd: "name" <b>'
    (result,) = model["results"]
    found = run.read_json("evaluation.json")
    values = {m["name"]: m["value"] for m in result["metrics"]}
    assert values["Clean accuracy"] == float(found["clean_acc"])
    (pgd,) = [name for name in values if name.startswith("Robust accuracy: PGD-5-1 (Linf, eps ")]
    assert values[pgd] == float(found["pgd_acc"])
    # AutoAttack was not run.
    assert not any("AutoAttack" in name for name in values)
    assert "engine.load" in body


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: c.pop("num_classes"), "is damaged"),
        (lambda c: c.update(input_shape=[1, 8]), "is damaged"),
        (lambda c: c.update(input_shape=[1, 8, 1 << 40]), "is damaged"),
        (lambda c: c.update(model=[3]), "is damaged"),
        (lambda c: c["model"].update(name="no-such"), "unknown model"),
        (lambda c: c["model"].update(surprise=1), "unknown field"),
        (lambda c: c.update(num_classes=7), "does not fit the network"),
    ],
)
def test_a_damaged_config_is_one_line(run, tmp_path, change, text):
    export(run, tmp_path, "hub")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    with pytest.raises(EngineError, match=text):
        engine.load(tmp_path)


def test_exported_weights_that_were_changed_are_refused(run, tmp_path):
    export(run, tmp_path, "hub")
    path = tmp_path / "model.safetensors"
    save_file({name: t + 1 for name, t in load_file(path).items()}, path)
    with pytest.raises(EngineError, match="SHA-256"):
        engine.load(tmp_path)


def test_the_authors_autoattack_gives_the_reported_figure_on_the_exported_network(tmp_path):
    """By the package alone, on the network that the card's code or `engine.load` builds."""
    path = tmp_path / "run"
    words = ["train", "quickstart", "--optim.epochs", "3", "--run-dir", str(path), "--json", *QUICK]
    words += ["--evaluation.autoattack", "standard", "--evaluation.examples", "16"]
    assert cli.run(words) == 0
    run = Run.open(path)
    export(run, tmp_path / "weights")
    network = models.build("tiny-cnn", in_channels=1, image_size=8, classes=10)
    state = torch.load(tmp_path / "weights" / "model.pt", weights_only=True)
    network.load_state_dict(state)
    x, y = images_of(run.recipe)
    judge = AutoAttack(network.eval(), norm="Linf", eps=run.recipe.threat.eps, seed=run.recipe.seed)
    adversaries, _ = judge.run_standard_evaluation(x, y, batch_size=500)
    assert float((adversaries - x).abs().max()) <= run.recipe.threat.eps + 1e-6
    claim = json.loads((tmp_path / "weights" / "claim.json").read_text())
    with torch.no_grad():
        robust = float((network(adversaries).argmax(1) == y).double().mean())
    assert f"{100 * robust:.2f}" == claim["autoattack_acc"]
    assert 0 < robust < 1
    export(run, tmp_path / "hub", "hub")
    with torch.no_grad():
        loaded = engine.load(tmp_path / "hub")(adversaries)
    assert float((loaded.argmax(1) == y).double().mean()) == robust


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
    alone = ["eval", str(run.path), "--masking", "--json", "--evaluation.examples", "40"]
    assert cli.run(alone) in (0, 1)
    assert "transferred" not in capsys.readouterr().out
    page = (run.path / "report.html").read_text()
    assert "weaker attack does better" in page
    assert "carried over" not in page
    words = [*alone, "--transfer", str(run.path)]
    status = cli.run(words)
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
