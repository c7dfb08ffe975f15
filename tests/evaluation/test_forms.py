"""Forms of a network for attacks: the same logits and gradients, with less to compute."""

import copy

import pytest
import torch
from torch import nn

from engine import models, progress
from engine.evaluation.autoattack import oracle as oracle_module
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_large_batch_passes_in_parts(monkeypatch, precision):
    """The loss's gradient is asked for once, at the logits of the whole batch."""
    net, x = trained("tiny-cnn")
    oracle = Oracle(net, x, precision)
    weights = torch.randn(6, 5)
    asked, answers = [], []

    def towards(logits):
        asked.append(len(logits))
        return weights * logits

    for at_once in (6, 4):
        monkeypatch.setattr(oracle_module, "_AT_ONCE", at_once)
        answers.append([oracle.logits(x), oracle.exact_logits(x), *oracle.gradient(x, towards)])
    assert asked == [6, 6]
    exact = {"rtol": 1e-4, "atol": 1e-5} if precision == "fp32" else {"rtol": 2e-2, "atol": 2e-2}
    for whole, parts in zip(*answers, strict=True):
        assert whole.shape == parts.shape
        torch.testing.assert_close(parts, whole, **exact)


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


@pytest.mark.parametrize(
    ("kind", "said"),
    [(Twice, "gives other logits"), (InPlace, None), (Unsteady, "RuntimeError: no copies")],
)
def test_a_network_that_cannot_be_folded_computes_the_same(kind, said, caplog, monkeypatch):
    monkeypatch.setattr(progress, "_announced", set())
    torch.manual_seed(1)
    net, x = kind(), torch.rand(4, 3, 8, 8)
    with torch.no_grad():
        net.norm.running_mean.normal_()
        net.norm.running_var.uniform_(0.5, 2.0)
    net.eval()
    form = folded(net, x)
    torch.testing.assert_close(form(x), net(x), rtol=1e-5, atol=1e-6)
    assert norms(form) == 1
    folded(net, x)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (said is not None)
    assert all(said in line for line in lines)


def test_a_network_that_looks_at_values_is_not_frozen(caplog, monkeypatch):
    class Choosing(nn.Module):
        def forward(self, x):
            return x.flatten(1)[:, :3] * (1 if x.mean() > 0.5 else 2)

    monkeypatch.setattr(progress, "_announced", set())
    net, x = Choosing().eval(), torch.rand(4, 3, 8, 8)
    assert prepared(net, x) is net
    assert prepared(net, x) is net
    (line,) = [record.getMessage() for record in caplog.records]
    assert "without a frozen form: TracerWarning" in line
