"""Test steps whose passes go through torch.compile."""

from __future__ import annotations

import copy

import pytest
import torch

from engine.models import compiled

from ..conftest import Tiny
from .steps import make, train


@pytest.mark.skipif(
    compiled.unavailable(torch.device("cpu")) is not None,
    reason=str(compiled.unavailable(torch.device("cpu"))),
)
def test_compiled_passes_train_the_same_network():
    torch.manual_seed(0)
    model = Tiny(batch_norm=True)
    eager = make(copy.deepcopy(model))
    ours_compiled = make(copy.deepcopy(model), compile=True)
    train(eager)
    train(ours_compiled)
    assert ours_compiled.means()["loss"] == pytest.approx(eager.means()["loss"], rel=1e-4)
    for (name, ours), theirs in zip(
        ours_compiled.model.state_dict().items(), eager.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=name)
    assert all(p.requires_grad for p in ours_compiled.model.parameters())


def test_a_folder_with_a_space_trains_uncompiled_and_says_so_once(monkeypatch, caplog):
    """PyTorch's CPU compiler hands the linker -L and a folder without quotes."""
    monkeypatch.setattr(torch, "__file__", "/opt/my env/torch/__init__.py")
    model = Tiny()
    step = make(model, compile=True)
    assert step.network is model
    train(step)
    told = [record.message for record in caplog.records if "torch.compile" in record.message]
    assert len(told) == 1
    assert "space in its path: /opt/my env/torch/lib" in told[0]
    assert compiled.unavailable(torch.device("cuda")) is None
