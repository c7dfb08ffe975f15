"""The choice of another backend if one does not run, and the reference under autocast."""

from __future__ import annotations

import logging
import subprocess

import pytest
import torch

from engine import kernels
from engine.kernels import backends, reference

from .ops.support import STEMS, stem_inputs


@pytest.fixture
def forgetful():
    """Choices made in a test are not the next one's."""
    cached = (backends.usable, backends.implementation, backends._announce)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.fixture
def triton(forgetful, monkeypatch):
    module, reason = backends.load("triton")
    if module is None:
        pytest.skip(reason)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return module


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC"),
        subprocess.CalledProcessError(1, ["gcc", "main.c"]),
        OSError("libcuda.so cannot be found!"),
    ],
    ids=["no compiler", "no headers", "no driver"],
)
def test_triton_that_does_not_launch_is_announced_once_and_replaced(
    triton, monkeypatch, caplog, error
):
    launches = []

    def probe():
        launches.append(1)
        raise error

    monkeypatch.setattr(triton, "probe", probe)
    with caplog.at_level(logging.WARNING):
        for op in ("attack_step", "sgd_ema_step", "attack_step"):
            served = backends.implementation(op, "cuda", None)
            assert served.__wrapped__ is getattr(reference, op)
    assert launches == [1]
    (line,) = (r.getMessage() for r in caplog.records)
    assert f"its first launch failed: {type(error).__name__}: {error}" in line
    rows = [row for row in backends.table() if row["device"] == "cuda"]
    assert {row["backend"] for row in rows} == {"reference"}
    assert "its first launch failed" in rows[0]["why"]
    with pytest.raises(RuntimeError, match="its first launch failed"):
        backends.implementation("attack_step", "cuda", "triton")


def test_triton_that_launches_serves_its_ops(triton, monkeypatch):
    monkeypatch.setattr(triton, "probe", lambda: None)
    assert backends.implementation("attack_step", "cuda", None).__wrapped__ is triton.attack_step


def test_a_launch_without_room_is_announced_once_and_replaced(triton, monkeypatch, caplog):
    asked = []

    def wants_too_much(*args):
        asked.append(1)
        raise triton.REFUSED[0](300_000, 232_448, "shared memory")

    monkeypatch.setattr(triton, "probe", lambda: None)
    monkeypatch.setattr(triton, "attack_step", wants_too_much)
    x, eps = torch.rand(3, 5), torch.tensor(0.1)
    args = (x, x, x - 0.5, eps, eps, "Linf")
    served = backends.implementation("attack_step", "cuda", None)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(served(*args), reference.attack_step(*args))
    assert asked == [1]
    (line,) = (r.getMessage() for r in caplog.records)
    assert "triton's attack_step does not run here (out of resource: shared memory" in line
    # An error of another kind is not ours to hide.
    monkeypatch.setattr(triton, "kl_grad", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        backends.implementation("kl_grad", "cuda", None)(x, x, 1.0)


@pytest.mark.parametrize("name", ["reference", "native"])
def test_autocast_changes_no_op(forgetful, name):
    if backends.load(name)[0] is None:
        pytest.skip(f"{name} is not there")
    x, z, gy, weight, stride, padding = stem_inputs(STEMS[2], 3, "cpu")
    geometry = {"stride": stride, "padding": padding}

    def run():
        with backends.use(name):
            return (
                kernels.input_grad_step(
                    x, z, gy, weight, eps=0.1, alpha=0.1, norm="L2", **geometry
                ),
                kernels.stem_input_grad(gy, weight, size=tuple(x.shape[2:]), **geometry),
                *kernels.stem_weight_grad(x, gy, kernel=tuple(weight.shape[2:]), **geometry),
            )

    plain = run()
    with torch.autocast("cpu", torch.bfloat16):
        for ours, theirs in zip(run(), plain, strict=True):
            assert torch.equal(ours, theirs)
