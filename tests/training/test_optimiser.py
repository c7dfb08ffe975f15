"""Test the optimisers against PyTorch's, and the moving average."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from engine.training.optimiser import Optimiser

from ..conftest import Foreign, Tiny, blobs


@pytest.mark.parametrize("name", ["sgd", "adamw", "torch-sgd", "torch-adamw"])
def test_optimiser_is_torchs_optimiser(name):
    torch.manual_seed(0)
    ours, theirs = Foreign(), None
    theirs = copy.deepcopy(ours)
    rates = [0.1 / (step + 1) for step in range(6)]
    optimiser = Optimiser(ours, lr=rates, name=name, momentum=0.9, weight_decay=0.01, ema=0.5)
    average = copy.deepcopy(ours)
    if name.endswith("sgd"):
        plain = torch.optim.SGD(theirs.parameters(), lr=1.0, momentum=0.9, weight_decay=0.01)
    else:
        plain = torch.optim.AdamW(theirs.parameters(), lr=1.0, weight_decay=0.01)
    images, labels = blobs(64)
    x = images.float() / 255
    for step in range(6):
        for group in plain.param_groups:
            group["lr"] = rates[step]
        for net, opt in ((ours, optimiser), (theirs, plain)):
            opt.zero_grad()
            F.cross_entropy(net(x), labels).backward()
            opt.step(torch.tensor([step])) if net is ours else opt.step()
        decay = min(0.5, (1 + step) / (10 + step))
        for e, p in zip(average.parameters(), theirs.parameters(), strict=True):
            e.data.lerp_(p.data, 1 - decay)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)
    for p, q in zip(optimiser.average.parameters(), average.parameters(), strict=True):
        torch.testing.assert_close(p.data, q.data, atol=1e-6, rtol=1e-5)


def test_average_holds_batch_norm_statistics_too():
    model = Tiny(batch_norm=True)
    optimiser = Optimiser(model, lr=[0.1], ema=0.9)
    model(torch.rand(8, 1, 6, 6)).sum().backward()
    optimiser.step(torch.tensor([0]))
    decay = 1 / 10
    expected = (1 - decay) * model.bn.running_mean
    torch.testing.assert_close(optimiser.average.bn.running_mean, expected)
    assert optimiser.average.bn.num_batches_tracked == 1
