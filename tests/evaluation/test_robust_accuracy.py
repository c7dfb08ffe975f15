"""Evaluation: our PGD, the authors' AutoAttack, and what the report says of them."""

from __future__ import annotations

import pytest
import torch
from pyautoattack import AutoAttack
from torch import nn

import engine
from engine import L2, EngineError, Linf
from engine.adversary.ascent import towards_runner_up
from engine.evaluation import robust_accuracy, robustbench
from engine.evaluation.robust_accuracy import evaluation_mode, pgd, predictions

from ..conftest import Foreign, Tiny, blobs


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = Tiny()
    engine.train(model, blobs(512), Linf(0.2), epochs=4, batch_size=64, lr=0.1)
    x, y = blobs(60, seed=9)
    return model.eval(), x.float() / 255, y


def test_autoattack_is_pyautoattack_called_directly(trained):
    """At a radius where some images fall and some stand, the same share stands."""
    model, x, y = trained
    threat = Linf(0.3)
    report = engine.evaluate(model, x, y, threat, pgd_steps=5, pgd_restarts=1, seed=3)
    direct = AutoAttack(model, norm="Linf", eps=0.3, seed=3, version="standard")
    direct.apgd_targeted.n_target_classes = direct.fab.n_target_classes = 3
    adversary, _ = direct.run_standard_evaluation(x, y, batch_size=500)
    robust = float((model(adversary).argmax(1) == y).double().mean())
    assert report.autoattack == pytest.approx(robust)
    assert 0 < robust < report.clean
    assert set(report.after) == {"apgd-ce", "apgd-t", "fab-t", "square"}
    assert report.after["square"] == pytest.approx(report.autoattack, abs=1e-4)
    assert report.worst_case <= min(report.autoattack, report.pgd)


@pytest.mark.parametrize("threat", [Linf(0.2), L2(1.0)], ids=str)
def test_pgd_is_no_stronger_than_the_ball_allows(trained, threat):
    model, x, y = trained
    accuracy = [
        float(
            pgd(model, x, y, type(threat)(threat.norm, threat.eps * k), steps=20, restarts=2)
            .double()
            .mean()
        )
        for k in (0, 1, 2, 4, 5)
    ]
    assert accuracy[0] == float((predictions(model, x) == y).double().mean())
    assert accuracy == sorted(accuracy, reverse=True)
    assert accuracy[-1] == 0.0


def test_pgd_finds_what_a_plain_loop_finds(trained):
    """Break, by an independent PGD, no image that the engine's PGD finds robust."""
    model, x, y = trained
    eps, steps = 0.3, 20
    ours = pgd(model, x, y, Linf(eps), steps=steps, restarts=3)
    z = (x + eps * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    for _ in range(steps):
        z = z.detach().requires_grad_()
        (g,) = torch.autograd.grad(torch.nn.functional.cross_entropy(model(z), y), z)
        z = torch.clamp(z + eps / 4 * g.sign(), x - eps, x + eps).clamp(0, 1)
    plain = model(z).argmax(1) == y
    # Random starts differ: near-ties may go either way, the totals may not.
    assert abs(int(ours.sum()) - int(plain.sum())) <= 3
    assert ours.sum() <= (predictions(model, x) == y).sum()


def test_the_margin_is_attacked_where_the_cross_entropy_has_no_gradient(trained):
    """Logits a million times as large change no answer; float32's cross-entropy is flat there, the
    margin is not.
    """
    model, x, y = trained
    steep = nn.Sequential(model, _Times(1e6)).eval()
    options = {"steps": 20, "restarts": 1}
    clean = int((predictions(model, x) == y).sum())
    assert int(pgd(steep, x, y, Linf(0.3), **options).sum()) == clean
    honest = pgd(model, x, y, Linf(0.3), loss="margin", **options)
    assert torch.equal(pgd(steep, x, y, Linf(0.3), loss="margin", **options), honest)
    assert int(honest.sum()) < clean


@pytest.mark.parametrize(
    ("step", "sizes"),
    [("constant", [0.25] * 10), ("decaying", [1 - k / 10 for k in range(10)])],
)
def test_step_sizes_of_pgd(trained, monkeypatch, step, sizes):
    model, x, y = trained
    taken = []

    def ascend(*words, alpha, **options):
        taken.append(alpha)
        return robust_accuracy_ascend(*words, alpha=alpha, **options)

    robust_accuracy_ascend = robust_accuracy.ascend
    monkeypatch.setattr(robust_accuracy, "ascend", ascend)
    pgd(model, x, y, Linf(0.2), steps=10, restarts=1, step=step)
    assert taken == pytest.approx([0.2 * size for size in sizes])


def test_decaying_steps_find_what_constant_ones_step_over():
    """A narrow valley: only points within 0.02 of 0.43 are misread, and steps of eps / 4 jump
    across.
    """

    class Valley(nn.Module):
        def forward(self, x):
            away = (x.flatten(1) - 0.43).abs().amax(1, keepdim=True)
            return torch.cat([away - 0.02, torch.zeros_like(away)], dim=1)

    x, y = torch.full((8, 1, 1, 1), 0.5), torch.zeros(8, dtype=torch.int64)
    options = {"steps": 20, "restarts": 1, "loss": "margin"}
    assert pgd(Valley(), x, y, Linf(0.3), **options).any()
    assert not pgd(Valley(), x, y, Linf(0.3), step="decaying", **options).any()


def test_the_margins_gradient_is_autograds():
    torch.manual_seed(0)
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 1, 2, 3, 4, 0])
    margin = 0.0
    for row, label in zip(logits, y.tolist(), strict=True):
        wrong = torch.cat([row[:label], row[label + 1 :]])
        margin = margin + wrong.max() - row[label]
    (expected,) = torch.autograd.grad(margin, logits)
    assert torch.equal(towards_runner_up(y)(logits.detach()), expected)


class _Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, logits):
        return logits * self.factor


def test_small_batches_change_nothing(trained):
    model, x, y = trained
    whole = pgd(model, x, y, Linf(0.3), steps=10, restarts=1, batch_size=500)
    assert torch.equal(whole, pgd(model, x, y, Linf(0.3), steps=10, restarts=1, batch_size=500))
    parts = pgd(model, x, y, Linf(0.3), steps=10, restarts=1, batch_size=7)
    assert (whole != parts).double().mean() < 0.1


def test_mode_and_gradients_come_back():
    model = Tiny(batch_norm=True).train()
    model.bn.eval()
    model.fc.weight.requires_grad_(False)
    with evaluation_mode(model):
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
    assert model.training
    assert not model.bn.training
    assert model.conv1.weight.requires_grad
    assert not model.fc.weight.requires_grad


def test_images_outside_the_box_are_refused(trained):
    model, x, y = trained
    with pytest.raises(EngineError, match=r"\[0, 1\]"):
        engine.evaluate(model, x * 2 - 0.5, y, Linf(0.1))
    with pytest.raises(EngineError, match="each image needs a label: got 0 images"):
        engine.evaluate(model, x[:0], y[:0], Linf(0.1))
    with pytest.raises(EngineError, match="labels"):
        engine.evaluate(model, x, y[:-1], Linf(0.1))


@pytest.mark.parametrize("classes", [2, 3])
def test_few_classes_get_the_attacks_that_are_defined(classes):
    """Name each attack at a radius where some images fall; APGD's result is the package's."""
    torch.manual_seed(0)
    model = Tiny(classes=classes)
    images, labels = blobs(256, classes=classes)
    engine.train(model, (images, labels), Linf(0.1), epochs=3, batch_size=64, lr=0.1)
    x, y = blobs(40, seed=9, classes=classes)
    x = x.float() / 255
    report = engine.evaluate(model, x, y, Linf(0.3), pgd_steps=5, pgd_restarts=1, seed=3)
    assert report.attacks == ("apgd-ce", "apgd-difference", "fab-t", "square")
    assert tuple(report.after)[:2] == report.attacks[:2]
    assert report.autoattack <= report.clean
    direct = AutoAttack(
        model.eval(), norm="Linf", eps=0.3, seed=3, version="custom", attacks=["apgd-ce"]
    )
    adversary, _ = direct.run_standard_evaluation(x, y, batch_size=500)
    assert report.after["apgd-ce"] == pytest.approx(
        float((predictions(model, adversary) == y).double().mean()), abs=1e-4
    )
    assert report.autoattack < report.clean


def test_one_class_is_no_classifier():
    x = torch.rand(8, 1, 6, 6)
    with pytest.raises(EngineError, match="at least 2 classes"):
        engine.evaluate(Foreign(classes=1), x, torch.zeros(8, dtype=torch.int64), Linf(0.1))


@pytest.mark.parametrize("classes", [2, 3])
def test_two_or_three_classes_are_judged_by_the_engine(classes):
    """The package's targeted losses need four classes."""
    x = torch.rand(8, 1, 6, 6)
    model = Foreign(classes=classes).eval()
    y = model(x).argmax(1)
    report = engine.evaluate(model, x, y, Linf(0.1), pgd_steps=3, pgd_restarts=1)
    assert report.judge == "engine"
    assert list(report.after) == ["apgd-ce", "apgd-difference", "fab-t", "square"]
    assert 0 <= report.autoattack <= report.clean == 1


def test_robustbench_fields(trained):
    model, x, y = trained
    report = engine.evaluate(
        model, x, y, Linf(0.1), pgd_steps=3, pgd_restarts=1, autoattack_version="apgd"
    )
    fields = robustbench.fields(report, name="n", architecture="a", dataset="d")
    assert fields["clean_acc"] == f"{100 * report.clean:.2f}"
    assert fields["autoattack_acc"] == f"{100 * report.autoattack:.2f}"
    assert set(report.after) == {"apgd-ce", "apgd-t"}
    assert {
        "name",
        "dataset",
        "architecture",
        "clean_acc",
        "autoattack_acc",
        "additional_data",
        "number_forward_passes",
        "footnote",
    } <= set(fields)


def test_attack_face(trained):
    model, x, y = trained
    adversary = engine.attack(model, x, y, L2(0.5), steps=5)
    assert ((adversary - x).flatten(1).norm(dim=1) <= 0.5 * (1 + 1e-5)).all()
    accuracy = lambda z: float((model(z).argmax(1) == y).double().mean())  # noqa: E731
    assert accuracy(engine.attack(model, x, y, Linf(0.4), steps=10)) < accuracy(x)


@pytest.mark.parametrize("judge", [engine.evaluate, engine.autoattack])
def test_a_pixel_that_is_no_number_is_refused(judge):
    x = torch.rand(4, 1, 6, 6)
    x[2, 0, 3, 3] = float("nan")
    with pytest.raises(EngineError, match=r"images must be float32 in \[0, 1\]"):
        judge(Foreign(), x, torch.zeros(4, dtype=torch.int64), Linf(0.1))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pgd_in_bf16_is_as_strong(trained, precision):
    model, x, y = trained
    robust = pgd(model, x, y, Linf(0.3), steps=20, restarts=2, precision=precision)
    plain = pgd(model, x, y, Linf(0.3), steps=20, restarts=2)
    assert 0 < int(robust.sum()) < len(x)
    assert (robust == plain).double().mean() >= 0.95


def test_the_package_does_not_judge_in_bf16(trained):
    model, x, y = trained
    with pytest.raises(EngineError, match=r"evaluation\.judge = engine"):
        engine.evaluate(model, x, y, Linf(0.3), precision="bf16")
    report = engine.evaluate(
        model, x, y, Linf(0.3), precision="bf16", autoattack_version="none", pgd_restarts=1
    )
    assert report.precision == "bf16"
    fields = robustbench.fields(report, name="n", architecture="a", dataset="d")
    assert fields["precision"] == "bf16"
