"""NVIDIA apex: found, missing, half built, or PyPI's package of the same name."""

import sys
import types

import pytest
import torch

from engine import PGD, Attack, EngineError, Linf, recipes
from engine.device import apex
from engine.training.optimiser import Optimiser
from engine.training.step import Step

from ..conftest import Foreign


@pytest.fixture
def fake(monkeypatch):
    """Install stand-ins for modules; what is not given cannot be imported."""

    def install(**modules):
        for name in ("apex", "apex.optimizers", "amp_C"):
            monkeypatch.setitem(sys.modules, name, modules.get(name.replace(".", "_")))

    return install


class Sgd(torch.optim.SGD):
    """Takes what apex's takes."""


class Adam(torch.optim.Optimizer):
    """Keeps its numbers where apex's FusedAdam and FusedLAMB do: AdamW, in words of one step."""

    def __init__(self, params, lr, betas, eps, weight_decay, capturable=False):
        # A copy, of a tensor too.
        lr = torch.tensor(lr, dtype=torch.float32) if capturable else lr
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "wd": weight_decay})
        self.capturable = capturable

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if "step" in group:
                group["step"] += torch.ones(1, dtype=torch.int32) if self.capturable else 1
            else:
                group["step"] = torch.ones(1, dtype=torch.int32) if self.capturable else 1
            n, lr, (beta1, beta2) = group["step"], group["lr"], group["betas"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                m, v = state["exp_avg"], state["exp_avg_sq"]
                m.lerp_(p.grad, 1 - beta1)
                v.lerp_(p.grad.square(), 1 - beta2)
                p.mul_(1 - lr * group["wd"])
                p -= lr / (1 - beta1**n) * m / ((v / (1 - beta2**n)).sqrt() + group["eps"])


optimisers = types.SimpleNamespace(FusedSGD=Sgd, FusedAdam=Adam, FusedLAMB=Adam)


def test_missing_apex_says_how_to_build_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    monkeypatch.setattr(apex.importlib, "import_module", _no_such_module)
    assert apex.status().startswith("NVIDIA apex is not installed; build it where nvcc is")


def _no_such_module(name):
    raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_pypis_apex_is_refused(fake):
    fake(apex=types.ModuleType("apex"))
    with pytest.raises(EngineError, match=r"is not NVIDIA.s .* pip uninstall apex"):
        apex.load()


def test_apex_without_its_extension_is_refused(fake):
    fake(apex=types.ModuleType("apex"), apex_optimizers=optimisers)
    with pytest.raises(EngineError, match="without its CUDA extension"):
        apex.load()


def test_the_real_apex_is_found_and_needs_a_gpu(fake):
    fake(apex=types.ModuleType("apex"), apex_optimizers=optimisers, amp_C=types.ModuleType("amp_C"))
    assert apex.load() is optimisers
    assert apex.status() == "NVIDIA apex with its fused optimisers"
    with pytest.raises(EngineError, match="apex-sgd needs a CUDA device"):
        Optimiser(Foreign(), lr=[0.1], name="apex-sgd")


def test_apex_takes_this_steps_rate_from_the_host():
    model = Foreign()
    optimiser = Optimiser(model, lr=[0.5, 0.25], name="torch-sgd")
    optimiser.name, optimiser._external = "apex-sgd", Sgd(model.parameters(), lr=9.0)
    assert optimiser.uncapturable == "optim.name = apex-sgd takes its learning rate from the host"
    before = [p.detach().clone() for p in model.parameters()]
    for step in (0, 1):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimiser.step(torch.tensor([step]))
    for p, was in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), was - 0.75)


@pytest.mark.parametrize("name", ["apex-sgd", "apex-adam", "apex-lamb"])
def test_apex_with_float16_is_refused_before_anything_begins(name):
    tree = recipes.tree("quickstart")
    half = recipes.merged(tree, {"optim": {"name": name}, "step": {"precision": "fp16"}})
    with pytest.raises(EngineError, match=rf"{name} cannot skip .* take step\.precision = bf16"):
        recipes.parse(half)
    recipes.parse(recipes.merged(half, {"step": {"precision": "bf16"}}))
    # From Python there is no recipe.
    model = Foreign()
    optimiser = Optimiser(model, lr=[0.1], name="torch-sgd")
    optimiser.name = name
    with pytest.raises(EngineError, match=rf"{name} cannot skip"):
        Step(
            model,
            objective=PGD(),
            threat=Linf(0.1),
            attack=Attack(),
            optimiser=optimiser,
            precision="fp16",
        )


@pytest.mark.parametrize("name", ["apex-sgd", "apex-adam", "apex-lamb"])
def test_apex_follows_the_schedule_and_goes_on_from_a_checkpoint(fake, name):
    """Compare with torch's optimisers: apex's Adam and this LAMB stand-in are AdamW.

    The state is whole before the first step.
    """
    fake(apex=types.ModuleType("apex"), apex_optimizers=optimisers, amp_C=types.ModuleType("amp_C"))
    rates = [0.5, 0.25, 0.125, 0.0625]

    def stand_in(model):
        optimiser = Optimiser(model, lr=rates, name="torch-sgd", weight_decay=0.01)
        optimiser.name = name
        options = {"betas": (0.9, 0.999), "eps": 1e-8}
        options = {"momentum": 0.9} if name == "apex-sgd" else options
        optimiser._external = apex.build(
            name, optimiser.params, optimiser.lr, weight_decay=0.01, **options
        )
        return optimiser

    def run(model, optimiser, steps):
        for step in steps:
            for i, p in enumerate(model.parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(9 * step + i))
            optimiser.step(torch.tensor([step]))

    torch.manual_seed(0)
    plain, model = Foreign(), Foreign()
    model.load_state_dict(plain.state_dict())
    theirs = "torch-sgd" if name == "apex-sgd" else "torch-adamw"
    run(plain, Optimiser(plain, lr=rates, name=theirs, weight_decay=0.01), range(4))

    first = stand_in(model)
    run(model, first, range(2))
    resumed = Foreign()
    resumed.load_state_dict(model.state_dict())
    second = stand_in(resumed)
    assert second.tensors().keys() == first.tensors().keys()
    for key, t in second.tensors().items():
        t.copy_(first.tensors()[key])
    second.steps = first.steps
    run(resumed, second, range(2, 4))
    for p, q in zip(plain.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(q, p)
