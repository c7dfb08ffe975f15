"""Test whole training runs on problems of a second."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import engine
from engine import PGD, Attack, EngineError, Linf, LocalBall, recipes
from engine.data.loaders import TensorLoader
from engine.evaluation import robust_accuracy
from engine.runs import build
from engine.runs.train import build_trainer
from engine.training.optimiser import Optimiser
from engine.training.step import Step
from engine.training.trainer import Trainer

from ..conftest import Foreign, Tiny, blobs


@pytest.mark.parametrize("start", ["random", "memory"])
@pytest.mark.parametrize("objective", [PGD(), LocalBall(), LocalBall(global_weight=0.5)], ids=str)
def test_training_makes_a_robust_network(objective, start):
    images, labels = blobs(512)
    threat = Linf(0.15)
    torch.manual_seed(0)
    model = Tiny()
    result = engine.train(
        model,
        (images, labels),
        threat,
        attack=Attack(steps=2, start=start),
        objective=objective,
        epochs=6,
        batch_size=64,
        lr=0.1,
    )
    x, y = blobs(200, seed=9)
    report = engine.evaluate(
        result.model,
        x.float() / 255,
        y,
        threat,
        pgd_steps=10,
        pgd_restarts=1,
        autoattack_version="none",
    )
    assert report.pgd > 0.9
    assert result.steps == 6 * 8
    assert result.train_seconds > 0


COMBINED = {
    "cutmix": True,
    "erase": 0.25,
    "extra": blobs(200, seed=4),
    "extra_share": 0.5,
    "perturb": 0.005,
}


def test_training_with_extra_images_perturbed_weights_and_mixed_labels():
    runs = []
    for changed in ({}, COMBINED, {"perturb": 0.005}):
        torch.manual_seed(0)
        model = Tiny()
        result = engine.train(
            model,
            blobs(256),
            Linf(0.1),
            objective=PGD(),
            epochs=4,
            batch_size=64,
            lr=0.1,
            **changed,
        )
        assert result.rows[-1]["loss"] < result.rows[0]["loss"]
        runs.append(model.fc.weight.detach())
    for other in runs[1:]:
        assert not torch.equal(runs[0], other)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cutmix": True, "attack": Attack(start="memory")}, "cutmix with attack.start = memory"),
        (
            {"attack": Attack(start="memory", memory="host")},
            "attack.memory = host is for `engine train`",
        ),
        ({"perturb": 1.0}, "perturb = 1.0 must be in"),
        ({"perturb": 0.1, "optimiser": "apex-sgd"}, "not apex-sgd"),
        ({"extra": (torch.zeros(9, 1, 7, 6, dtype=torch.uint8), torch.zeros(9).long())}, "1x7x6"),
        ({"extra": blobs(9), "extra_share": 0.0}, "extra_share = 0"),
        ({"extra": blobs(9), "extra_share": 1.0}, "extra_share = 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_options_that_do_not_fit_are_one_line(options, said):
    with pytest.raises(EngineError) as caught:
        engine.train(Tiny(), blobs(128), Linf(0.1), epochs=1, **options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_loader_cannot_be_changed():
    x, y = blobs(64)
    feed = DataLoader(TensorDataset(x.float() / 255, y), batch_size=16)
    with pytest.raises(EngineError, match="not a loader"):
        engine.train(Tiny(), feed, Linf(0.1), epochs=1, cutmix=True)


def test_clean_training_is_not_robust():
    """The test above can fail: without adversaries the same network and budget are not robust."""
    images, labels = blobs(512)
    torch.manual_seed(0)
    model = Tiny()
    result = engine.train(
        model, (images, labels), Linf(0.0), objective=PGD(), epochs=6, batch_size=64, lr=0.1
    )
    x, y = blobs(200, seed=9)
    report = engine.evaluate(
        result.model,
        x.float() / 255,
        y,
        Linf(0.3),
        pgd_steps=10,
        pgd_restarts=1,
        autoattack_version="none",
    )
    assert report.clean > 0.95
    assert report.pgd < 0.9


def test_same_seed_same_weights_and_another_seed_others():
    images, labels = blobs(128)

    def weights(seed):
        torch.manual_seed(0)
        model = Tiny()
        engine.train(
            model,
            (images, labels),
            Linf(0.1),
            epochs=2,
            batch_size=32,
            seed=seed,
            flip=True,
            pad=1,
            attack=Attack(steps=1, start="memory"),
        )
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_best_epoch_is_chosen_on_validation_and_both_are_kept():
    images, labels = blobs(256)
    torch.manual_seed(0)
    model = Tiny()
    x, y = blobs(64, seed=5)
    saved = []
    hooks = engine.Hooks(checkpoint=lambda name, net, row: saved.append((name, row["epoch"])))
    result = engine.train(
        model,
        (images, labels),
        Linf(0.2),
        epochs=4,
        batch_size=64,
        lr=0.2,
        validation=(x.float() / 255, y),
        hooks=hooks,
    )
    scores = [row["val_pgd"] for row in result.rows]
    assert result.best_epoch == max(i + 1 for i, s in enumerate(scores) if s == max(scores))
    assert [e for name, e in saved if name == "last"] == [1, 2, 3, 4]
    assert [e for name, e in saved if name == "best"][-1] == result.best_epoch
    assert [row["epoch"] for row in result.rows] == [1, 2, 3, 4]


def test_validation_attacks_as_the_recipe_says(monkeypatch):
    asked = []

    def pgd(*words, **options):
        asked.append(options)
        return real(*words, **options)

    real = robust_accuracy.pgd
    monkeypatch.setattr(robust_accuracy, "pgd", pgd)
    changes = {"validation.loss": "margin", "validation.step": "decaying", "validation.steps": "3"}
    recipe = recipes.load("quickstart", {**changes, "optim.epochs": "1", "threat.eps": "0.2"})
    step, loader = build.prepare(recipe, 1)
    trainer = build_trainer(recipe, step, loader, engine.Hooks())
    (row,) = trainer.run().rows
    (options,) = asked
    assert (options["loss"], options["step"], options["steps"]) == ("margin", "decaying", 3)
    ((x, y),) = trainer.validation
    with robust_accuracy.evaluation_mode(step.optimiser.average) as model:
        robust = real(model, x, y, recipe.threat, **options)
    assert row["val_pgd"] == pytest.approx(float(robust.double().mean()))


def test_a_dataloader_and_a_foreign_module():
    images, labels = blobs(256)
    data = DataLoader(TensorDataset(images.float() / 255, labels), batch_size=64, shuffle=True)
    torch.manual_seed(0)
    result = engine.train(Foreign(), data, Linf(0.1), epochs=5, lr=0.1)
    assert result.rows[-1]["adv_accuracy"] > 0.8


def test_memory_without_indices_is_refused():
    data = DataLoader(TensorDataset(*blobs(64)), batch_size=32)
    with pytest.raises(EngineError, match="memory"):
        engine.train(Foreign(), data, Linf(0.1), attack=Attack(start="memory"))


def test_a_loss_that_is_not_finite_stops_the_run():
    images, labels = blobs(64)
    with pytest.raises(EngineError, match="not finite"):
        engine.train(Foreign(), (images, labels), Linf(0.1), lr=1e30, epochs=3, batch_size=32)


def test_an_empty_loader_is_refused():
    model = Foreign()
    step = Step(
        model,
        objective=PGD(),
        threat=Linf(0.1),
        attack=Attack(),
        optimiser=Optimiser(model, lr=[0.1]),
    )
    with pytest.raises(EngineError, match="no batch"):
        Trainer(step, TensorLoader([]), epochs=1)
