"""Objectives: their values, against formulas written out here, and their passes."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from engine import (
    FGSMPGI,
    GAT,
    L2,
    LIET,
    LLR,
    MART,
    NFGSM,
    PGD,
    TRADES,
    Attack,
    Clean,
    EngineError,
    GradAlign,
    Linf,
    LocalBall,
    NuAT,
)
from engine import rng as engine_rng
from engine.kernels import MixedLabels, backends
from engine.models import Network
from engine.objectives import OBJECTIVES, Passes, grad_align, nuat

from ..conftest import Foreign, Tiny


class _Counted(torch.autograd.Function):
    """A linear layer that counts the sample passes of each kind that really run through it."""

    @staticmethod
    def forward(ctx, h, weight, counts):
        ctx.save_for_backward(h, weight)
        ctx.counts = counts
        counts["forward"] += len(h)
        return h @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        h, weight = ctx.saved_tensors
        grad_h = grad_weight = None
        if ctx.needs_input_grad[0]:
            ctx.counts["input_grad"] += len(grad)
            grad_h = grad @ weight
        # needs_input_grad is True for any leaf weight; the engine drops what nobody asked for, so
        # whether this edge's result is wanted has to be asked of the graph.
        if ctx.needs_input_grad[1] and torch._C._will_engine_execute_node(ctx.next_functions[1][0]):
            ctx.counts["weight_grad"] += len(grad)
            grad_weight = grad.t() @ h
        return grad_h, grad_weight, None


class CountingStem(Network):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 3, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(4, 108) * 0.1)
        self.counts = {"forward": 0, "input_grad": 0, "weight_grad": 0}

    def body(self, h):
        return _Counted.apply(torch.tanh(h).flatten(1), self.weight, self.counts)


class CountingForeign(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(36, 20)
        self.weight = nn.Parameter(torch.randn(4, 20) * 0.1)
        self.counts = {"forward": 0, "input_grad": 0, "weight_grad": 0}

    def forward(self, x):
        return _Counted.apply(torch.tanh(self.first(x.flatten(1))), self.weight, self.counts)


CHEAP = [
    PGD(),
    TRADES(),
    MART(),
    GAT(),
    NuAT(),
    NFGSM(),
    FGSMPGI(),
    Clean(),
    LocalBall(),
    LocalBall(global_weight=1.0),
    LocalBall(direction="ce"),
    LocalBall(direction="ce", global_weight=1.0),
    LocalBall(local_share=0.25),
    LocalBall(local_share=0.5, direction="ce", distance="squared"),
    LocalBall(local_weight=0.0, global_weight=2.0),
    LocalBall(global_weight=1.0, anchor="start"),
    LocalBall(global_weight=1.0, distance="squared"),
]


@pytest.mark.parametrize("network", [CountingStem, CountingForeign])
@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("objective", CHEAP, ids=repr)
def test_passes_declared_are_the_passes_made(objective, steps, network, batch):
    model, attack = network(), Attack(steps=steps)
    x, y = batch
    objective(model, x, y, Linf(0.1), attack).loss.backward()
    made = {k: v / len(x) for k, v in model.counts.items()}
    declared = objective.passes(attack)
    assert made == {
        "forward": declared.forward,
        "input_grad": declared.input_grad,
        "weight_grad": declared.weight_grad,
    }


@pytest.mark.parametrize("network", [CountingStem, CountingForeign])
@pytest.mark.parametrize(
    "objective",
    [PGD(), LocalBall(), LocalBall(direction="ce", global_weight=1.0), LocalBall(local_weight=0.0)],
    ids=repr,
)
def test_a_free_step_costs_no_pass(objective, network, batch):
    """With k = 0, train at the start and return the next point, without a further pass."""
    model, attack = network(), Attack(steps=0, start="memory", alpha=0.05)
    x, y = batch
    outcome = objective(model, x, y, Linf(0.1), attack, start=x)
    outcome.loss.backward()
    after = outcome.adversary if torch.is_tensor(outcome.adversary) else outcome.adversary()
    assert not torch.equal(after, x)
    declared = objective.passes(attack)
    assert {k: v / len(x) for k, v in model.counts.items()} == {
        "forward": declared.forward,
        "input_grad": declared.input_grad,
        "weight_grad": declared.weight_grad,
    }
    if isinstance(objective, PGD):
        assert declared.total == 3


@pytest.mark.parametrize("distance", ["kl", "squared"])
@pytest.mark.parametrize("direction", ["kl", "ce"])
def test_balls_for_a_share_of_the_batch(direction, distance, model, batch):
    """Take cross-entropy of all 16 and the local term of the first 6; gradients too."""
    x, y = batch
    attack, state = Attack(steps=1), engine_rng.state(3)
    options = {"direction": direction, "distance": distance, "rho": 0.5}

    def gradients(loss):
        return torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)

    def run(objective, n):
        return objective(model, x[:n], y[:n], Linf(0.1), attack, start=x[:n], state=state)

    shared = run(LocalBall(local_weight=3.0, local_share=0.35, **options), 16)
    plain = run(LocalBall(local_weight=0.0), 16)
    few, few_plain = (
        run(LocalBall(local_weight=3.0, **options), 6),
        run(LocalBall(local_weight=0.0), 6),
    )
    assert shared.stats["local"] == pytest.approx(float(few.stats["local"]), rel=1e-4)
    local = few.loss - few_plain.loss
    assert float(local.detach()) > 1e-4
    torch.testing.assert_close(shared.loss, plain.loss + local, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients(shared.loss), gradients(plain.loss + local), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_documented_totals():
    for k in (1, 2, 10):
        attack = Attack(steps=k)
        assert PGD().passes(attack).total == 2 * k + 3
        assert LocalBall(global_weight=1.0).passes(attack).total == 2 * k + 2 + 9
        assert LocalBall(direction="ce").passes(attack).total == 2 * k + 7
    assert Passes(1, 2, 3).total == 6


def _kl(p_logits, q_logits):
    return F.kl_div(
        q_logits.log_softmax(1), p_logits.log_softmax(1), log_target=True, reduction="batchmean"
    )


def _project(z, x, eps, norm):
    if norm == "Linf":
        return torch.clamp(z, x - eps, x + eps).clamp(0, 1)
    delta = z - x
    size = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return (x + delta * (eps / size).clamp(max=1)).clamp(0, 1)


def _direction(grad, norm):
    if norm == "Linf":
        return grad.sign()
    return grad / grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def _plain_attack(model, x, y, z, threat, alpha, steps):
    """The textbook loop, with a loss formed and its gradient taken down to the pixels."""
    for _ in range(steps):
        z = z.detach().requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(model(z), y, reduction="sum"), z)
        z = _project(z + alpha * _direction(grad, threat.norm), x, threat.eps, threat.norm)
    return z.detach()


THREATS = [Linf(0.1), L2(0.5)]


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_attack_is_the_textbook_attack(model, batch, threat, steps):
    x, y = batch
    start = _project(x + 0.05 * torch.randn_like(x), x, threat.eps, threat.norm)
    attack = Attack(steps=steps)
    adversary, first = attack(model, x, y, threat, start=start, state=engine_rng.state(0))
    expected = _plain_attack(model, x, y, start, threat, attack.step_size(threat.eps), steps)
    torch.testing.assert_close(adversary, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(first, model(start).detach())


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_pgd_loss(model, batch, threat):
    x, y = batch
    attack = Attack(steps=2)
    outcome = PGD()(model, x, y, threat, attack, start=x, state=engine_rng.state(0))
    adversary = _plain_attack(model, x, y, x, threat, attack.step_size(threat.eps), 2)
    torch.testing.assert_close(outcome.loss, F.cross_entropy(model(adversary), y))
    assert outcome.correct == (model(adversary).argmax(1) == y).sum()


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_local_ball_loss_along_cross_entropy(model, batch, threat):
    """direction = ce has no draw of its own, so every term can be written out."""
    x, y = batch
    attack = Attack(steps=2)
    objective = LocalBall(local_weight=2.0, global_weight=0.7, rho=0.4, direction="ce")
    outcome = objective(model, x, y, threat, attack, start=x, state=engine_rng.state(0))
    a = _plain_attack(model, x, y, x, threat, attack.step_size(threat.eps), 2)
    radius = 0.4 * threat.eps
    point = a.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)
    b = _project(a + radius * _direction(grad, threat.norm), a, radius, threat.norm)
    expected = (
        F.cross_entropy(model(a), y) + 2.0 * _kl(model(a), model(b)) + 0.7 * _kl(model(x), model(a))
    )
    torch.testing.assert_close(outcome.loss, expected)
    torch.testing.assert_close(outcome.stats["local"], _kl(model(a), model(b)).detach())
    outcome.loss.backward()
    got = [p.grad.clone() for p in model.parameters()]
    wanted = torch.autograd.grad(expected, list(model.parameters()))
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, atol=1e-6, rtol=1e-4)


def test_kl_direction_finds_a_worse_point_than_chance(batch):
    torch.manual_seed(0)
    x, y = batch
    model = Tiny()
    with torch.no_grad():
        model.fc.weight.mul_(10)
    threat, attack = Linf(0.2), Attack(steps=1)
    state = engine_rng.state(3)
    outcome = LocalBall(rho=0.5)(model, x, y, threat, attack, start=x, state=state)
    a = outcome.adversary
    random_points = [
        a + 0.1 * (2 * torch.rand(a.shape, generator=torch.Generator().manual_seed(i)) - 1)
        for i in range(10)
    ]
    by_chance = max(float(_kl(model(a), model(b.clamp(0, 1))).detach()) for b in random_points)
    assert float(outcome.stats["local"]) > 2 * by_chance


def test_variants_and_stats(model, batch):
    x, y = batch
    threat, attack = Linf(0.1), Attack(steps=1)
    for direction, distance, anchor in itertools.product(
        ("kl", "ce", "gradient-norm"), ("kl", "squared"), ("clean", "start")
    ):
        objective = LocalBall(
            global_weight=1.0, direction=direction, distance=distance, anchor=anchor
        )
        outcome = objective(model, x, y, threat, attack, start=x + 0.0, state=engine_rng.state(5))
        total = outcome.stats["ce"] + 3.0 * outcome.stats["local"] + 1.0 * outcome.stats["global"]
        torch.testing.assert_close(outcome.loss.detach(), total, atol=1e-6, rtol=1e-5)
        assert outcome.stats["local"] > 0
        # At the start x itself the global term's anchor is the clean image either way.
        assert outcome.stats["global"] > 0


def test_gradient_norm_is_the_first_order_bound(batch):
    x, y = batch
    torch.manual_seed(0)
    model, threat = Foreign(), L2(0.3)
    outcome = LocalBall(direction="gradient-norm", rho=0.5, local_weight=1.0)(
        model, x, y, threat, Attack(steps=1), start=x, state=engine_rng.state(0)
    )
    a = outcome.adversary.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(a), y, reduction="sum"), a)
    expected = 0.15 * grad.flatten(1).norm(dim=1).mean()
    torch.testing.assert_close(outcome.stats["local"], expected)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("threat", [Linf(0.1), L2(0.4)], ids=str)
def test_trades_is_the_papers_formula(model, batch, threat, steps):
    """Equation 5 with its attack, written out: loss, adversaries and weight gradients."""
    x, y = batch
    start = (x + 0.05 * torch.randn_like(x)).clamp(0, 1)
    outcome = TRADES(beta=6.0)(model, x, y, threat, Attack(steps=steps, alpha=0.03), start=start)
    outcome.loss.backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    z, clean = start, F.softmax(model(x), dim=1).detach()
    for _ in range(steps):
        z = z.detach().requires_grad_()
        divergence = F.kl_div(F.log_softmax(model(z), dim=1), clean, reduction="sum")
        (grad,) = torch.autograd.grad(divergence, z)
        if threat.norm == "Linf":
            z = z + 0.03 * grad.sign()
            z = torch.minimum(torch.maximum(z, x - 0.1), x + 0.1)
        else:
            z = z + 0.03 * grad / grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            delta = (z - x).flatten(1).renorm(2, 0, 0.4).view_as(x)
            z = x + delta
        z = z.clamp(0, 1).detach()
    at_x, at_z = model(x), model(z)
    kl = F.kl_div(F.log_softmax(at_z, dim=1), F.softmax(at_x, dim=1), reduction="batchmean")
    loss = F.cross_entropy(at_x, y) + 6.0 * kl
    loss.backward()
    torch.testing.assert_close(outcome.adversary, z, atol=1e-5, rtol=0)
    torch.testing.assert_close(outcome.loss, loss, atol=1e-5, rtol=1e-5)
    assert outcome.correct == (at_z.argmax(1) == y).sum()
    for ours_, p in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(ours_, p.grad, atol=1e-5, rtol=1e-3)


def _weights_agree(model, outcome, expected):
    """Our loss and its weight gradients are the written-out formula's."""
    torch.testing.assert_close(outcome.loss, expected, atol=1e-5, rtol=1e-5)
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(expected, parameters)
    got = torch.autograd.grad(outcome.loss, parameters)
    for g, w in zip(got, wanted, strict=True):
        torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-3)


def test_clean_is_cross_entropy(model, batch):
    x, y = batch
    outcome = Clean()(model, x, y, Linf(0.1), Attack())
    _weights_agree(model, outcome, F.cross_entropy(model(x), y))
    assert outcome.adversary is x


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_free_step_follows_the_loss(model, batch, threat):
    """Free-AT: one backward pass, the weights' gradient and the perturbation's."""
    x, y = batch
    start = _project(x + 0.05 * torch.randn_like(x), x, threat.eps, threat.norm)
    attack = Attack(steps=0, start="memory", alpha=0.07)
    outcome = PGD()(model, x, y, threat, attack, start=start)
    outcome.loss.backward()
    expected = _plain_attack(model, x, y, start, threat, 0.07, 1)
    torch.testing.assert_close(outcome.adversary(), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(outcome.loss, F.cross_entropy(model(start), y))


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("direction", ["kl", "ce"])
def test_local_ball_around_a_remembered_adversary(model, batch, threat, direction):
    x, y = batch
    start = _project(x + 0.05 * torch.randn_like(x), x, threat.eps, threat.norm)
    attack = Attack(steps=0, start="memory", alpha=0.07)
    objective = LocalBall(local_weight=1e-6, direction=direction)
    outcome = objective(model, x, y, threat, attack, start=start, state=engine_rng.state(0))
    outcome.loss.backward()
    after = outcome.adversary if direction == "ce" else outcome.adversary()
    expected = _plain_attack(model, x, y, start, threat, 0.07, 1)
    near = (after - expected).abs() < 1e-4
    assert near.float().mean() > 0.98  # a sign at a gradient of nearly zero may differ


def test_no_step_needs_a_memory_and_an_objective_that_can():
    for objective, start in ((PGD(), "random"), (TRADES(), "memory"), (MART(), "memory")):
        with pytest.raises(EngineError, match=r"attack\.steps = 0"):
            objective.check(Attack(steps=0, start=start))
    for bad in (
        LocalBall(direction="gradient-norm"),
        LocalBall(global_weight=1.0, anchor="start"),
    ):
        with pytest.raises(EngineError, match="at least 1"):
            bad.check(Attack(steps=0, start="memory"))
    PGD().check(Attack(steps=0, start="memory"))


def test_mart_is_the_papers_formula(model, batch):
    x, y = batch
    threat, start = Linf(0.1), (x + 0.02).clamp(0, 1)
    outcome = MART(weight=5.0)(model, x, y, threat, Attack(steps=3, alpha=0.04), start=start)
    a = _plain_attack(model, x, y, start, threat, 0.04, 3)
    torch.testing.assert_close(outcome.adversary, a, atol=1e-6, rtol=1e-5)
    p, q = model(x).softmax(1), model(a).softmax(1)
    rows = torch.arange(len(y))
    rival = q.clone()
    rival[rows, y] = 0
    boosted = -q[rows, y].log() - (1 - rival.amax(1)).log()
    divergence = (p * (p / q).log()).sum(1)
    _weights_agree(model, outcome, (boosted + 5.0 * divergence * (1 - p[rows, y])).mean())


def test_mart_is_finite_where_the_network_is_sure(batch):
    from engine.objectives.mart import boosted_cross_entropy

    logits = torch.tensor([[200.0, 0.0, 0.0], [0.0, 200.0, -200.0]], requires_grad=True)
    loss = boosted_cross_entropy(logits, torch.tensor([0, 0]))
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([0.0, 400.0]))
    assert logits.grad.isfinite().all()


def test_n_fgsm_steps_from_noise_and_is_not_clipped(model, batch):
    x, y = batch
    x = 0.3 + 0.4 * x
    state = engine_rng.state(4)
    outcome = NFGSM(noise=2.0)(model, x, y, Linf(0.05), Attack(steps=1), state=state)
    from engine import kernels

    noisy = kernels.uniform_start(x, 0.1, state, norm="Linf", stream=engine_rng.START)
    point = noisy.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(point), y, reduction="sum"), point)
    expected = noisy + 0.05 * grad.sign()
    torch.testing.assert_close(outcome.adversary, expected, atol=1e-6, rtol=0)
    assert (outcome.adversary - x).abs().max() > 0.05 * 1.5
    _weights_agree(model, outcome, F.cross_entropy(model(expected), y))


@pytest.mark.parametrize("smoothing", [0.0, 4 / 9])
def test_fgsm_pgi_is_the_papers_formula(model, batch, smoothing):
    """Labels are smoothed along the step as in the loss."""
    x, y = batch
    threat = Linf(0.1)
    start = _project(x + 0.1 * torch.randn_like(x), x, 0.1, "Linf")
    outcome = FGSMPGI(weight=10.0, label_smoothing=smoothing)(
        model, x, y, threat, Attack(steps=1, start="memory"), start=start
    )

    def loss(z):
        return F.cross_entropy(model(z), y, label_smoothing=smoothing)

    point = start.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(point), point)
    a = _project(start + 0.1 * grad.sign(), x, 0.1, "Linf")
    torch.testing.assert_close(outcome.adversary, a, atol=1e-6, rtol=1e-5)
    _weights_agree(model, outcome, loss(a) + 10.0 * F.mse_loss(model(a), model(start)))


def test_grad_align_is_the_papers_formula(batch):
    x, y = batch
    torch.manual_seed(0)
    model, threat, state = Foreign(), Linf(0.1), engine_rng.state(2)
    outcome = GradAlign(weight=0.7)(model, x, y, threat, Attack(steps=1), state=state)
    from engine import kernels

    def gradient(z, **how):
        z = z.clone().requires_grad_()
        return torch.autograd.grad(F.cross_entropy(model(z), y, reduction="sum"), z, **how)[0]

    g = gradient(x)
    a = _project(x + 0.125 * g.sign(), x, 0.1, "Linf")
    noisy = kernels.uniform_start(x, 0.1, state, norm="Linf", stream=engine_rng.START)
    h = gradient(noisy, create_graph=True).flatten(1)
    g = g.flatten(1)
    cosine = (g * h).sum(1) / (g.norm(dim=1) * h.norm(dim=1))
    _weights_agree(model, outcome, F.cross_entropy(model(a), y) + 0.7 * (1 - cosine).mean())
    torch.testing.assert_close(outcome.adversary, a)


@pytest.mark.parametrize("size", [1.0, 1e-12, 1e-20, 1e-28])
def test_grad_align_of_gradients_whose_squares_vanish(size):
    """Compare the cosine and its derivative with float64; a zero row gives 0, without gradient."""
    draw = torch.Generator().manual_seed(0)
    a, b = (size * torch.randn(6, 784, generator=draw) for _ in range(2))
    a[5], b[4] = 0, 0
    point, exact = b.clone().requires_grad_(), b[:4].double().requires_grad_()
    cosine = grad_align._cosine(a, point)
    cosine.sum().backward()
    wanted = F.cosine_similarity(a[:4].double(), exact, dim=1, eps=0)
    wanted.sum().backward()
    torch.testing.assert_close(cosine[:4].double(), wanted.detach(), atol=1e-6, rtol=1e-6)
    scale = exact.grad.abs().max()
    assert (point.grad[:4].double() - exact.grad).abs().max() < 1e-6 * scale
    assert cosine[4:].tolist() == [0, 0]
    assert not point.grad[4:].any()


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_llr_is_the_papers_formula(batch, threat):
    x, y = batch
    torch.manual_seed(0)
    model = Foreign()
    start = _project(x + 0.05 * torch.randn_like(x), x, threat.eps, threat.norm)
    objective = LLR(linearity=4.0, slope=3.0)
    outcome = objective(model, x, y, threat, Attack(steps=2, alpha=0.05), start=start)

    point = x.clone().requires_grad_()
    at_x = F.cross_entropy(model(point), y, reduction="none")
    (g,) = torch.autograd.grad(at_x.sum(), point, create_graph=True)

    def departure(z, g):
        bent = F.cross_entropy(model(z), y, reduction="none")
        return (
            bent - F.cross_entropy(model(x), y, reduction="none") - ((z - x) * g).flatten(1).sum(1)
        )

    z = start
    for _ in range(2):
        z = z.detach().requires_grad_()
        (up,) = torch.autograd.grad(departure(z, g.detach()).abs().sum(), z)
        z = _project(z + 0.05 * _direction(up, threat.norm), x, threat.eps, threat.norm).detach()
    torch.testing.assert_close(outcome.adversary, z, atol=1e-5, rtol=1e-4)
    linear = ((z - x) * g).flatten(1).sum(1)
    bend = F.cross_entropy(model(z), y, reduction="none") - at_x - linear
    expected = at_x.mean() + 4.0 * bend.abs().mean() + 3.0 * linear.abs().mean()
    _weights_agree(model, outcome, expected)


@pytest.mark.parametrize(("guided", "step"), [("alternate", 0), ("alternate", 1), ("always", 0)])
def test_gat_is_the_papers_formula(model, batch, guided, step):
    """The guiding term is there in every other step, or in all."""
    x, y = batch
    x = 0.2 + 0.6 * x
    threat, state = Linf(0.1), engine_rng.state(3, step=step)
    start = x + 0.05 * torch.randn_like(x).sign()
    objective = GAT(weight=10.0, guided=guided)
    outcome = objective(model, x, y, threat, Attack(steps=1), start=start, state=state)
    p, point = model(x).softmax(1), start.clone().requires_grad_()
    apart = (p.detach() - model(point).softmax(1)).square().sum(1)
    weight = 10.0 if guided == "always" else step * 10.0
    cost = F.cross_entropy(model(point), y, reduction="sum") + weight * apart.sum()
    (grad,) = torch.autograd.grad(cost, point)
    a = _project(start + 0.1 * grad.sign(), x, 0.1, "Linf")
    torch.testing.assert_close(outcome.adversary, a, atol=1e-6, rtol=1e-5)
    distance = (p - model(a).softmax(1)).square().sum(1).mean()
    _weights_agree(model, outcome, F.cross_entropy(model(x), y) + 10.0 * distance)


@pytest.mark.parametrize("step", [0, 1])
def test_nuat_is_the_papers_formula(model, batch, step):
    """The nuclear norm by PyTorch's decomposition and its autograd; it guides every other step."""
    x, y = batch
    x = 0.2 + 0.6 * x
    threat, state = Linf(0.1), engine_rng.state(3, step=step)
    start = x + 0.05 * torch.randn_like(x).sign()
    outcome = NuAT(weight=4.5)(model, x, y, threat, Attack(steps=1), start=start, state=state)

    point = start.clone().requires_grad_()
    at_point = model(point)
    nuclear = torch.linalg.matrix_norm(model(x).detach() - at_point, "nuc") / len(x)
    cost = F.cross_entropy(at_point, y) + step * 4.5 * nuclear
    (grad,) = torch.autograd.grad(cost, point)
    a = _project(start + 0.1 * grad.sign(), x, 0.1, "Linf")
    torch.testing.assert_close(outcome.adversary, a, atol=1e-6, rtol=1e-5)
    nuclear = torch.linalg.matrix_norm(model(x) - model(a), "nuc") / len(x)
    _weights_agree(model, outcome, F.cross_entropy(model(x), y) + 4.5 * nuclear)


@pytest.mark.parametrize("shape", [(128, 10), (6, 10), (32, 100)])
def test_the_unitary_factor_is_the_decompositions(shape):
    """Of matrices whose singular values lie three powers of ten apart; of zeros it is zero."""
    torch.manual_seed(0)
    rank = min(shape)
    u, _, v = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    matrix = (u * torch.logspace(0, -3, rank)) @ v
    found = nuat.unitary_factor(matrix)
    torch.testing.assert_close(found, u @ v, atol=1e-3, rtol=0)
    wanted = torch.linalg.matrix_norm(matrix, "nuc")
    torch.testing.assert_close((found * matrix).sum(), wanted, atol=0, rtol=1e-4)
    assert not nuat.unitary_factor(torch.zeros(shape)).any()


@pytest.mark.parametrize("projected", [True, False])
def test_liet_is_the_papers_formula(model, batch, projected):
    """From a given start: the step, and the divergence from both ends to their mean."""
    x, y = batch
    threat, start = Linf(0.1), (x + 0.09 * torch.randn_like(x).sign()).clamp(0, 1)
    objective = LIET(weight=7.0, label_smoothing=0.4, projected=projected)
    outcome = objective(model, x, y, threat, Attack(steps=1), start=start)

    point = start.clone().requires_grad_()
    (grad,) = torch.autograd.grad(F.cross_entropy(model(point), y, label_smoothing=0.4), point)
    a = start + 0.1 * grad.sign()
    a = _project(a, x, 0.1, "Linf") if projected else a.clamp(0, 1)
    torch.testing.assert_close(outcome.adversary, a, atol=1e-6, rtol=1e-5)
    p, q = model(start).softmax(1), model(a).softmax(1)
    m = ((p + q) / 2).log()
    apart = F.kl_div(m, p, reduction="batchmean") + F.kl_div(m, q, reduction="batchmean")
    loss = F.cross_entropy(model(a), y, label_smoothing=0.4) + 7.0 * apart / 2
    _weights_agree(model, outcome, loss)


def test_liet_starts_from_what_a_grey_image_says_of_the_label(model, batch):
    """With nothing erased, x + I_y or x - I_y by the step's coin; with all erased, noise."""
    x, y = batch
    x, threat = 0.3 + 0.4 * x, Linf(0.1)
    grey = torch.full((4, *x.shape[1:]), 0.5, requires_grad=True)
    (grad,) = torch.autograd.grad(F.cross_entropy(model(grey), torch.arange(4)), grey)
    written = 0.1 * grad.sign()[y]
    signs = set()
    for step in range(8):
        state = engine_rng.state(0, step=step)
        delta = LIET(erased=(0.0, 0.0), label_smoothing=0.0)._start(model, x, y, threat, state) - x
        sign = float((delta * written).sum().sign())
        torch.testing.assert_close(delta, sign * written, atol=1e-6, rtol=0)
        signs.add(sign)
        half = LIET(erased=(0.5, 0.5))._start(model, x, y, threat, state) - x
        kept = (half.abs() - 0.1).abs() < 1e-6
        assert 0.4 < float(kept.float().mean()) < 0.6
        noise = LIET(erased=(1.0, 1.0), noise=2.0)._start(model, x, y, threat, state) - x
        assert 0.19 < float(noise.abs().max()) <= 0.2 + 1e-6
        assert abs(float(noise.mean())) < 0.02
    assert signs == {1.0, -1.0}


def test_liet_costs_what_fgsm_pgi_costs_and_the_grey_images(batch):
    x, y = batch
    model, attack = CountingStem(), Attack(steps=1)
    LIET()(model, x, y, Linf(0.1), attack).loss.backward()
    declared = LIET().passes(attack)
    assert declared == FGSMPGI().passes(attack)
    # Four classes, and one image to find out that there are four.
    assert model.counts["forward"] == declared.forward * len(x) + 5
    assert model.counts["input_grad"] == declared.input_grad * len(x) + 4
    assert model.counts["weight_grad"] == declared.weight_grad * len(x)
    with pytest.raises(EngineError, match="start must be random"):
        LIET().check(Attack(steps=1, start="memory"))


@pytest.mark.parametrize("noise", [0.5, 1.0])
def test_gat_starts_from_bernoulli_noise(batch, noise):
    x, y = batch
    torch.manual_seed(0)
    x, seen = 0.3 + 0.4 * x, []

    class Spy(Foreign):
        def forward(self, z):
            seen.append(z.detach().clone())
            return super().forward(z)

    GAT(noise=noise)(Spy(), x, y, Linf(0.1), Attack(steps=1))
    start = seen[1] - x
    torch.testing.assert_close(start.abs(), torch.full_like(x, 0.1 * noise))
    assert 0.4 < float((start > 0).float().mean()) < 0.6


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("objective", [PGD(), LocalBall(global_weight=1.0)], ids=str)
def test_adversary_stays_in_the_threat_ball(model, batch, threat, objective):
    x, y = batch
    outcome = objective(model, x, y, threat, Attack(steps=3))
    delta = (outcome.adversary - x).flatten(1)
    size = delta.abs().amax(1) if threat.norm == "Linf" else delta.norm(dim=1)
    assert (size <= threat.eps * (1 + 1e-5)).all()
    assert outcome.adversary.min() >= 0
    assert outcome.adversary.max() <= 1


def test_same_state_same_adversary_and_next_state_another(model, batch):
    x, y = batch
    run = lambda state: PGD()(model, x, y, Linf(0.1), Attack(steps=1), state=state).adversary  # noqa: E731
    first = run(engine_rng.state(1, step=0))
    assert torch.equal(first, run(engine_rng.state(1, step=0)))
    assert not torch.equal(first, run(engine_rng.state(1, step=1)))
    assert not torch.equal(first, run(engine_rng.state(2, step=0)))


def test_own_loop_draws_afresh_every_call(model, batch):
    x, y = batch
    torch.manual_seed(7)
    one = PGD()(model, x, y, Linf(0.1), Attack(steps=1)).adversary
    two = PGD()(model, x, y, Linf(0.1), Attack(steps=1)).adversary
    assert not torch.equal(one, two)


@pytest.mark.parametrize("batch_norm", ["eval", "batch"])
@pytest.mark.parametrize(
    "objective", [PGD(), LocalBall(global_weight=1.0), LocalBall(direction="ce")], ids=str
)
def test_attack_passes_leave_batch_norm_alone(objective, batch_norm, batch):
    """Running statistics move once for every trained set of images, and never for an attack."""
    x, y = batch
    model = Tiny(batch_norm=True).train()
    attack = Attack(steps=4, batch_norm=batch_norm)
    objective(model, x, y, Linf(0.1), attack).loss.backward()
    assert model.bn.num_batches_tracked == objective.passes(attack).weight_grad
    assert model.training
    assert model.bn.training
    assert model.bn.track_running_stats


def test_batch_norm_policy_changes_the_attack(batch):
    x, y = batch
    torch.manual_seed(0)
    model = Tiny(batch_norm=True).train()
    model.bn.running_mean.fill_(3.0)
    state = engine_rng.state(0)
    adversaries = {
        policy: Attack(steps=3, batch_norm=policy)(model, x, y, Linf(0.1), state=state)[0]
        for policy in ("eval", "batch")
    }
    assert not torch.equal(adversaries["eval"], adversaries["batch"])


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Linf(-0.1), "eps"),
        (lambda: Attack(steps=-1), "steps"),
        (lambda: LocalBall(rho=0.0), "rho"),
        (lambda: LocalBall(rho=1.5), "rho"),
        (lambda: LocalBall(local_weight=-1), "local_weight"),
    ],
)
def test_options_out_of_range_name_the_field(make, field):
    with pytest.raises(ValidationError, match=field):
        make()


def test_radius_as_people_write_it():
    assert Linf("8/255").eps == pytest.approx(8 / 255)
    assert L2("128/255").norm == "L2"


class Reads(TorchDispatchMode):
    """Counts what waits for the device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs or {})


def test_a_call_without_a_state_does_not_wait_for_the_device(batch):
    x, y = batch
    torch.manual_seed(3)
    objective, model = PGD(), Foreign()
    first = objective(model, x, y, Linf(0.1), Attack(steps=1))
    # Ours and the native kernels read on the CPU; with the reference nothing does.
    with backends.use("reference"), Reads() as reads:
        second = objective(model, x, y, Linf(0.1), Attack(steps=1))
    assert reads.count == 0
    # Its numbers go on from call to call, and begin anew with another seed.
    assert not torch.equal(first.adversary, second.adversary)
    torch.manual_seed(4)
    other = objective(model, x, y, Linf(0.1), Attack(steps=1))
    assert not torch.equal(other.adversary, first.adversary)


def _mixed(y, share=None):
    second = (y + 1) % 4
    share = torch.linspace(0.5, 1, len(y)) if share is None else torch.full((len(y),), share)
    return MixedLabels(y, second, share)


@pytest.mark.parametrize("kind", OBJECTIVES.values(), ids=lambda kind: kind().name)
def test_every_objective_takes_mixed_labels_or_refuses_them(model, batch, kind):
    x, y = batch
    objective, state = kind(), engine_rng.state(1)
    arguments = (Linf(0.1), Attack(steps=1))
    if not objective.mixes:
        with pytest.raises(EngineError, match=f"the objective {objective.name} needs one label"):
            objective(model, x, _mixed(y), *arguments, state=state)
        return
    plain = objective(model, x, y, *arguments, state=state)
    alone = objective(model, x, _mixed(y, 1.0), *arguments, state=state)
    torch.testing.assert_close(alone.loss, plain.loss)
    torch.testing.assert_close(alone.adversary, plain.adversary)
    assert torch.equal(alone.correct, plain.correct)
    # The order of the two labels means nothing to the loss.
    mixed = _mixed(y)
    swapped = MixedLabels(mixed.second, mixed.first, 1 - mixed.share)
    one, other = (objective(model, x, t, *arguments, state=state) for t in (mixed, swapped))
    torch.testing.assert_close(one.loss, other.loss)
    assert not torch.allclose(one.loss, plain.loss)
    one.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("objective", [PGD(), LocalBall(local_weight=0.0), Clean()], ids=repr)
def test_the_loss_of_mixed_labels_is_that_of_probabilities(model, batch, objective):
    x, y = batch
    labels = _mixed(y)
    outcome = objective(model, x, labels, Linf(0.1), Attack(steps=2), state=engine_rng.state(1))
    wanted = torch.zeros(len(y), 4).scatter_(1, labels.first[:, None], labels.share[:, None])
    wanted.scatter_add_(1, labels.second[:, None], 1 - labels.share[:, None])
    expected = F.cross_entropy(model(outcome.adversary), wanted)
    torch.testing.assert_close(outcome.loss, expected)


@pytest.mark.parametrize(
    "kind",
    [kind for kind in OBJECTIVES.values() if kind not in (MART, FGSMPGI, LIET)],
    ids=lambda kind: kind().name,
)
def test_every_objective_smooths_the_labels_of_its_cross_entropy(model, batch, kind):
    x, y = batch
    smoothing = 0.2
    outcome = kind(label_smoothing=smoothing)(
        model, x, y, Linf(0.1), Attack(steps=1), state=engine_rng.state(1)
    )
    # Some have it at the clean image, the others at the adversary.
    at = x if kind in (TRADES, GAT, NuAT, LLR) else outcome.adversary
    expected = F.cross_entropy(model(at), y, label_smoothing=smoothing)
    torch.testing.assert_close(outcome.stats["ce"], expected.detach())


def test_mart_smooths_its_first_term(model, batch):
    x, y = batch
    arguments, state = (model, x, y, Linf(0.1), Attack(steps=1)), engine_rng.state(1)
    plain, smooth = (MART(label_smoothing=s)(*arguments, state=state) for s in (0.0, 0.2))
    logits = model(plain.adversary).detach()
    gap = F.cross_entropy(logits, y, label_smoothing=0.2) - F.cross_entropy(logits, y)
    torch.testing.assert_close(smooth.loss - plain.loss, gap, rtol=1e-4, atol=1e-5)
