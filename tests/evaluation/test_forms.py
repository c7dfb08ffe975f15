"""Forms of a network for attacks: the same logits and gradients, with less to compute."""

import copy

import pytest
import torch
from torch import nn

from engine import models
from engine.evaluation.autoattack.forms import folded, prepared
from engine.evaluation.autoattack.oracle import Oracle


def trained(name, **options):
    """A network whose BatchNorms have statistics of their own, and images."""
    torch.manual_seed(0)
    net = models.build(name, in_channels=3, image_size=16, classes=5, **options)
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.2)
        net.train()
        for _ in range(5):
            net(torch.rand(16, 3, 16, 16))
    return net.eval(), torch.rand(6, 3, 16, 16)


def norms(net):
    return sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())


# Of a block of the pre-activation network, only the second follows a convolution alone; the
# post-activation network keeps the one after the stem.
@pytest.mark.parametrize(("name", "left"), [("preact-resnet18", 8), ("resnet18", 1)])
def test_batch_norm_is_folded_where_a_convolution_precedes_it(name, left):
    net, x = trained(name, width=8)
    before = copy.deepcopy(net.state_dict())
    form = folded(net, x)
    assert norms(form) == left < norms(net)
    torch.testing.assert_close(form(x), net(x), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(t, before[key]) for key, t in net.state_dict().items())
    towards = torch.randn(6, 5)
    plain, fast = (Oracle(net, example) for example in (None, x))
    _, wanted = plain.gradient(x, lambda logits: towards)
    _, found = fast.gradient(x, lambda logits: towards)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()))
    assert fast.exact_logits(x).equal(net(x))


def test_a_network_without_batch_norm_stays():
    net, x = trained("small-cnn")
    assert folded(net, x) is net
    assert prepared(net, x) is not net


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_prepared_form_has_the_librarys_layout(layout):
    """Weights in channels_last stay so in the network; its form gives the same logits."""
    net, x = trained("tiny-cnn")
    net = net.to(memory_format=layout)
    form = prepared(net, x)
    torch.testing.assert_close(form(x), net(x), rtol=1e-4, atol=1e-5)
    assert net.conv2.weight.is_contiguous(memory_format=layout)
    # A permuted weight in the frozen graph is a constant: no pass lays the maps out again.
    assert "permute" not in str(form.graph)


def test_a_network_that_keeps_a_batch_norm_is_not_prepared():
    net, x = trained("preact-resnet18", width=8)
    form = folded(net, x)
    assert prepared(form, x) is form


class Twice(nn.Module):
    """Read a convolution's output before its BatchNorm as well."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        h = self.conv(x)
        return (self.norm(h) + h).mean((2, 3))


class InPlace(Twice):
    """Change the convolution's output before its BatchNorm reads it."""

    def forward(self, x):
        h = self.conv(x)
        h += 1.0
        return self.norm(h).mean((2, 3))


class Unsteady(Twice):
    """Fail when it is copied."""

    def __deepcopy__(self, memo):
        raise RuntimeError("no copies")


@pytest.mark.parametrize("kind", [Twice, InPlace, Unsteady])
def test_a_network_that_cannot_be_folded_computes_the_same(kind):
    torch.manual_seed(1)
    net, x = kind(), torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        net.norm.running_mean.normal_()
        net.norm.running_var.uniform_(0.5, 2.0)
    net.eval()
    form = folded(net, x)
    torch.testing.assert_close(form(x), net(x), rtol=1e-5, atol=1e-6)
    assert norms(form) == 1
