"""Test precisions, overflows and the loss scale."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch

from engine import PGD, Attack, EngineError, recipes
from engine.data.loaders import ResidentLoader
from engine.device.precision import LossScale, arithmetic, resolve
from engine.performance.capture_audit import Tape

from ..conftest import Foreign, Tiny, blobs
from ..training.steps import make, train


@pytest.mark.parametrize("optimiser", ["sgd", "adamw", "torch-sgd", "torch-adamw"])
@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize("recorder", [None, Tape], ids=["eager", "replayed"])
def test_an_overflow_leaves_weights_and_momentum_alone(optimiser, at, recorder):
    torch.manual_seed(0)
    step = make(
        Tiny(),
        precision="fp16",
        optimiser=optimiser,
        recorder=recorder and recorder(),
        attack=Attack(steps=1),
        objective=PGD(),
    )
    images, labels = blobs(64)
    batches = list(ResidentLoader(images, labels, 16).epoch(0))
    for batch in batches[:at]:
        step(batch)
    assert not step.scale.found_inf
    kept = {
        name: t.clone()
        for name, t in step.tensors().items()
        if name.startswith(("model.", "optimiser.")) and not name.endswith(".now")
    }
    scale = float(step.scale.scale)
    if recorder is not None and at == 0:
        # Recorded in good order, then struck at its first replay.
        step._record(batches[0])
    step.scale.scale.fill_(float("inf"))
    step(batches[0])
    assert step.scale.found_inf
    for name, before in kept.items():
        assert torch.equal(step.tensors()[name], before), name
    step.scale.scale.fill_(scale)
    for batch in batches:
        step(batch)
    assert not step.scale.found_inf
    for name, t in step.tensors().items():
        if name.startswith(("model.", "optimiser.")):
            assert t.isfinite().all(), name
            if name in kept and name.startswith("model."):
                assert not torch.equal(t, kept[name]), name


def test_loss_scale_halves_on_overflow_and_doubles_after_a_while():
    scale = LossScale(torch.device("cpu"), dynamic=True, initial=1024.0, interval=3)
    grads = [torch.full((4,), 2048.0), torch.full((2,), 1024.0)]
    scale.unscale_(grads)
    scale.update()
    assert grads[0].tolist() == [2.0] * 4
    assert grads[1].tolist() == [1.0] * 2
    scale.unscale_([torch.tensor([1.0, float("inf")])])
    assert scale.found_inf
    scale.update()
    assert scale.scale == 512.0
    for _ in range(3):
        scale.unscale_([torch.ones(2)])
        assert not scale.found_inf
        scale.update()
    assert scale.scale == 1024.0


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("model", [Tiny, Foreign])
def test_low_precision_trains_float32_weights_to_about_the_same(precision, model):
    torch.manual_seed(0)
    start = model()
    full = make(copy.deepcopy(start))
    low = make(copy.deepcopy(start), precision=precision)
    train(full)
    train(low)
    assert all(p.dtype == torch.float32 for p in low.model.parameters())
    assert low.means()["loss"] == pytest.approx(full.means()["loss"], rel=0.03)
    assert low.means()["loss"] != full.means()["loss"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stem_learns_in_every_precision(precision):
    """A cast of the stem's weight that the attack made must not serve the training pass."""
    torch.manual_seed(0)
    step = make(Tiny(), precision=precision)
    before = step.model.conv1.weight.detach().clone()
    train(step, steps=1)
    assert step.model.conv1.weight.grad.abs().sum() > 0
    assert not torch.equal(before, step.model.conv1.weight)


def test_precision_by_device():
    cpu = torch.device("cpu")
    assert resolve("auto", cpu) == "fp32"
    assert resolve("bf16", cpu) == "bf16"
    with pytest.raises(EngineError, match="tf32 needs an NVIDIA GPU"):
        resolve("tf32", cpu)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_float32_products_are_rounded_in_all_of_a_step_or_nowhere(monkeypatch, precision):
    """In the attack's backward pass, the loss's, and the optimiser; and afterwards as before."""
    seen = []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append(flags())
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(flags())
            return grad

    class Watched(Tiny):
        def body(self, h):
            return super().body(Spy.apply(h))

    def flags():
        backends = torch.backends
        newer = [k.fp32_precision for k in (backends.cudnn.conv, backends.cuda.matmul)]
        return backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32, *newer

    torch.manual_seed(0)
    before, step = flags(), make(Watched())
    # The flags may be set without a GPU; the rest of the step stays where it is.
    step.precision, step.device = precision, torch.device("cuda")
    monkeypatch.setattr(torch, "autocast", lambda *_: contextlib.nullcontext())
    train(step, steps=1)
    rounded = precision == "tf32"
    newer = "tf32" if rounded else "ieee"
    wanted = before if precision == "bf16" else (rounded, rounded, newer, newer)
    assert set(seen) == {wanted}
    # Two steps of the attack and the training pass, forwards and backwards.
    assert len(seen) >= 4
    assert flags() == before


def test_a_program_may_have_set_its_arithmetic_the_newer_way():
    """PyTorch then raises where the older flags are read."""
    knobs = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    before = [knob.fp32_precision for knob in knobs]
    theirs = ["ieee", "tf32", "tf32"]
    try:
        for knob, value in zip(knobs, theirs, strict=True):
            knob.fp32_precision = value
        with pytest.raises(RuntimeError):
            _ = torch.backends.cudnn.allow_tf32
        for precision, inside in (("fp32", "ieee"), ("tf32", "tf32")):
            with arithmetic(precision, torch.device("cuda")):
                assert {knob.fp32_precision for knob in knobs} == {inside}
                assert torch.backends.cudnn.allow_tf32 == (precision == "tf32")
            assert [knob.fp32_precision for knob in knobs] == theirs
    finally:
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("highest")
        for knob, value in zip(knobs, before, strict=True):
            knob.fp32_precision = value
    assert torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("wanted", [False, True])
def test_a_recipe_may_ask_for_the_same_bits(wanted):
    cudnn, seen = torch.backends.cudnn, []

    class Watched(PGD):
        def compute(self, *arguments):
            seen.append((cudnn.deterministic, cudnn.benchmark))
            return super().compute(*arguments)

    step = make(Tiny(), objective=Watched(), deterministic=wanted)
    cudnn.benchmark = True
    try:
        train(step, steps=1)
        assert (cudnn.deterministic, cudnn.benchmark) == (False, True)
    finally:
        cudnn.benchmark = False
    assert seen == [(wanted, not wanted)]
    recipe = recipes.load("quickstart", {"step.deterministic": str(wanted).lower()})
    assert recipe.step.deterministic == wanted
