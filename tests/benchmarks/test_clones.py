"""Authors' own code in the step benchmark: driven as it lies, held to our step, and nothing left
behind.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest
import torch

from engine import EngineError, cli
from engine.benchmarks import clones, step
from engine.device import machine

TINY = step.Setting("tiny-cnn", (8, 1, 8, 8), [step.PGD10, step.TRADES10], False, False, 0.1)

# Functions of the names, arguments and habits of the authors'; written here.
TRADES = """
import torch
import torchvision
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torchvision import datasets, transforms


def trades_loss(model, x_natural, y, optimizer, step_size, epsilon, perturb_steps, beta):
    model.eval()
    anchor = model(x_natural).softmax(1).detach()
    z = x_natural + 0.001 * torch.randn(x_natural.shape).cuda()
    for _ in range(perturb_steps):
        z.requires_grad_()
        loss = kl_div(log_softmax(model(z), 1), anchor, reduction="sum")
        z = z.detach() + step_size * torch.autograd.grad(loss, z)[0].sign()
        z = (x_natural + (z - x_natural).clamp(-epsilon, epsilon)).clamp(0, 1)
    model.train()
    optimizer.zero_grad()
    clean = model(x_natural)
    robust = kl_div(log_softmax(model(z), 1), clean.softmax(1), reduction="batchmean")
    return cross_entropy(clean, y) + beta * robust
"""
ATTACK = """
def climb(model, X, y, delta, eps, alpha, steps):
    for _ in range(steps):
        delta = delta.detach().requires_grad_()
        logits = model(X + delta)
        right = logits.argmax(1) == y
        if not right.any():
            raise RuntimeError("nothing is left to attack\\nat all")
        cross_entropy(logits, y).backward()
        moved = (delta + alpha * delta.grad.sign()).clamp(-eps, eps)
        moved = torch.maximum(torch.minimum(moved, 1 - X), -X)
        delta = torch.where(right.view(-1, 1, 1, 1), moved, delta)
    return delta.detach().cuda()
"""
MNIST = f"""
import logging
import torch
import torchvision
from torch.nn.functional import cross_entropy
from torchvision import datasets, transforms
from mnist_net import mnist_net

logging.getLogger().setLevel(logging.DEBUG)
logging.getLogger().addHandler(logging.NullHandler())
{ATTACK}

def attack_pgd(model, X, y, epsilon, alpha, attack_iters, restarts):
    delta = torch.zeros_like(X).uniform_(-epsilon, epsilon).cuda()
    return climb(model, X, y, delta.clamp(-X, 1 - X), epsilon, alpha, attack_iters)
"""
CIFAR = f"""
import apex.amp as amp
import torch
from torch.nn.functional import cross_entropy
from torchvision import datasets, transforms

std = torch.tensor([0.2, 0.2, 0.2]).view(3, 1, 1).cuda()
lower_limit, upper_limit = -0.5 / std, 0.5 / std
{ATTACK}

def attack_pgd(model, X, y, epsilon, alpha, attack_iters, restarts, opt=None):
    if opt is not None:
        amp.scale_loss(0, opt)
    delta = torch.zeros_like(X).cuda()
    for i in range(len(epsilon)):
        delta[:, i].uniform_(-epsilon[i].item(), epsilon[i].item())
    delta = torch.maximum(torch.minimum(delta, upper_limit - X), lower_limit - X)
    return climb(model, X, y, delta, epsilon, alpha, attack_iters)
"""


@pytest.fixture
def folders(tmp_path) -> dict[str, Path]:
    files = {
        "trades/trades.py": TRADES,
        "fast/MNIST/evaluate_mnist.py": MNIST,
        "fast/MNIST/mnist_net.py": "mnist_net = None",
        "fast/CIFAR10/utils.py": CIFAR,
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return {"trades": tmp_path / "trades", "fast_adversarial": tmp_path / "fast"}


def rewrite(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def process() -> tuple:
    """What foreign code, or our way of running it, could leave behind."""
    root = logging.getLogger()
    return (
        torch.randn,
        [name for name in ("cuda", "uniform_") if name in vars(torch.Tensor)],
        torch.Tensor.cuda,
        torch.Tensor.uniform_,
        {n: m for n, m in sys.modules.items() if n.partition(".")[0] in ("torchvision", "apex")},
        "mnist_net" in sys.modules,
        sys.path[:],
        sys.dont_write_bytecode,
        root.handlers[:],
        root.level,
    )


CASES = [("trades", 1), ("fast_adversarial", 1), ("fast_adversarial", 3)]


@pytest.mark.parametrize(("name", "channels"), CASES)
def test_a_clones_step_is_held_to_ours_and_leaves_nothing_behind(
    folders, name, channels, monkeypatch
):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    monkeypatch.setattr(sys, "pycache_prefix", None)
    before = process()
    clone = clones.load(name, folders[name], channels)
    assert process() == before
    assert step.agrees(clone.loop, step.CLONED[name])
    assert process() == before
    assert not list(folders[name].rglob("__pycache__"))


@pytest.mark.parametrize(("name", "channels"), CASES)
@pytest.mark.parametrize(("fewer", "nearer"), [(1, 1.0), (0, 0.85)], ids=["step", "alpha"])
def test_a_clone_that_does_something_else_is_noticed(folders, name, channels, fewer, nearer):
    clone = clones.load(name, folders[name], channels)

    def other(model, eps, alpha, k):
        return clone.loop(model, eps, nearer * alpha, k - fewer)

    assert not step.agrees(other, step.CLONED[name])


@pytest.mark.parametrize(("name", "channels"), CASES)
def test_a_clone_trains_from_a_start_of_its_own(folders, name, channels):
    setting = step.Setting("tiny-cnn", (8, channels, 8, 8), [], False, False, 0.0)
    net = step.network(setting, ours=False)
    before = net.fc2.weight.detach().clone()
    x = torch.rand(setting.shape, device=machine.device())
    with torch.no_grad():
        y = net(x).argmax(1)
    clones.load(name, folders[name], channels).loop(net, 0.01, 0.005, 2)(x, y)
    assert not torch.equal(before, net.fc2.weight)


def test_rows_compare_with_clones_and_say_how_they_ran(folders, monkeypatch):
    """The stub fails where everything is wrong; the authors' code would stop there."""
    monkeypatch.setattr(step, "settings", lambda quick: [TINY])
    monkeypatch.setattr(step, "unavailable", lambda device: "not in this test")
    pgd, trades = step.run(quick=True, cloned=folders)
    assert set(pgd["speedup_vs"]) == {"fast_adversarial (clone)"}
    assert set(trades["speedup_vs"]) == {"TRADES (clone)"}
    how = "on the GPU" if clones._on_a_gpu() else "Tensor.cuda"
    for word in ("attack_pgd of MNIST/evaluate_mnist.py", how, "torchvision", "apex"):
        assert word in pgd["note"]


def test_a_clone_runs_where_the_benchmark_does(folders, monkeypatch):
    """What it sends to the GPU goes there: a device that has shapes and no numbers stands in."""
    monkeypatch.setattr(machine, "device", lambda: torch.device("meta"))
    net = step.network(TINY, ours=False)
    x, y = (t[:8] for t in step._data(TINY))
    clones.load("trades", folders["trades"], 1).loop(net, 0.01, 0.005, 2)(x, y)
    # Had anything been left on the CPU it would have met x, and failed.
    assert all(p.grad.is_meta for p in net.parameters())
    monkeypatch.setattr(machine, "device", lambda: torch.device("cuda"))
    cuda = torch.Tensor.cuda
    clone = clones.load("trades", folders["trades"], 1)
    assert "on the GPU with empty stand-ins" in clone.note
    with clones._here():
        assert torch.Tensor.cuda is cuda


def test_a_clone_that_disagrees_gets_no_ratio(folders, monkeypatch):
    monkeypatch.setattr(step, "settings", lambda quick: [TINY])
    monkeypatch.setattr(step, "unavailable", lambda device: "not in this test")
    rewrite(folders["trades"] / "trades.py", "0.001 * torch.randn", "0.1 * torch.randn")
    pgd, trades = step.run(quick=True, cloned=folders)
    assert trades["speedup_vs"] == {}
    assert "TRADES (clone) disagrees with our step" in trades["note"]
    assert pgd["speedup_vs"]


def test_a_setting_loads_only_what_it_compares_with(folders):
    setting = step.Setting("preact-resnet18", (2, 3, 32, 32), [step.METHODS[0]], False, False, 0.1)
    ((clone, method),) = step._cloned(setting, folders)
    assert "CIFAR10/utils.py" in clone.note
    assert method is step.PGD10


def test_nothing_is_left_behind_by_code_that_fails(folders):
    before = process()
    clone = clones.load("fast_adversarial", folders["fast_adversarial"], 1)
    net = step.network(TINY, ours=False)
    x = torch.rand(TINY.shape, device=machine.device())
    with torch.no_grad():
        wrong = net(x).argmin(1)
    with pytest.raises(EngineError) as failed:
        clone.loop(net, 0.01, 0.005, 2)(x, wrong, x)
    assert str(failed.value).endswith("failed: RuntimeError: nothing is left to attack")
    assert process() == before
    file = folders["fast_adversarial"] / "MNIST/evaluate_mnist.py"
    for last in ("import no_such_module", "raise SystemExit(2)", "transforms.ToTensor()"):
        file.write_text(f"{MNIST}\n{last}\n")
        with pytest.raises(EngineError, match=r"evaluate_mnist\.py cannot be loaded: "):
            clones.load("fast_adversarial", folders["fast_adversarial"], 1)
        assert process() == before
    file.write_text(MNIST + "\nraise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        clones.load("fast_adversarial", folders["fast_adversarial"], 1)
    assert process() == before


def test_what_was_imported_before_is_there_again(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", object())
    before = {name: module for name, module in sys.modules.items() if "torchvision" in name}
    clones.load("trades", folders["trades"], 1)
    assert {n: module for n, module in sys.modules.items() if "torchvision" in n} == before


def test_mistakes_are_one_line(folders, tmp_path, monkeypatch, capsys):
    def says(*words: str) -> str:
        assert cli.run(["bench", *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    monkeypatch.setattr(step, "_measure", lambda *_: pytest.fail("timed before all is loaded"))
    trades = f"trades={folders['trades']}"
    assert "`engine bench step`" in says("ops", "--clone", trades)
    assert "without --against" in says("step", "--clone", trades, "--against", "HEAD")
    assert "fast_adversarial=PATH or trades=PATH" in says("step", "--clone", "mart=x")
    assert "got 'trades'" in says("step", "--clone", "trades")
    assert "twice" in says("step", "--clone", trades, "--clone", trades)
    assert "no folder" in says("step", "--clone", f"trades={tmp_path / 'nowhere'}")
    other = says("step", "--clone", f"trades={folders['fast_adversarial']}")
    assert other.endswith("has no trades.py; is it a clone of https://github.com/yaodongyu/TRADES?")
    (folders["trades"] / "trades.py").write_text("import torch\n")
    assert says("step", "--clone", trades).endswith("trades.py has no function trades_loss")


def test_help_says_that_foreign_code_runs(capsys):
    with pytest.raises(SystemExit):
        cli.run(["bench", "--help"])
    assert "executes the code in it" in " ".join(capsys.readouterr().out.split())
