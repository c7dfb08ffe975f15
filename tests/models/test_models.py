"""The networks: known sizes and names, the promise of stem and body, and what `build` refuses."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import relu

from engine import kernels
from engine.errors import EngineError
from engine.models import MODELS, Network, build, stem_of

# Name, image channels and size it is known for, parameters at 10 classes. ResNet-18's and
# WRN-34-10's are published; the others are sums over the layers of their definitions.
KNOWN = {
    "tiny-cnn": (1, 8, 38_282),
    "fast-at-mnist": (1, 28, 166_406),
    "small-cnn": (1, 28, 312_202),
    "resnet18": (3, 32, 11_173_962),
    "preact-resnet18": (3, 32, 11_171_146),
    "wide-resnet28-10": (3, 32, 36_479_194),
    "wide-resnet34-10": (3, 32, 46_160_474),
}
SMALL = ("tiny-cnn", "fast-at-mnist", "small-cnn")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


def make(name: str, *, normalised: bool = False, seed: int = 0, size: int | None = None) -> Network:
    channels, known_size, _ = KNOWN[name]
    torch.manual_seed(seed)
    norm = {"mean": MEAN[:channels], "std": STD[:channels]} if normalised else {}
    model = build(name, in_channels=channels, image_size=size or known_size, classes=10, **norm)
    if name == "small-cnn":
        # Its last layer starts at zero, which would make every comparison 0 == 0.
        nn.init.normal_(model.classifier.fc3.weight, std=0.1)
    return model


def pictures(model: Network, batch: int = 3, size: int = 16) -> torch.Tensor:
    draw = torch.Generator().manual_seed(7)
    return torch.rand(batch, model.stem_conv.in_channels, size, size, generator=draw)


@pytest.fixture(params=sorted(KNOWN))
def network(request):
    """Every network at 16x16, normalised, with BatchNorm statistics that are not the identity."""
    model = make(request.param, normalised=True, size=16)
    draw = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1, generator=draw)
            module.running_var.uniform_(0.5, 1.5, generator=draw)
    return model.eval()


# ---- size and names --------------------------------------------------------------------------


def test_every_registered_network_is_tested_here():
    assert set(KNOWN) == set(MODELS)


@pytest.mark.parametrize("name", KNOWN)
def test_parameter_count(name):
    with torch.device("meta"):
        model = make(name)
    assert sum(p.numel() for p in model.parameters()) == KNOWN[name][2]


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def test_state_dict_of_the_small_networks():
    assert shapes(make("tiny-cnn")) == {
        "conv1.weight": (16, 1, 3, 3),
        "conv1.bias": (16,),
        "conv2.weight": (32, 16, 3, 3),
        "conv2.bias": (32,),
        "fc1.weight": (64, 512),
        "fc1.bias": (64,),
        "fc2.weight": (10, 64),
        "fc2.bias": (10,),
    }
    assert shapes(make("fast-at-mnist")) == {
        "0.weight": (16, 1, 4, 4),
        "0.bias": (16,),
        "2.weight": (32, 16, 4, 4),
        "2.bias": (32,),
        "5.weight": (100, 1568),
        "5.bias": (100,),
        "7.weight": (10, 100),
        "7.bias": (10,),
    }
    assert shapes(make("small-cnn")) == {
        "feature_extractor.conv1.weight": (32, 1, 3, 3),
        "feature_extractor.conv1.bias": (32,),
        "feature_extractor.conv2.weight": (32, 32, 3, 3),
        "feature_extractor.conv2.bias": (32,),
        "feature_extractor.conv3.weight": (64, 32, 3, 3),
        "feature_extractor.conv3.bias": (64,),
        "feature_extractor.conv4.weight": (64, 64, 3, 3),
        "feature_extractor.conv4.bias": (64,),
        "classifier.fc1.weight": (200, 1024),
        "classifier.fc1.bias": (200,),
        "classifier.fc2.weight": (200, 200),
        "classifier.fc2.bias": (200,),
        "classifier.fc3.weight": (10, 200),
        "classifier.fc3.bias": (10,),
    }


def batch_norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    keys = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{k}": (channels,) for k in keys} | {f"{name}.num_batches_tracked": ()}


@pytest.mark.parametrize("preact", [False, True])
def test_state_dict_of_the_resnets(preact):
    expected = {"conv1.weight": (64, 3, 3, 3)}
    expected |= {"linear.weight": (10, 512), "linear.bias": (10,)}
    expected |= {} if preact else batch_norm("bn1", 64)
    before = 64
    for layer, width in enumerate((64, 128, 256, 512), start=1):
        for block in (0, 1):
            at, channels = f"layer{layer}.{block}", before if block == 0 else width
            expected[f"{at}.conv1.weight"] = (width, channels, 3, 3)
            expected[f"{at}.conv2.weight"] = (width, width, 3, 3)
            expected |= batch_norm(f"{at}.bn1", channels if preact else width)
            expected |= batch_norm(f"{at}.bn2", width)
            if layer > 1 and block == 0:
                expected[f"{at}.shortcut.0.weight"] = (width, channels, 1, 1)
                expected |= {} if preact else batch_norm(f"{at}.shortcut.1", width)
        before = width
    with torch.device("meta"):
        assert shapes(make("preact-resnet18" if preact else "resnet18")) == expected


@pytest.mark.parametrize("name", ["resnet18", "preact-resnet18"])
def test_a_thin_resnet_has_the_same_names_and_every_channel_count_scaled(name):
    with torch.device("meta"):
        whole = shapes(build(name, in_channels=3, image_size=32, classes=10, width=64))
        thin = shapes(build(name, in_channels=3, image_size=32, classes=10, width=8))
        assert whole == shapes(make(name))
    ends = {3, 10, 1}  # images' channels, classes, a 1x1 kernel
    for key, shape in whole.items():
        kernel = shape[2:]
        assert thin[key] == tuple(n if n in ends else n // 8 for n in shape[:2]) + kernel, key


def test_width_of_a_network_that_has_one_only_is_refused():
    with pytest.raises(EngineError, match=r"fast-at-mnist has one width.*resnet18"):
        build("fast-at-mnist", in_channels=1, image_size=28, classes=10, width=8)
    with pytest.raises(EngineError, match="width of model resnet18 must be at least 1"):
        build("resnet18", in_channels=1, image_size=28, classes=10, width=0)


def test_state_dict_of_the_wide_resnet():
    expected = {"conv1.weight": (16, 3, 3, 3), "fc.weight": (10, 640), "fc.bias": (10,)}
    expected |= batch_norm("bn1", 640)
    before = 16
    for stage, width in enumerate((160, 320, 640), start=1):
        for block in range(5):
            at, channels = f"block{stage}.layer.{block}", before if block == 0 else width
            expected |= batch_norm(f"{at}.bn1", channels) | batch_norm(f"{at}.bn2", width)
            expected[f"{at}.conv1.weight"] = (width, channels, 3, 3)
            expected[f"{at}.conv2.weight"] = (width, width, 3, 3)
            if block == 0:
                expected[f"{at}.convShortcut.weight"] = (width, channels, 1, 1)
        before = width
    with torch.device("meta"):
        assert shapes(make("wide-resnet34-10")) == expected


@pytest.mark.parametrize("name", ["fast-at-mnist", "preact-resnet18"])
def test_only_normalisation_adds_mu_and_sigma(name):
    plain, normalised = shapes(make(name)), shapes(make(name, normalised=True))
    channels = KNOWN[name][0]
    shape = (1, channels, 1, 1)
    assert normalised == plain | {"mu": shape, "sigma": shape}


# ---- what they compute -----------------------------------------------------------------------


def test_fast_at_mnist_is_its_sequential():
    model = make("fast-at-mnist")
    original = nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(1568, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )
    original.load_state_dict(model.state_dict())
    x = pictures(model, size=28)
    assert torch.equal(model(x), original(x))


def test_small_cnn_pools_before_relu_without_changing_anything():
    model = make("small-cnn").eval()
    features = model.feature_extractor
    x = pictures(model, size=28).requires_grad_()
    h = relu(features.conv2(relu(model.stem(x))))
    h = features.maxpool1(h)
    h = relu(features.conv4(relu(features.conv3(h))))
    expected = model.classifier(features.maxpool2(h).flatten(1))
    logits = model(x)
    assert torch.equal(logits, expected)
    seed = torch.randn_like(logits)
    (grad,) = torch.autograd.grad(logits, x, seed)
    (expected_grad,) = torch.autograd.grad(expected, x, seed)
    assert grad.abs().max() > 0
    assert torch.equal(grad, expected_grad)


@pytest.mark.parametrize(("name", "from_activation"), [("preact", False), ("wide", True)])
def test_where_a_pre_activation_shortcut_begins(name, from_activation):
    """RobustBench's PreActBlock widens its shortcut from x, its WideResNet from relu(bn1(x))."""
    if name == "preact":
        block = make("preact-resnet18").layer2[0]
        shortcut = block.shortcut
    else:
        block = make("wide-resnet34-10").block1.layer[0]
        shortcut = block.convShortcut
    block.eval()
    nn.init.uniform_(block.bn1.weight, 0.5, 1.5)
    x = torch.randn(2, block.conv1.in_channels, 6, 6, generator=torch.Generator().manual_seed(2))
    active = relu(block.bn1(x))
    out = block.conv2(relu(block.bn2(block.conv1(active))))
    expected = out + shortcut(active if from_activation else x)
    torch.testing.assert_close(block(x), expected)


def test_normalisation_is_part_of_the_model():
    plain, normalised = make("resnet18").eval(), make("resnet18", normalised=True).eval()
    x = pictures(plain)
    mu, sigma = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    assert torch.equal(normalised(x), plain((x - mu) / sigma))
    assert not torch.allclose(normalised(x), plain(x))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("size", "classes"), [(16, 2), (32, 100)])
def test_other_image_sizes_and_class_counts(name, size, classes):
    model = build(name, in_channels=2, image_size=size, classes=classes)
    assert model(torch.rand(3, 2, size, size)).shape == (3, classes)


def test_odd_image_sizes_where_the_network_allows():
    for name, size in (("tiny-cnn", 9), ("small-cnn", 17), ("preact-resnet18", 13)):
        model = build(name, in_channels=1, image_size=size, classes=10)
        assert model(torch.rand(2, 1, size, size)).shape == (2, 10)


def test_initialisation_of_the_originals():
    small = build("small-cnn", in_channels=1, image_size=28, classes=10)
    assert torch.equal(small.eval()(pictures(small, size=28)), torch.zeros(3, 10))
    torch.manual_seed(0)
    conv = make("small-cnn").feature_extractor.conv4
    # Kaiming-normal over the fan in: 64 channels of 3x3.
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.05)
    assert not conv.bias.any()
    wide = make("wide-resnet34-10")
    conv = wide.block2.layer[0].conv1
    # Over the fan out: 320 channels of 3x3, where the fan in has 160.
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (320 * 9)), rel=0.05)
    assert not wide.fc.bias.any()


# ---- stem and body ---------------------------------------------------------------------------


def test_forward_is_body_of_stem_bit_for_bit(network):
    x = pictures(network)
    with torch.no_grad():
        h = network.stem(x)
        before = h.clone()
        logits = network.body(h)
        assert torch.equal(logits, network(x))
    assert logits.abs().max() > 0
    assert torch.equal(h, before), "body wrote into its argument"


def test_stem_gradient_and_input_grad_step_are_autograd_to_the_pixels(network):
    network.double()
    x = pictures(network).double()
    seed = torch.randn(3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    pixels = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(network(pixels), pixels, seed)

    with torch.no_grad():
        h = network.stem(x)
    h.requires_grad_()
    (stem_grad,) = torch.autograd.grad(network.body(h), h, seed)
    stem = stem_of(network)
    assert not stem.weight.requires_grad
    grad = torch.nn.grad.conv2d_input(
        x.shape, stem.weight, stem_grad, stride=stem.stride, padding=stem.padding
    )
    assert expected.abs().max() > 0
    torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-12)

    # A normalised step keeps the gradient's size relations, which a sign would hide.
    how = {"eps": 0.3, "alpha": 0.2, "norm": "L2"}
    stepped = kernels.input_grad_step(
        x, x, stem_grad, stem.weight, stride=stem.stride, padding=stem.padding, **how
    )
    torch.testing.assert_close(stepped, kernels.attack_step(x, x, expected, **how))


@pytest.mark.parametrize("name", SMALL)
def test_gradients_of_images_and_weights_are_those_of_double_precision(name):
    """The stem's gradients are ops in float32 and the library's in float64; a penalty takes them
    twice.
    """
    model = make(name, normalised=True)
    exact = make(name, normalised=True).double()
    channels, size, _ = KNOWN[name]
    pixels = torch.rand(3, channels, size, size, generator=torch.Generator().manual_seed(1))
    found = []
    for net in (model, exact):
        weight = net.stem_conv.weight
        x = pixels.to(weight.dtype).requires_grad_()
        loss = net.stem(x).sin().sum()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        twice = torch.autograd.grad(grad.square().sum(), (x, weight), retain_graph=True)
        found.append([grad, *twice, *torch.autograd.grad(loss, (weight, net.stem_conv.bias))])
    for one, other in zip(*found, strict=True):
        assert one.dtype == torch.float32
        error = (one.double() - other).norm() / other.norm()
        assert error < 1e-5


@pytest.mark.parametrize("name", ["resnet18", "preact-resnet18"])
def test_gradient_of_a_narrow_shortcut_in_channels_last(name):
    """oneDNN's weight gradient of a strided 1x1 convolution of few channels crashes here."""
    torch.manual_seed(0)
    network = build(name, in_channels=3, image_size=64, classes=4, width=4)
    conv = network.layer2[0].shortcut[0].to(memory_format=torch.channels_last)
    assert (conv.in_channels, conv.stride) == (4, (2, 2))
    exact = copy.deepcopy(conv).double()
    x = torch.rand(20, 4, 64, 64).to(memory_format=torch.channels_last)
    h, wanted = conv(x), torch.conv2d(x.double(), exact.weight, stride=2)
    torch.testing.assert_close(h.double(), wanted, rtol=1e-5, atol=1e-5)
    h.square().sum().backward()
    wanted.square().sum().backward()
    torch.testing.assert_close(conv.weight.grad.double(), exact.weight.grad, rtol=1e-5, atol=1e-5)


def test_torch_func_differentiates_by_the_image():
    model = make("fast-at-mnist")
    x = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(1))

    def loss(x):
        return model(x).square().sum()

    point = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(point), point)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)


def test_stem_follows_the_weights():
    for normalised in (False, True):
        model = make("tiny-cnn", normalised=normalised)
        with torch.no_grad():
            model.conv1.weight.fill_(2.0)
        sigma = STD[0] if normalised else 1.0
        torch.testing.assert_close(stem_of(model).weight, torch.full((16, 1, 3, 3), 2.0 / sigma))


class Theirs(nn.Module):
    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.stem_conv = conv

    def stem(self, x):
        return self.stem_conv(x)

    def body(self, h):
        return h.mean((2, 3))

    def forward(self, x):
        return self.body(self.stem(x))


def test_a_weight_is_laid_out_once_for_several_steps():
    weight = torch.randn(5, 3, 2, 4)
    laid_out = kernels.outputs_innermost(weight)
    assert torch.equal(laid_out, weight)
    assert laid_out.stride(0) == 1
    assert kernels.outputs_innermost(laid_out) is laid_out
    # A division keeps the order: the copy is not made again.
    scaled = laid_out / torch.ones(1, 3, 1, 1)
    assert kernels.outputs_innermost(scaled) is scaled


def test_stem_of_a_foreign_module_that_exposes_one():
    conv = nn.Conv2d(3, 6, 5, stride=2, padding=2)
    stem = stem_of(Theirs(conv))
    assert (stem.stride, stem.padding) == (2, 2)
    assert torch.equal(stem.weight, conv.weight)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 8, 3, groups=2),
        nn.Conv2d(4, 8, 3, dilation=2),
        nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 8, 3, stride=(1, 2)),
        nn.Conv2d(4, 8, 3, padding=(1, 0)),
        nn.Conv2d(4, 8, 3, padding="same"),
        nn.ConvTranspose2d(4, 8, 3),
        nn.Linear(4, 8),
    ],
    ids=str,
)
def test_no_stem_where_the_convolution_is_not_plain(conv):
    assert stem_of(Theirs(conv)) is None


def test_no_stem_without_body_or_in_ordinary_modules():
    headless = Theirs(nn.Conv2d(3, 6, 3))
    headless.body = None
    assert stem_of(headless) is None
    assert stem_of(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())) is None
    assert stem_of(nn.Linear(3, 3)) is None


# ---- in use ----------------------------------------------------------------------------------


def test_train_mode_learns_batch_statistics_and_eval_does_not():
    model = make("preact-resnet18")
    x = pictures(model, batch=4)
    statistics = model.layer1[0].bn1.running_mean
    model.eval()
    first = model(x)
    assert torch.equal(model(x), first)
    assert not statistics.any()
    model.train()
    assert not torch.allclose(model(x), first, atol=1e-3)
    assert statistics.any()


def test_small_cnn_drops_out_in_training_only():
    model = make("small-cnn")
    x = pictures(model, size=28)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_every_parameter_gets_a_gradient(network):
    network.train()
    nn.functional.cross_entropy(network(pictures(network)), torch.tensor([0, 1, 2])).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_channels_last_computes_the_same(network):
    x = pictures(network)
    with torch.no_grad():
        expected = network(x)
        network.to(memory_format=torch.channels_last)
        logits = network(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_one_graph_without_a_break():
    model = make("small-cnn", normalised=True).eval()
    x = pictures(model, size=28)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), model(x))


@pytest.mark.parametrize("name", [n for n in KNOWN if not n.startswith("wide")])
def test_state_dict_survives_safetensors(name, tmp_path):
    model, other = make(name, normalised=True), make(name, normalised=True, seed=1)
    x = pictures(model, size=KNOWN[name][1])
    other.mu.zero_()
    model.eval(), other.eval()
    assert not torch.equal(model(x), other(x))
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    other.load_state_dict(load_file(path))
    assert torch.equal(model(x), other(x))


def test_sub_block1_of_a_checkpoint_can_be_dropped():
    with torch.device("meta"):
        model = make("wide-resnet34-10")
        state = model.state_dict()
    state |= {f"sub_block1.{k[7:]}": v for k, v in state.items() if k.startswith("block1.")}
    with pytest.raises(RuntimeError, match="sub_block1"):
        model.load_state_dict(state)
    model.load_state_dict({k: v for k, v in state.items() if not k.startswith("sub_block1.")})


# ---- what build refuses ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("smallcnn", "small-cnn"),
        ("ResNet-18", "resnet18"),
        ("wrn-34-10", "wide-resnet34-10"),
        ("PreActResNet18", "preact-resnet18"),
    ],
)
def test_an_unknown_name_gets_the_nearest(name, near):
    with pytest.raises(EngineError) as error:
        build(name, in_channels=1, image_size=28, classes=10)
    assert f"{name!r}: did you mean {near!r}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 30}, "fast-at-mnist needs an image size divisible by 4, got 30"),
        ({"name": "small-cnn", "image_size": 15}, "small-cnn needs images of 16x16 or more"),
        ({"image_size": 0}, "image_size of model fast-at-mnist must be at least 1, got 0"),
        ({"in_channels": 0}, "in_channels of model fast-at-mnist must be at least 1, got 0"),
        ({"classes": 1}, "classes of model fast-at-mnist must be at least 2, got 1"),
        ({"mean": (0.5,)}, "needs both mean and std"),
        ({"mean": (0.5, 0.5), "std": (0.5,)}, "mean has 2 values, the images 1 channels"),
        ({"mean": (0.5,), "std": (0.5, 0.5)}, "std has 2 values, the images 1 channels"),
        ({"mean": (0.5,), "std": (0.0,)}, "std must be positive"),
        ({"mean": (0.5,), "std": (float("nan"),)}, "std must be positive"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(change, message):
    arguments = {"name": "fast-at-mnist", "in_channels": 1, "image_size": 28, "classes": 10}
    with pytest.raises(EngineError) as error:
        build(**arguments | change)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
