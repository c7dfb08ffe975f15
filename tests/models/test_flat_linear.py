"""The linear layer on feature maps: `nn.Linear` after `nn.Flatten`, in the maps' own layout."""

import pytest
import torch
from torch.nn import functional as F

from engine import models
from engine.models.flat_linear import FlatLinear

LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5, 3, 4, 6), (5, 7, 1, 1), (1, 3, 2, 2), (0, 3, 2, 2)])
def test_it_is_linear_after_flatten(layout, shape):
    torch.manual_seed(0)
    layer = FlatLinear(shape[1] * shape[2] * shape[3], 9).double()
    maps = torch.randn(shape, dtype=torch.float64).to(memory_format=LAYOUTS[layout])
    maps.requires_grad_()
    towards = torch.randn(len(maps), 9, dtype=torch.float64)
    leaves = (maps, layer.weight, layer.bias)
    found, wanted = layer(maps), F.linear(maps.flatten(1), layer.weight, layer.bias)
    torch.testing.assert_close(found, wanted)
    for mine, theirs in zip(
        torch.autograd.grad(found, leaves, towards),
        torch.autograd.grad(wanted, leaves, towards),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", ["fast-at-mnist", "small-cnn", "tiny-cnn"])
def test_the_gradient_has_the_layout_of_the_maps(name):
    net = models.build(name, in_channels=1, image_size=28, classes=10)
    net = net.to(memory_format=torch.channels_last).eval()
    (layer,) = (module for module in net.modules() if isinstance(module, FlatLinear))
    seen = []
    layer.register_forward_pre_hook(lambda _, maps: seen.append(maps[0]))
    net(torch.rand(4, 1, 28, 28))
    (maps,) = seen
    grad = torch.autograd.grad(layer(maps).sum(), maps)[0]
    for tensor in (maps, grad):
        assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert not tensor.is_contiguous()
