"""Other people's networks: the stem that is found, what they must return, dropout, packages."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn

from engine import cli, kernels, models, progress, rng
from engine.adversary.ascent import ForwardPass
from engine.errors import EngineError
from engine.models import dropout, foreign, sources, stem_of

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
SIZE = (12, 20)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """What one test registers and learns is gone for the next."""
    monkeypatch.setattr(models, "_registered", {})
    monkeypatch.setattr(foreign, "_known", {})
    monkeypatch.setattr(progress, "_announced", set())


def test_the_engines_networks_have_no_drop_path():
    with pytest.raises(EngineError, match="model tiny-cnn has no drop-path"):
        models.build("tiny-cnn", in_channels=1, image_size=8, classes=4, drop_path=0.1)


def head(channels: int, classes: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, classes)]


def plain(channels, size, classes):
    layers = [nn.Conv2d(channels, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*layers, *head(6, classes))


def in_place(channels, size, classes):
    return nn.Sequential(nn.Conv2d(channels, 6, 3), nn.ReLU(inplace=True), *head(6, classes))


class Patches(nn.Module):
    """A vision transformer's first layers: patches, a check of the images' size, attention."""

    def __init__(self, channels, size, classes):
        super().__init__()
        self.size = tuple(size)
        self.proj = nn.Conv2d(channels, 8, 4, stride=4)
        self.norm, self.attention = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, classes)

    def forward(self, x):
        assert tuple(x.shape[2:]) == self.size, "wrong size"
        h = self.norm(self.proj(x).flatten(2).transpose(1, 2))
        return self.out((h + self.attention(h, h, h)[0]).mean(1))


class Twice(nn.Module):
    """The images reach the logits by a second way: the convolution alone does not carry them."""

    def __init__(self, channels, size, classes):
        super().__init__()
        self.net = plain(channels, size, classes)

    def forward(self, x):
        return self.net(x) + x.mean()


class TwiceBehindZeros(Twice):
    """Its head starts at zero: what it does with the images shows in no logit."""

    def __init__(self, channels, size, classes):
        super().__init__(channels, size, classes)
        self.head = nn.Linear(classes, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        return self.head(super().forward(x))


def shared(channels, size, classes):
    conv = nn.Conv2d(channels, channels, 3, padding=1)
    return nn.Sequential(conv, nn.Tanh(), conv, *head(channels, classes))


def grouped(channels, size, classes):
    conv = nn.Conv2d(channels, channels, 3, groups=channels)
    return nn.Sequential(conv, nn.Tanh(), *head(channels, classes))


def build(make, **options):
    models.register("mine")(make)
    torch.manual_seed(0)
    options = {"in_channels": 3, "image_size": SIZE, "classes": 5, **options}
    return models.build("mine", mean=MEAN, std=STD, **options)


@pytest.mark.parametrize(
    ("make", "has_stem"),
    [
        *((make, True) for make in (plain, in_place, Patches)),
        *((make, False) for make in (Twice, TwiceBehindZeros, shared, grouped)),
    ],
)
def test_the_attack_gradient_of_a_foreign_network_is_autograds(make, has_stem, caplog):
    model = build(make).eval()
    if make is TwiceBehindZeros:
        assert not model.net.head.weight.any()
        nn.init.normal_(model.net.head.weight)
    stem = stem_of(model)
    assert (stem is not None) == has_stem
    assert ("down to the pixels" in caplog.text) != has_stem
    torch.manual_seed(1)
    x = torch.rand(3, 3, *SIZE, requires_grad=True)
    inner, scaled = model.net, (x - model.mu) / model.sigma
    towards = torch.randn(3, 5)
    expected = inner(scaled)
    (wanted,) = torch.autograd.grad(expected, x, towards)
    attacked = ForwardPass.of_attack(model, stem, x.detach())
    grad = attacked.gradient(lambda _: towards)
    if stem is not None:
        grad = kernels.stem_input_grad(
            grad, stem.weight, size=SIZE, stride=stem.stride, padding=stem.padding
        )
    torch.testing.assert_close(attacked.logits, expected)
    torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-6)
    # The training pass has weight gradients, and the copy that is averaged is a network too.
    model.zero_grad()
    copy.deepcopy(model).train()(x.detach()).sum().backward()
    model.train()(x.detach()).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_foreign_state_dict_has_the_modules_own_names():
    model = build(plain)
    assert set(model.state_dict()) == {*model.net.state_dict(), "mu", "sigma"}
    other = build_again(plain)
    other.load_state_dict(model.state_dict())
    pairs = zip(other.parameters(), model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    model.net.load_state_dict({k: v for k, v in other.state_dict().items() if k[0] not in "ms"})
    with pytest.raises(RuntimeError, match="nowhere"):
        other.load_state_dict({**model.state_dict(), "nowhere": torch.zeros(1)})


def build_again(make):
    torch.manual_seed(9)
    return models.build("mine", in_channels=3, image_size=SIZE, classes=5, mean=MEAN, std=STD)


def test_a_second_network_of_the_name_has_the_stem_that_was_found(monkeypatch):
    build(in_place)
    monkeypatch.setattr(foreign, "_probed", lambda *_: pytest.fail("looked twice"))
    again = build_again(in_place).eval()
    assert stem_of(again) is not None
    torch.testing.assert_close(again(x := torch.rand(2, 3, *SIZE)), again.body(again.stem(x)))


def test_looking_at_a_network_changes_neither_its_buffers_nor_the_generator():
    torch.manual_seed(0)
    wanted = plain(3, SIZE, 5).state_dict()
    drawn = torch.rand(3)
    model = build(plain)
    assert torch.equal(torch.rand(3), drawn)
    assert model.training
    assert all(torch.equal(model.state_dict()[name], t) for name, t in wanted.items())


class Returns(nn.Module):
    def __init__(self, change, channels, classes):
        super().__init__()
        self.conv, self.change = nn.Conv2d(channels, classes, 3), change

    def forward(self, x):
        return self.change(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h: h.softmax(1), "returns probabilities: it must return logits"),
        (lambda h: h[:, :3], r"returns \[2, 3\] for 2 images of 5 classes"),
        (lambda h: h * torch.nan, "returns NaN or infinity"),
        (lambda h: {"logits": h}, "returns a dict: it must return the logits alone"),
        (lambda h: (h, h), "returns a tuple"),
        (lambda h: h.argmax(1, keepdim=True).expand(-1, 5), "logits are float numbers"),
        (lambda h: h @ torch.ones(7, 7), "does not take images of 3x12x20.*RuntimeError"),
    ],
)
def test_a_network_that_returns_no_logits_gives_one_line(change, said):
    with pytest.raises(EngineError, match=f"network mine .*{said}") as caught:
        build(lambda channels, size, classes: Returns(change, channels, classes))
    assert "\n" not in str(caught.value)


def test_logits_of_a_log_softmax_are_logits():
    build(lambda channels, size, classes: Returns(lambda h: h.log_softmax(1), channels, classes))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda *_: 1 / 0, "cannot be made for images of 3x12x20 and 5 classes: ZeroDivision"),
        (lambda *_: "no module", "returned no module"),
        (lambda *_: nn.Flatten(), "no parameters"),
    ],
)
def test_a_maker_that_fails_gives_one_line(make, said):
    with pytest.raises(EngineError, match=said):
        build(make)


def test_a_name_is_registered_once():
    models.register("mine")(plain)
    for name in ("mine", "resnet18"):
        with pytest.raises(EngineError, match="already"):
            models.register(name)(plain)
    with pytest.raises(EngineError, match="plain word"):
        models.register("timm/mine")
    assert models.names()[-1] == "mine"


def test_a_foreign_network_is_exported_in_one_piece():
    model, x = build(in_place).eval(), torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        traced = torch.jit.trace(model, x)
        exported = torch.export.export(model, (x,)).module()
        for graph in (traced, exported):
            torch.testing.assert_close(graph(x), model(x))


# Dropout


class Masked(nn.Module):
    def __init__(self, *masks: nn.Module) -> None:
        super().__init__()
        self.masks = nn.ModuleList(masks)

    def forward(self, h):
        return [mask(h) for mask in self.masks]


def test_masks_follow_the_steps_random_state():
    net = Masked(nn.Dropout(0.25), nn.Dropout2d(0.25), dropout.DropPath(0.25))
    dropout.adopt(net)
    state = rng.state(3)
    dropout.follow(net, state)
    h = torch.ones(400, 5, 3, 3)
    before = torch.get_rng_state()
    first = net(h)
    assert all(torch.equal(a, b) for a, b in zip(first, net(h), strict=True))
    state[1] += 1
    assert not any(torch.equal(a, b) for a, b in zip(first, net(h), strict=True))
    assert torch.equal(before, torch.get_rng_state())
    for masked in first:
        assert masked.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
        assert masked.mean() == pytest.approx(1, abs=0.15)
    # Whole channels, and whole images.
    assert first[1].flatten(2).std(2).max() == 0
    assert first[2].flatten(1).std(1).max() == 0
    assert first[1].flatten(1).std(1).max() > 0
    assert all(torch.equal(h, kept) for kept in net.eval()(h))


def test_numbers_drawn_outside_the_steps_state_are_announced_once(caplog):
    class Noisy(nn.Module):
        def __init__(self, channels, size, classes):
            super().__init__()
            self.net = plain(channels, size, classes)

        def forward(self, x):
            return nn.functional.dropout(self.net(x), 0.5, self.training)

    build(Noisy)
    build_again(Noisy)
    assert caplog.text.count("draws random numbers outside the run's own random state") == 1
    models.register("quiet")(plain)
    models.build("quiet", in_channels=3, image_size=SIZE, classes=5)
    assert "quiet draws" not in caplog.text


# Packages


def test_a_package_that_is_absent_or_broken_gives_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("timm", "torchvision"):
        monkeypatch.setitem(sys.modules, name, None)
    words = ["train", "quickstart", "--run-dir", "run", "--model.name", "timm/resnet18"]
    assert cli.run(words) == 2
    err = capsys.readouterr().err
    assert err == "engine: timm is not installed: pip install 'robust-engine[models]'\n"
    assert not (tmp_path / "run").exists()
    (tmp_path / "timm.py").write_text("raise RuntimeError('no operator')")
    monkeypatch.delitem(sys.modules, "timm")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EngineError, match="timm does not import here: no operator"):
        models.build("timm/resnet18", in_channels=3, image_size=8, classes=3)
    assert set(sources.SOURCES) == {"timm", "torchvision"}
