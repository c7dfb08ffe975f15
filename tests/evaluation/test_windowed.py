"""Passes that compute only where a window reaches: the network's logits, and Square's verdicts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from engine import Linf, models
from engine.evaluation.autoattack.oracle import Nearby, Oracle
from engine.evaluation.autoattack.square import square
from engine.evaluation.autoattack.windowed import Windowed, windowed

# Strides, paddings, poolings, sizes at which a stride leaves pixels over, and oblong images.
NETWORKS = [
    ("fast-at-mnist", 1, (28, 28)),
    ("fast-at-mnist", 3, (16, 24)),
    ("small-cnn", 1, (20, 17)),
    ("padded", 3, (8, 9)),
    ("padded", 3, (11, 7)),
]


class Padded(models.Chain):
    """Pad both convolutions; at an even size the second leaves pixels over."""

    def __init__(self, channels, size, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        height, width = ((side + 1) // 2 for side in size)
        self.fc = nn.Linear(8 * height * width, classes)

    @property
    def layers(self) -> list[nn.Module]:
        return [nn.ReLU(), self.conv2, nn.ReLU(), nn.Flatten(), self.fc]


class Wide(models.Chain):
    """Leave most pixels between two kernels unread, and divide by more than one deviation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 5, stride=2, padding=2)
        self.rest = nn.ModuleList(
            [nn.ReLU(), nn.Conv2d(4, 4, 1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)]
        )
        self.normalise((0.2, 0.4, 0.6), (0.3, 0.5, 0.7))

    @property
    def layers(self) -> list[nn.Module]:
        return list(self.rest)


def network(name, channels, size):
    torch.manual_seed(0)
    make = Padded if name == "padded" else models.MODELS[name]
    net = make(channels, size, 5).eval().requires_grad_(False)
    net.normalise([0.3] * channels, [0.4] * channels)
    for parameter in net.parameters():  # small-cnn's last layer is zero at first
        parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return net


def changed(x, depth, side, draw):
    """Return D points for each image with a random window each: points, images and corners."""
    (count, _, height, width), points = x.shape, x[:, None].repeat(1, depth, 1, 1, 1)
    # The corners of the image are windows too.
    top = torch.randint(height - side + 1, (count, depth), generator=draw)
    left = torch.randint(width - side + 1, (count, depth), generator=draw)
    top[:, 0], left[:, 0] = 0, 0
    top[:, 1], left[:, 1] = height - side, width - side
    for image in range(count):
        for one in range(depth):
            rows = slice(int(top[image, one]), int(top[image, one]) + side)
            columns = slice(int(left[image, one]), int(left[image, one]) + side)
            patch = points[image, one, :, rows, columns]
            patch.copy_(torch.rand(patch.shape, generator=draw))
    row = torch.arange(count).repeat_interleave(depth)
    return points.flatten(0, 1), row, (top.flatten(), left.flatten())


@pytest.mark.parametrize(("name", "channels", "size"), NETWORKS)
@pytest.mark.parametrize("side", [1, 2, 3, 5, 7])
def test_a_window_changes_the_logits_as_a_whole_pass_does(name, channels, size, side):
    net, draw = network(name, channels, size), torch.Generator().manual_seed(side)
    x = torch.rand(3, channels, *size, generator=draw)
    form = Windowed(net, x)
    points, row, corner = changed(x, 9, side, draw)
    found = form.logits(points, form.maps(x), row, corner, side)
    wanted = net(points)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    # The windows count: the known images have other logits.
    assert float((wanted - net(x)[row]).abs().max()) > 1e-3 * float(wanted.abs().max())


def test_a_kernel_smaller_than_its_stride_ends_the_chain():
    net = Wide().eval().requires_grad_(False)
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 15, 15, generator=draw)
    form = Windowed(net, x)
    points, row, corner = changed(x, 6, 2, draw)
    found = form.logits(points, form.maps(x), row, corner, 2)
    torch.testing.assert_close(found, net(points), rtol=1e-4, atol=1e-5)


def test_a_window_may_end_outside_the_image():
    """One side serves windows of several sides, so a small window at the border is too large."""
    net = network("fast-at-mnist", 1, (28, 28))
    x = torch.rand(2, 1, 28, 28)
    points = x.clone()
    points[:, :, 27, 26:] = 0.5
    corner = (torch.tensor([27, 27]), torch.tensor([26, 26]))
    form = Windowed(net, x)
    found = form.logits(points, form.maps(x), torch.arange(2), corner, 4)
    torch.testing.assert_close(found, net(points), rtol=1e-4, atol=1e-6)


def test_known_images_leave_and_move():
    net = network("fast-at-mnist", 1, (28, 28))
    draw = torch.Generator().manual_seed(1)
    x = torch.rand(6, 1, 28, 28, generator=draw)
    oracle = Oracle(net, x)
    near = Nearby(oracle, x)
    kept, moved = torch.tensor([1, 0, 1, 1, 0, 1]).bool(), torch.tensor([0, 1, 0, 1]).bool()
    near.keep(kept)
    x = torch.where(moved.view(-1, 1, 1, 1), torch.rand(4, 1, 28, 28, generator=draw), x[kept])
    near.move(moved, x)
    points, row, corner = changed(x, 5, 3, draw)
    torch.testing.assert_close(
        near.logits(points, row, corner, 3), net(points), rtol=1e-4, atol=1e-6
    )
    assert oracle.forward_images == 20


@pytest.mark.parametrize(("side", "whole"), [(2, 0), (20, 1)])
def test_a_large_window_passes_whole_images(monkeypatch, side, whole):
    net = network("fast-at-mnist", 1, (28, 28))
    draw = torch.Generator().manual_seed(2)
    x = torch.rand(2, 1, 28, 28, generator=draw)
    oracle = Oracle(net, x)
    calls, logits = [], oracle.logits
    monkeypatch.setattr(oracle, "logits", lambda x: calls.append(len(x)) or logits(x))
    near = Nearby(oracle, x)
    points, row, corner = changed(x, 3, side, draw)
    torch.testing.assert_close(near.logits(points, row, corner, side), net(points))
    assert calls == [6] * whole


def test_a_network_that_is_no_chain_passes_whole_images():
    x = torch.rand(4, 3, 16, 16)
    resnet = models.build("preact-resnet18", in_channels=3, image_size=16, classes=5, width=8)
    assert windowed(resnet.eval(), x) is None


def test_a_costly_rest_of_the_network_counts():
    """The first convolution is a hundredth of the network, so windows would save nothing."""

    class Heavy(models.Chain):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
            # Its stride leaves pixels over, so the chain of levels ends before it.
            self.conv2 = nn.Conv2d(8, 512, 3, stride=2, padding=1)
            self.rest = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 5))

        @property
        def layers(self) -> list[nn.Module]:
            return [self.conv2, self.rest]

    assert windowed(Heavy().eval(), torch.rand(4, 3, 16, 16)) is None


def test_square_finds_the_same_adversaries_by_windows():
    net = network("fast-at-mnist", 1, (28, 28))
    draw = torch.Generator().manual_seed(3)
    x = torch.rand(40, 1, 28, 28, generator=draw)
    y = net(x).argmax(1)
    answers = []
    for windows in (True, False):
        oracle = Oracle(net, x)
        assert oracle.windowed is not None
        if not windows:
            oracle.windowed = None
        options = {"queries": 600, "rows": 200, "draw": torch.Generator().manual_seed(0)}
        found, adversaries = square(oracle, x, y, Linf(0.03), **options)
        answers.append((found, adversaries, oracle.forward_images))
    (found, adversaries, tried), (wanted, others, without) = answers
    assert 4 < len(wanted) < 40
    assert torch.equal(found, wanted)
    torch.testing.assert_close(adversaries, others, rtol=0, atol=1e-6)
    assert abs(tried - without) < 0.01 * without


class Standardised(nn.Conv2d):
    """A convolution with another forward pass than its class says."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


def hooked(conv):
    """The same by a hook, as torch.nn.utils.spectral_norm does it."""
    conv.register_forward_hook(lambda conv, _, out: 2 * out)
    return conv


@pytest.mark.parametrize(
    "conv",
    [lambda c, o: Standardised(c, o, 3, padding=1), lambda c, o: hooked(nn.Conv2d(c, o, 3))],
    ids=["subclass", "hook"],
)
@pytest.mark.parametrize("place", ["stem", "second"])
def test_a_convolution_with_its_own_forward_pass_is_not_taken_for_a_plain_one(conv, place):
    class Special(models.Chain):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv1 = conv(1, 4) if place == "stem" else nn.Conv2d(1, 4, 3, padding=1)
            self.conv2 = conv(4, 4) if place == "second" else nn.Conv2d(4, 4, 3, padding=1)
            self.fc = nn.LazyLinear(5)

        @property
        def layers(self):
            return [nn.ReLU(), self.conv2, nn.ReLU(), nn.Flatten(), self.fc]

    net, draw = Special().eval(), torch.Generator().manual_seed(0)
    x = torch.rand((3, 1, 12, 12), generator=draw)
    net(x)
    net.requires_grad_(False)
    pixels = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(net(pixels).square().sum(), pixels)
    oracle = Oracle(net, x)
    _, found = oracle.gradient(x, lambda logits: 2 * logits)
    torch.testing.assert_close(found, wanted)
    points, row, corner = changed(x, 6, 2, draw)
    near = Nearby(oracle, x)
    torch.testing.assert_close(near.logits(points, row, corner, 2), net(points))


def test_a_form_for_windows_that_gives_other_logits_is_not_used(monkeypatch, caplog):
    net = network("fast-at-mnist", 1, (28, 28))
    monkeypatch.setattr(Windowed, "logits", lambda self, points, *_: torch.zeros(len(points), 5))
    assert windowed(net, torch.rand(2, 1, 28, 28)) is None
    assert "Square passes whole images, not windows of them" in caplog.text
