"""Networks of timm and torchvision: their stem, their training, fine-tuning, capture.

Both packages import beside a PyTorch of their own release only; `make matrix` installs them there.
"""

from __future__ import annotations

import json

import pytest
import torch
from pyautoattack import AutoAttack
from safetensors.torch import load_file
from torch import nn

from engine import cli, kernels, models
from engine.adversary.ascent import ForwardPass
from engine.errors import EngineError
from engine.models import sources, stem_of
from engine.runs.folder import Run
from engine.runs.images import test_set as images_of

_MISSING = sources.unavailable("timm/resnet18") or sources.unavailable("torchvision/alexnet")
pytestmark = pytest.mark.skipif(_MISSING is not None, reason=f"needs {_MISSING}")


@pytest.mark.parametrize(
    ("name", "size", "kernel"),
    [
        ("timm/resnet18", (24, 40), 7),
        ("timm/vit_tiny_patch16_224", (32, 48), 16),
        ("timm/tf_efficientnet_b0", (32, 32), None),
        ("torchvision/alexnet", (64, 64), 11),
        ("torchvision/vit_b_16", (32, 32), 16),
    ],
)
def test_the_attack_gradient_is_autograds(name, size, kernel):
    torch.manual_seed(0)
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    model = models.build(name, in_channels=3, image_size=size, classes=5, mean=mean, std=std).eval()
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.1)  # torchvision's transformers start with a head of zeros
    stem = stem_of(model)
    assert kernel == (None if stem is None else stem.weight.shape[-1])
    x, towards = torch.rand(2, 3, *size, requires_grad=True), torch.randn(2, 5)
    logits = model.net((x - model.mu) / model.sigma)
    (wanted,) = torch.autograd.grad(logits, x, towards)
    attacked = ForwardPass.of_attack(model, stem, x.detach())
    grad = attacked.gradient(lambda _: towards)
    if stem is not None:
        grad = kernels.stem_input_grad(
            grad, stem.weight, size=size, stride=stem.stride, padding=stem.padding
        )
    torch.testing.assert_close(attacked.logits, logits, rtol=1e-4, atol=1e-5)
    assert (grad - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_names_and_images_that_do_not_fit_give_one_line():
    for name, channels, said in (
        ("timm/resnet81", 3, "timm has no network 'resnet81': did you mean timm/resnet18"),
        ("torchvision/fcn_resnet50", 3, "torchvision has no network 'fcn_resnet50'"),
        ("torchvision/resnet18", 1, "takes images of 3 channels, these have 1: timm's"),
    ):
        with pytest.raises(EngineError, match=said):
            models.build(name, in_channels=channels, image_size=32, classes=5)


def test_one_run_starts_where_another_ended(tmp_path, monkeypatch, capsys):
    """Train, evaluate and report timm's resnet18, then fine-tune its weights."""
    monkeypatch.chdir(tmp_path)
    words = ["train", "quickstart", "--model.name", "timm/resnet18", "--optim.epochs", "1"]
    words += ["--data.train_examples", "64", "--optim.batch_size", "32", "--validation.steps", "1"]
    words += ["--data.validation", "8", "--evaluation.examples", "8", "--evaluation.pgd_steps", "2"]
    words += ["--evaluation.pgd_restarts", "1", "--evaluation.autoattack", "none"]
    assert cli.run([*words, "--run-dir", "a"]) == 0
    weights = tmp_path / "a" / "best.safetensors"
    assert "layer1.0.conv1.weight" in load_file(weights)
    capsys.readouterr()
    tuned = ["--model.pretrained", str(weights), "--optim.lr", "1e-9", "--run-dir", "b", "--json"]
    assert cli.run([*words, *tuned]) == 0
    row = json.loads(capsys.readouterr().out)
    assert (tmp_path / row["report"]).is_file()
    first, second = load_file(weights), load_file(tmp_path / "b" / "best.safetensors")
    for name, t in first.items():
        if t.is_floating_point() and "running" not in name:
            torch.testing.assert_close(second[name], t, rtol=0, atol=1e-5)
    assert cli.run(["export", "b"]) == 0
    timm = pytest.importorskip("timm")
    exported = load_file(tmp_path / "b" / "export" / "model.safetensors")
    net = timm.create_model("resnet18", num_classes=10, in_chans=1)
    net.load_state_dict({k: v for k, v in exported.items() if k not in ("mu", "sigma")})


@pytest.mark.slow
def test_the_authors_autoattack_gives_the_figure_of_a_fine_tuned_network(
    tmp_path, monkeypatch, capsys
):
    """By the package alone, on timm's own network with the exported weights."""
    monkeypatch.chdir(tmp_path)
    words = ["train", "quickstart", "--model.name", "timm/resnet18", "--threat.eps", "0.02"]
    words += ["--data.train_examples", "512", "--optim.batch_size", "64", "--optim.epochs", "3"]
    words += ["--data.validation", "16", "--validation.steps", "1", "--evaluation.pgd_steps", "2"]
    words += ["--evaluation.examples", "8", "--evaluation.pgd_restarts", "1", "--json"]
    words += ["--evaluation.judge", "pyautoattack"]
    assert cli.run([*words, "--run-dir", "a", "--no-eval"]) == 0
    tuned = ["--model.pretrained", "a/best.safetensors", "--optim.lr", "1e-4"]
    assert cli.run([*words, *tuned, "--run-dir", "b"]) == 0
    assert cli.run(["export", "b"]) == 0
    capsys.readouterr()
    timm = pytest.importorskip("timm")
    network = timm.create_model("resnet18", num_classes=10, in_chans=1).eval()
    network.load_state_dict(load_file(tmp_path / "b" / "export" / "model.safetensors"))
    run = Run.open(tmp_path / "b")
    x, y = images_of(run.recipe)
    judge = AutoAttack(network, norm="Linf", eps=0.02, seed=run.recipe.seed)
    adversaries, _ = judge.run_standard_evaluation(x, y, batch_size=500)
    with torch.no_grad():
        robust = float((network(adversaries).argmax(1) == y).double().mean())
    claim = json.loads((tmp_path / "b" / "export" / "claim.json").read_text())
    assert f"{100 * robust:.2f}" == claim["autoattack_acc"]
    assert 0 < robust <= 1


@pytest.mark.parametrize("name", ["timm/resnet18", "timm/vit_tiny_patch16_224"])
def test_the_step_can_be_captured(name):
    from engine import recipes
    from engine.performance import capture_audit

    found = capture_audit.audit(recipes.load("cifar10", {"model.name": name}))
    assert found.complaints == []


@pytest.mark.parametrize(
    ("name", "size", "rates"),
    [
        # timm's rates grow with the depth, from 0; torchvision's swin has 0.2 by itself.
        ("timm/vit_tiny_patch16_224", 32, {0.3}),
        ("torchvision/swin_t", 32, {0.3}),
    ],
)
def test_drop_path_is_a_field(name, size, rates):
    from engine.models.dropout import DropPath

    model = models.build(name, in_channels=3, image_size=size, classes=4, drop_path=0.3)
    found = {round(m.p, 6) for m in model.modules() if isinstance(m, DropPath)}
    assert max(found) == max(rates)
    assert len(found) > 2


@pytest.mark.parametrize("name", ["timm/vgg11", "torchvision/alexnet"])
def test_a_network_without_drop_path_gives_one_line(name):
    with pytest.raises(EngineError, match=f"network {name} has no drop-path"):
        models.build(name, in_channels=3, image_size=64, classes=4, drop_path=0.3)


def test_drop_path_takes_its_masks_from_the_steps_state():
    """torchvision's ConvNeXt has drop-path and LayerNorm; its step can be captured too."""
    from engine import recipes
    from engine.models.dropout import DropPath
    from engine.performance import capture_audit

    recipe = recipes.load("cifar10", {"model.name": "torchvision/convnext_tiny"})
    model = models.build(recipe.model.name, in_channels=3, image_size=32, classes=10)
    assert any(isinstance(module, DropPath) and module.p > 0 for module in model.modules())
    assert capture_audit.audit(recipe).complaints == []
