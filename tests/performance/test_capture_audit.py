"""Test the tape that stands in for a CUDA graph, and the audit of every recipe."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from engine import PGD, recipes
from engine.models import sources
from engine.objectives import OBJECTIVES
from engine.performance import capture_audit
from engine.performance.capture_audit import Tape


@pytest.mark.parametrize(
    ("mistake", "complaint"),
    [
        (lambda x: x * float(x.mean()), "reads a value of the device on the host"),
        (lambda x: x[x > 0], "shape depends on its contents"),
        (lambda x: x + torch.rand_like(x), "draws random numbers from a generator"),
        (lambda x: x + torch.tensor(3.0), "makes a tensor from a number of the host's"),
        (lambda x: x + torch.ones(4)[0], None),
    ],
    ids=["read", "shape", "random", "host", "fine"],
)
def test_tape_complains(mistake, complaint):
    x = torch.randn(8)
    tape = Tape(known=lambda: [x])
    tape.record(lambda: mistake(x))
    if complaint is None:
        assert tape.complaints == []
    else:
        assert any(complaint in line for line in tape.complaints), tape.complaints


def test_tape_complains_of_a_tensor_from_outside():
    x, stray = torch.randn(8), torch.randn(8)
    tape = Tape(known=lambda: [x])
    tape.record(lambda: x + stray)
    assert tape.complaints == ["bookkeeping: add touches a tensor (8,) that the step does not own"]


def test_tape_freezes_the_numbers_of_the_host():
    """As a graph does: this is what the audit's comparison finds."""
    x, count = torch.zeros(1), [0]

    def run():
        count[0] += 1
        x.add_(count[0])

    replay = Tape().record(run)
    replay()
    assert x.item() == 2.0


@pytest.mark.parametrize(
    "name",
    [
        # Large networks; their objectives are met on small ones as well.
        pytest.param(name, marks=pytest.mark.slow)
        if name.startswith(("cifar", "image", "tiny-imagenet")) and name != "cifar10"
        else name
        for name in recipes.names()
    ],
)
def test_every_recipe_can_be_captured(name):
    recipe = recipes.load(name)
    if missing := sources.unavailable(recipe.model.name):
        pytest.skip(missing)
    found = capture_audit.audit(recipe)
    assert found.complaints == []
    # The whole of it outside the network: what the kernels are for. These rivals' losses have none.
    plain = recipe.objective.name in ("mart", "gat", "liet", "llr", "grad-align", "fgsm-pgi")
    # NuAT's nuclear norm takes 22 iterations of two products.
    iterated = 60 if recipe.objective.name == "nuat" else 0
    assert found.attack_step_ops <= (iterated or (20 if plain else 2))
    # Balls around a share of the batch: their logits are joined with those of the rest.
    joined = 2 if getattr(recipe.objective, "local_share", 1) < 1 else 0
    # Perturbed weights: the loss is computed twice; one operator moves them, one puts them back.
    perturbed = recipe.weights.perturb > 0
    losses = 2 if perturbed else 1
    assert found.loss_ops <= losses * (iterated + 30 if iterated or plain else 2 + joined)
    assert found.optimiser_ops == (3 if perturbed else 1)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_recipe_can_be_captured_in_low_precision(precision):
    found = capture_audit.audit(recipes.load("fashion-mnist", {"step.precision": precision}))
    assert found.complaints == []


def test_extra_images_perturbed_weights_and_mixed_labels_can_be_captured():
    combined = {
        # The audit makes the images.
        "data.extra": "extra.npz",
        "weights.perturb": "0.005",
        "data.cutmix": "true",
        "data.erase": "0.25",
        "attack.start": "random",
    }
    assert capture_audit.audit(recipes.load("fashion-mnist", combined)).complaints == []
    coloured = {"data.jitter": "0.4", "data.erase": "0.25", "model.name": "tiny-cnn"}
    assert capture_audit.audit(recipes.load("cifar10", coloured)).complaints == []


@pytest.mark.parametrize("name", [name for name, kind in OBJECTIVES.items() if kind.mixes])
def test_every_objective_with_mixed_labels_can_be_captured(name):
    mixed = {"objective.name": name, "data.cutmix": "true", "attack.start": "random"}
    assert capture_audit.audit(recipes.load("quickstart", mixed)).complaints == []


def test_audit_notices_a_generator_and_a_number_of_the_host(monkeypatch):
    compute = PGD.compute

    def careless(self, model, x, y, *rest):
        outcome = compute(self, model, x + 1e-3 * torch.rand_like(x), y, *rest)
        return dataclasses.replace(outcome, loss=outcome.loss * (1 + float(outcome.loss)))

    monkeypatch.setattr(PGD, "compute", careless)
    complaints = " ".join(capture_audit.audit(recipes.load("quickstart-pgd10")).complaints)
    assert "rand_like draws random numbers from a generator" in complaints
    assert "_local_scalar_dense reads a value of the device on the host" in complaints
    assert "differs between replay and eager step" in complaints


@pytest.mark.parametrize(("dropout", "draws"), [(0.0, False), (0.5, True)])
def test_attention_draws_with_dropout_only(dropout, draws):
    q = torch.rand(1, 2, 4, 8)
    tape = Tape(lambda: [q])
    tape.record(lambda: nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=dropout))
    assert any("draws random numbers" in line for line in tape.complaints) == draws
