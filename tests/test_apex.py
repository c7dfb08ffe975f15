"""NVIDIA apex: found, missing, half built, or PyPI's package of the same name."""

import sys
import types

import pytest
import torch

from engine import EngineError, apex
from engine.optim import Optimiser
from engine.precision import LossScale

from .conftest import Foreign


@pytest.fixture
def fake(monkeypatch):
    """Install stand-ins for modules; what is not given cannot be imported."""

    def install(**modules):
        for name in ("apex", "apex.optimizers", "amp_C"):
            monkeypatch.setitem(sys.modules, name, modules.get(name.replace(".", "_")))

    return install


class Sgd(torch.optim.SGD):
    """Takes what apex's takes."""


optimisers = types.SimpleNamespace(FusedSGD=Sgd, FusedAdam=Sgd, FusedLAMB=Sgd)


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


def test_apex_takes_this_steps_rate_from_the_host_and_refuses_a_loss_scale():
    model = Foreign()
    optimiser = Optimiser(model, lr=[0.5, 0.25], name="torch-sgd")
    optimiser.name, optimiser._theirs = "apex-sgd", Sgd(model.parameters(), lr=9.0)
    assert optimiser.uncapturable == "optim.name = apex-sgd takes its learning rate from the host"
    before = [p.detach().clone() for p in model.parameters()]
    for step in (0, 1):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimiser.step(torch.tensor([step]))
    for p, was in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), was - 0.75)
    with pytest.raises(EngineError, match=r"take step\.precision = bf16"):
        optimiser._others(LossScale(torch.device("cpu"), dynamic=True))
