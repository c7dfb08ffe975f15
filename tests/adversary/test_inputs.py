"""What users hand to an evaluation: every fault in one line, and everything allowed is attacked."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import engine
from engine import EngineError
from engine.device import precision
from engine.evaluation.autoattack import ensemble
from engine.evaluation.autoattack import square as square_module

BALL = engine.Linf(0.1)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Few steps and queries: what is tested here does not depend on their number."""
    monkeypatch.setattr(ensemble, "STEPS", 5)
    monkeypatch.setattr(ensemble, "QUERIES", 80)


class Net(nn.Module):
    """A convolution and a linear layer: random weights, right on the labels that it gives."""

    def __init__(self, size=(6, 6), classes=4, channels=1):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.fc = nn.Linear(4 * size[0] * size[1], classes)

    def forward(self, x):
        return self.fc(torch.relu(self.conv(x)).flatten(1))


def images(*shape):
    return torch.rand(shape or (6, 1, 6, 6), generator=torch.Generator().manual_seed(1))


def labels(net, x):
    with torch.no_grad():
        return net(x).argmax(1)


def autoattack(net, x, y, **options):
    return engine.autoattack(net, x, y, BALL, version="apgd", **options)


def evaluate(net, x, y, **options):
    fast = {"pgd_steps": 2, "pgd_restarts": 1, "autoattack_version": "apgd", "judge": "engine"}
    return engine.evaluate(net, x, y, BALL, **(fast | options))


class Shifts(Net):
    def forward(self, x):
        return super().forward(x.sub_(0.5))


class Blind(Net):
    def forward(self, x):
        return super().forward(x.detach()).detach()


class Pair(Net):
    def forward(self, x):
        return super().forward(x), x


class Sums(Net):
    def forward(self, x):
        return super().forward(x).sum(1)


@pytest.mark.parametrize("judged", [autoattack, evaluate])
@pytest.mark.parametrize(
    ("net", "line"),
    [
        (Shifts(), "the model writes into the images"),
        (Blind(), "passes no gradient to its images"),
        (Pair(), r"must return logits \[N, K\], got tuple"),
        (Sums(), r"must return logits \[N, K\], got \(1,\)"),
        (Net(classes=1), "needs at least 2 classes, the model has 1"),
        (Net().half(), "the model's parameters are float16"),
        (torch.relu, "must be a torch.nn.Module"),
    ],
    ids=["writes", "no gradient", "a pair", "no classes", "one class", "half", "a function"],
)
def test_a_network_that_cannot_be_attacked_is_refused(judged, net, line):
    x = images()
    before = x.clone()
    with pytest.raises(EngineError, match=line):
        judged(net, x.clone(), torch.zeros(6, dtype=torch.int64))
    assert torch.equal(x, before)


@pytest.mark.parametrize("judged", [autoattack, evaluate])
@pytest.mark.parametrize(
    ("x", "y", "line"),
    [
        (images()[:0], torch.zeros(0, dtype=torch.int64), "each image needs a label"),
        (images(), torch.zeros(5, dtype=torch.int64), "each image needs a label"),
        (images(), torch.zeros(6), "labels must be whole numbers"),
        (images(), torch.zeros((6, 1), dtype=torch.int64), r"labels must be .* int64 \[6, 1\]"),
        (images(), torch.full((6,), 4), "labels from 4 to 4, but the model has 4 classes"),
        (images(), torch.full((6,), -1), "labels from -1"),
        (2 * images(), torch.zeros(6, dtype=torch.int64), r"float32 in \[0, 1\]"),
        (images().double(), torch.zeros(6, dtype=torch.int64), r"float32 in \[0, 1\]"),
        ([0.5], [1], "must be tensors or NumPy arrays, got list and list"),
        (images(6, 36), torch.zeros(6, dtype=torch.int64), r"\[6, 36\]"),
        (images().to("meta"), torch.zeros(6, dtype=torch.int64), "move them to one device"),
    ],
)
def test_images_and_labels_that_do_not_fit_are_refused(judged, x, y, line):
    net = Net() if not isinstance(x, torch.Tensor) or x.dim() == 4 else nn.Linear(36, 4)
    with pytest.raises(EngineError, match=line):
        judged(net, x, y)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"judge": "foo"}, "judge must be one of pyautoattack, engine, got 'foo'"),
        ({"autoattack_version": "std"}, "autoattack_version must be one of standard, apgd, none"),
        ({"precision": "float16"}, "precision must be one of fp32, bf16"),
        ({"pgd_steps": 0}, "pgd_steps must be at least 1"),
        ({"pgd_restarts": 0}, "pgd_restarts must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
    ],
)
def test_an_option_that_does_not_exist_is_refused(options, line):
    net, x = Net(), images()
    with pytest.raises(EngineError, match=line):
        evaluate(net, x, labels(net, x), **options)


def test_an_unknown_version_of_autoattack_is_refused():
    net, x = Net(), images()
    with pytest.raises(EngineError, match="version must be one of standard, apgd, got 'plus'"):
        engine.autoattack(net, x, labels(net, x), BALL, version="plus")


@pytest.mark.parametrize("call", ["train", "attack", "evaluate", "autoattack"])
def test_a_number_in_place_of_a_threat_is_refused(call):
    net, x = Net(), images()
    data = ((x, labels(net, x)),) if call == "train" else (x, labels(net, x))
    with pytest.raises(EngineError, match=r"must be engine.Linf.* or engine.L2.*, got float"):
        getattr(engine, call)(net, *data, 8 / 255)


def test_a_call_in_inference_mode_is_refused():
    net, x = Net(), images()
    with torch.inference_mode(), pytest.raises(EngineError, match=r"outside torch.inference_mode"):
        autoattack(net, x, labels(net, x))


def test_the_answer_does_not_depend_on_how_images_and_labels_come():
    """Labels of another integer type, arrays, images with a graph, images from inference mode."""
    net, x = Net(), images()
    y = labels(net, x)
    plain = autoattack(net, x, y)
    assert plain.robust.any()
    assert not plain.robust.all()
    with torch.inference_mode():
        inferred = x.clone()
    graph = x.clone().requires_grad_() * 1.0
    for given in ((x, y.int()), (x.numpy(), y.numpy().astype(np.int32)), (inferred, y), (graph, y)):
        found = autoattack(net, *given)
        assert torch.equal(found.robust, plain.robust)
        assert torch.equal(found.adversaries, plain.adversaries)
        assert not found.adversaries.requires_grad
    assert evaluate(net, x, y.int()).clean == 1.0
    assert torch.equal(engine.attack(net, x, y.int(), BALL), engine.attack(net, x, y, BALL))


class Rounding(Net):
    """No gradient reaches the images, so Square alone breaks it."""

    def forward(self, x):
        return super().forward((x * 16).round() / 16)


@pytest.mark.parametrize(
    "order",
    [
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: x.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1),
        lambda x: x.contiguous(memory_format=torch.channels_last),
    ],
    ids=["NCWH", "NWHC", "NHWC"],
)
def test_square_attacks_images_in_every_memory_order(order):
    net, x = Rounding((8, 10), channels=2), images(40, 2, 8, 10)
    y = labels(net, x)
    plain = engine.autoattack(net, x, y, BALL)
    assert plain.after["square"] < plain.after["fab-t"]
    found = engine.autoattack(net, order(x), y, BALL)
    assert found.after == plain.after
    assert torch.equal(found.robust, plain.robust)


def test_square_does_not_lose_its_changes_where_the_order_allows_no_view():
    net, x = Net((8, 10)), images(4, 1, 10, 8).transpose(2, 3)
    oracle = square_module.Oracle(net.eval())
    with pytest.raises(RuntimeError, match="view"):
        square_module.square(
            oracle, x, labels(net, x), BALL, queries=5, rows=50, draw=torch.Generator()
        )


class Flattens(Net):
    """Takes no empty batch: `view` cannot guess the size of nothing."""

    def forward(self, x):
        h = torch.relu(self.conv(x))
        return self.fc(h.view(h.size(0), -1))


@pytest.mark.parametrize("threat", [engine.Linf(1e-6), engine.L2(1e-6)])
def test_an_attack_that_finds_nothing_passes_no_empty_batch(threat):
    net, x = Flattens(), images()
    verdict = engine.autoattack(net, x, labels(net, x), threat)
    assert verdict.robust.all()


@pytest.mark.parametrize("size", [(4, 4), (1, 9)])
def test_square_l2_attacks_images_of_under_five_pixels(size):
    net, x = Net(size), images(8, 1, *size)
    verdict = engine.autoattack(net, x, labels(net, x), engine.L2(0.02))
    assert list(verdict.after) == ["apgd-ce", "apgd-t", "fab-t", "square"]


@pytest.mark.parametrize("threat", [engine.Linf(0.02), engine.L2(0.1)])
def test_random_numbers_do_not_depend_on_pytorchs_defaults(threat):
    net, x = Net(), images()
    y = labels(net, x)
    plain = engine.autoattack(net, x, y, threat)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = engine.autoattack(net, x, y, threat)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found.robust, plain.robust)


def test_every_pass_of_an_evaluation_is_in_exact_arithmetic(monkeypatch):
    """On a GPU PyTorch rounds convolutions to TF32 by default, in backward passes too."""
    depth = 0
    arithmetic = precision.arithmetic

    class Watched:
        def __init__(self, *args):
            self.inner = arithmetic(*args)
            assert args[0] == "fp32"

        def __enter__(self):
            nonlocal depth
            depth += 1
            return self.inner.__enter__()

        def __exit__(self, *error):
            nonlocal depth
            depth -= 1
            return self.inner.__exit__(*error)

    for place in ("engine.api", "engine.evaluation.robust_accuracy", "engine.device.precision"):
        monkeypatch.setattr(f"{place}.arithmetic", Watched)
    backward = torch.autograd.grad

    def grad(*args, **options):
        assert depth > 0
        return backward(*args, **options)

    monkeypatch.setattr(torch.autograd, "grad", grad)

    class Watching(Net):
        def forward(self, x):
            assert depth > 0
            return super().forward(x)

    net, x = Watching(), images()
    y = labels(Net(), x)
    autoattack(net, x, y)
    evaluate(net, x, y)


@pytest.mark.parametrize(
    ("net", "line"),
    [
        (Shifts(), "the model writes into the images"),
        (Blind(), "passes no gradient to its images"),
        (Pair(), "must return logits"),
        (Net(classes=1), "needs at least 2 classes"),
        (Net().half(), "the model's parameters are float16"),
    ],
)
@pytest.mark.parametrize("call", ["train", "attack"])
def test_a_network_that_cannot_be_attacked_is_not_trained_either(call, net, line):
    x, y = images(), torch.zeros(6, dtype=torch.int64)
    before = x.clone()
    data = ((x, y),) if call == "train" else (x, y)
    with pytest.raises(EngineError, match=line):
        getattr(engine, call)(net, *data, BALL)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"epochs": 0}, "epochs: must be greater than or equal to 1, got 0"),
        ({"epochs": 1.5}, "epochs: must be a valid integer"),
        ({"batch_size": 0}, "batch_size: must be greater than or equal to 1"),
        ({"batch_size": 7}, "a batch of 7 is larger than the 6 training images"),
        ({"lr": -1.0}, "lr: must be greater than 0"),
        ({"lr": float("nan")}, "lr: must be a finite number"),
        ({"momentum": 1.0}, "momentum: must be less than 1"),
        ({"ema": 2.0}, "ema: must be less than 1"),
        ({"pad": -1}, "pad: must be greater than or equal to 0"),
        ({"erase": 2.0}, "erase: must be less than or equal to 1"),
        ({"precision": "half"}, "precision: must be 'auto', .* got 'half'"),
        ({"objective": "trades"}, "objective must be an engine.Objective, got 'trades'"),
        ({"attack": "pgd"}, r"attack must be an engine.Attack, got 'pgd'"),
        ({"schedule": "cosine"}, r"schedule must be an engine.Schedule, got 'cosine'"),
        ({"validation": (images(), torch.full((6,), 9))}, "labels from 9 to 9"),
        ({"validation": (images(), torch.zeros(3))}, "6 images, 3 labels"),
        ({"validation": (images() * 2, torch.zeros(6, dtype=torch.int64))}, "finite and in"),
    ],
)
def test_an_argument_of_train_out_of_its_range_is_refused(options, line):
    x, y = images(), torch.zeros(6, dtype=torch.int64)
    with pytest.raises(EngineError, match=line):
        engine.train(Net(), (x, y), BALL, **({"epochs": 1, "batch_size": 3} | options))


@pytest.mark.parametrize("y", [torch.full((6,), 4), torch.zeros(6), torch.zeros(5).long()])
def test_labels_that_do_not_fit_are_not_trained_on(y):
    with pytest.raises(EngineError, match="label"):
        engine.train(Net(), (images(), y), BALL, epochs=1, batch_size=3)


def test_an_attack_on_images_of_another_device_is_refused():
    x = images()
    with pytest.raises(EngineError, match="images on cpu, labels on meta, the model on cpu"):
        engine.attack(Net(), x, torch.zeros(6, dtype=torch.int64, device="meta"), BALL)


def test_a_network_without_anything_to_train_is_refused():
    x, y = images(), torch.zeros(6, dtype=torch.int64)
    with pytest.raises(EngineError, match="no parameters to train"):
        engine.train(Net().requires_grad_(False), (x, y), BALL, epochs=1, batch_size=3)


def test_training_and_attacks_run_under_no_grad_as_without():
    x = images()
    y = labels(Net(), x)
    with torch.no_grad():
        inside = engine.train(Net(), (x, y), BALL, epochs=1, batch_size=3).model
        adversary = engine.attack(Net(), x, y, BALL)
    outside = engine.train(Net(), (x, y), BALL, epochs=1, batch_size=3).model
    for found, wanted in zip(inside.parameters(), outside.parameters(), strict=True):
        assert torch.equal(found, wanted)
        assert found.requires_grad
    assert torch.equal(adversary, engine.attack(Net(), x, y, BALL))
