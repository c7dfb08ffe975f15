"""The roofline on paper: what it counts is exact, what it predicts is in order."""

import json

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engine import EngineError, cli, models, recipes
from engine.device import phases
from engine.performance import dispatch, kernel_count, plan
from engine.runs import build


def load(name, **overrides):
    return recipes.load(name, {k.replace("__", "."): v for k, v in overrides.items()})


@pytest.fixture(scope="module")
def cifar():
    return plan.plan(load("cifar10"), "h100")


def test_flops_are_passes_times_the_networks_own(cifar):
    """PreActResNet-18 on 32x32, 0.555 GMAC, less what nobody needs: the image's gradient in
    training passes.
    """
    stem, first = 3 * 9 * 64 * 32 * 32, 4 * 64 * 64 * 9 * 32 * 32
    # Each later stage: half the channels to all of them, three times all, the shortcut; half the
    # side.
    later = (64 * 128 * 9 + 3 * 128 * 128 * 9 + 64 * 128) * 16 * 16
    total = stem + first + 3 * later + 512 * 10
    passes = cifar.passes
    forwards = passes["forward"] * total
    inputs = passes["input_grad"] * total - passes["weight_grad"] * stem
    weights = passes["weight_grad"] * total
    assert cifar.flops == 2 * 128 * (forwards + inputs + weights)


@pytest.mark.parametrize("name", ["fast-at-mnist", "small-cnn", "resnet18"])
def test_a_forward_pass_costs_what_its_layers_say(name):
    size, channels = (32, 3) if "resnet" in name else (28, 1)
    model = models.build(name, in_channels=channels, image_size=size, classes=10)
    expected = []

    def count(module, inputs, out):
        per_value = module.weight[0].numel()
        expected.append(2 * out.numel() * per_value)

    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(count)
    priced = plan._Priced()
    with torch.no_grad(), priced:
        model.eval()(torch.rand(2, channels, size, size))
    assert sum(op.flops for op in priced.ops) == sum(expected)


@pytest.mark.parametrize("name", ["quickstart", "quickstart-pgd10"])
def test_flops_on_paper_are_those_of_the_step_that_runs(name):
    """Counted by PyTorch while the step runs on the CPU, where the stem has ops of the engine's
    own.
    """
    recipe = load(name)
    call = build.step_of(recipe)
    call()
    with FlopCounterMode(display=False) as counted:
        call()
    assert plan.flops(recipe) == counted.get_total_flops()


def test_traffic_of_an_op_is_what_it_reads_and_writes():
    priced = plan._Priced()
    a, b = torch.rand(100, 10), torch.rand(100, 10)
    with phases.listening(priced), priced, phases.phase(phases.LOSS):
        (a + b).view(10, 100)
        a.add_(b)
        torch.empty(5)
    assert [op.bytes for op in priced.ops] == [3 * 4000, 3 * 4000]
    assert {op.phase for op in priced.ops} == {phases.LOSS}


def test_predictions_are_in_order(cifar):
    recipe = load("cifar10")
    a100, h200 = plan.plan(recipe, "a100"), plan.plan(recipe, "h200")
    assert h200.step_ms < cifar.step_ms < a100.step_ms
    assert plan.plan(load("cifar10", optim__batch_size="256"), "h100").step_ms > cifar.step_ms
    assert plan.plan(load("cifar10", step__precision="fp32"), "h100").step_ms > 2 * cifar.step_ms
    pgd10 = plan.plan(load("cifar10-pgd10"), "h100")
    assert pgd10.step_ms == pytest.approx(cifar.pgd10_ms, rel=0.02)
    assert cifar.share_of_pgd10 == pytest.approx(cifar.step_ms / cifar.pgd10_ms)
    assert sum(cifar.bound_by.values()) == pytest.approx(1.0)
    assert cifar.eager_ms >= 0.9 * cifar.step_ms
    small = plan.plan(load("fashion-mnist"), "h100")
    assert small.bound_by["launch"] > 0.5
    assert small.eager_ms > 2 * small.step_ms


def test_launches_are_counted_by_kernel(cifar):
    """A backward pass of a convolution is a kernel for each gradient that somebody needs."""
    passes = cifar.passes
    convolutions = 20  # of the PreActResNet-18, three shortcuts included
    stems = passes["weight_grad"]  # whose images need no gradient
    counted = cifar.kernels
    assert counted["convolution"] == convolutions * passes["forward"]
    gradients = passes["input_grad"] + passes["weight_grad"]
    attacks = passes["input_grad"] - passes["weight_grad"]
    # An attack's pass ends at the stem's output; a training pass has no input gradient there.
    assert counted["convolution_backward"] == convolutions * gradients - attacks - stems
    assert cifar.launches == sum(counted.values())
    assert list(counted.values()) == sorted(counted.values(), reverse=True)


def test_fusions_save_no_more_than_what_is_not_a_product(cifar):
    assert len(cifar.fusions) == 4
    assert all(saved > 0 for saved in cifar.fusions.values())
    assert cifar.fused_ms == pytest.approx(cifar.step_ms - sum(cifar.fusions.values()))
    assert cifar.products_ms < cifar.fused_ms < cifar.step_ms
    # Nothing to fuse where there is no ReLU of its own kernel.
    plain = [("aten::convolution", phases.ATTACK_FORWARD, True, 1.0)]
    assert kernel_count.fusions(plain) == {}
    relu = [("aten::relu", phases.ATTACK_FORWARD, True, 2.0)]
    assert list(kernel_count.fusions(relu).values()) == [2.0]


def test_lists_of_tensors_are_launched_in_parts():
    spy = Launches()
    with spy:
        torch._foreach_add_([torch.zeros(3) for _ in range(111)], 1.0)
        a, b = ([torch.zeros(3) for _ in range(64)] for _ in range(2))
        torch._foreach_copy_(a, b)
    assert spy.launched == [2, 1]


class Launches(dispatch.Spy):
    def __init__(self):
        super().__init__()
        self.launched = []

    def heard(self, call):
        if call.short_name.startswith("_foreach"):
            self.launched.append(kernel_count.kernels_of(call))


def test_memory_of_extra_images_counts_or_is_said_to_be_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("ENGINE_DATA", str(tmp_path / "root"))
    extra = tmp_path / "more.npz"
    options = {"data__extra": str(extra)}
    absent = plan.plan(load("quickstart", **options), "h100")
    assert absent.memory_gb["extra images"] == 0
    assert f"{extra} cannot be read here: its memory is not counted" in absent.assumptions[-1]
    np.savez(extra, image=np.zeros((500, 8, 8, 1), np.uint8), label=np.zeros(500, np.int64))
    here = plan.plan(load("quickstart", **options), "h100")
    assert here.memory_gb["extra images"] == 500 * 64 / 1e9
    assert len(here.assumptions) == len(absent.assumptions) - 1


def test_memory_is_of_the_set_and_the_weights(cifar):
    weights = 11_172_170
    parts = cifar.memory_gb
    # Weights, gradients, momentum and average in float32, one copy in bfloat16.
    assert parts["weights and optimiser"] == pytest.approx(weights * 18 / 1e9, rel=0.01)
    assert parts["dataset"] == parts["adversary memory"] == pytest.approx(49_000 * 3072 / 1e9)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("torch-sgd", "sgd"),
        ("torch-adamw", "adamw"),
        ("apex-sgd", "sgd"),
        ("apex-adam", "adamw"),
        ("apex-lamb", "adamw"),
    ],
)
def test_an_optimiser_of_others_is_priced_as_ours_and_the_plan_says_so(name, ours, monkeypatch):
    """On paper none of theirs runs: torch's read a number, apex's want a GPU."""
    monkeypatch.setattr(plan, "measured", lambda recipe: None)
    foreign, own = (
        plan.plan(load("quickstart", optim__name=each), "h100") for each in (name, ours)
    )
    assert foreign.step_ms == own.step_ms
    assert foreign.memory_gb == own.memory_gb
    assert foreign.assumptions == [*own.assumptions, f"optim.name = {name} at the price of {ours}"]
    assert plan.flops(load("quickstart", optim__name=name)) == own.flops


def test_command_line(capsys):
    assert cli.run(["plan", "fashion-mnist", "--gpu", "a100", "--json", "--attack.steps", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passes"]["total"] == 9
    assert found["measured_ms"] is None or torch.cuda.is_available()
    assert found["gpu"] == "a100"
    assert cli.run(["plan", "fashion-mnist"]) == 0
    out = capsys.readouterr().out
    assert "(predicted)" in out
    assert "guesses" in out
    assert cli.run(["plan", "fashion-mnist", "--gpu", "tpu"]) == 2
    assert "unknown --gpu tpu: a100, h100, h200" in capsys.readouterr().err
    with pytest.raises(EngineError, match="unknown --gpu"):
        plan.plan(load("fashion-mnist"), "x")
