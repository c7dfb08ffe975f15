"""The engine's AutoAttack against the authors' package, attack by attack and as a whole."""

from __future__ import annotations

import math

import pytest
import torch
from pyautoattack import AutoAttack
from pyautoattack.fab_projections import projection_l2, projection_linf
from torch import nn
from torch.nn import functional as F

from engine import L2, Linf, ThreatModel
from engine.evaluation.autoattack import ensemble
from engine.evaluation.autoattack import square as square_module
from engine.evaluation.autoattack.apgd import apgd, checkpoints, random_start
from engine.evaluation.autoattack.fab import fab
from engine.evaluation.autoattack.losses import CrossEntropy, LogitDifference, TargetedDLR
from engine.evaluation.autoattack.oracle import Oracle, lengths
from engine.evaluation.autoattack.square import square, window_side
from engine.evaluation.autoattack.square_l2 import square_l2
from engine.evaluation.autoattack.targeted import apgd_targeted
from engine.evaluation.robust_accuracy import evaluation_mode, pgd
from engine.kernels.reference.autoattack import project_onto_plane

from ..conftest import Foreign, Tiny, blobs

SEED = 3
THREATS = [Linf(0.26), L2(1.2)]
# Random search alone needs larger balls.
LARGE = [Linf(0.3), L2(1.9)]


@pytest.fixture(scope="module", params=["stem", "foreign"])
def trained(request):
    """A network that is right on most images, and images that it gets right."""
    torch.manual_seed(0)
    net = Tiny(6) if request.param == "stem" else Foreign(6)
    images, labels = blobs(96)
    x = images.float() / 255
    optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(30):
        optimiser.zero_grad()
        F.cross_entropy(net(x), labels).backward()
        optimiser.step()
    with evaluation_mode(net):
        right = net(x).argmax(1) == labels
        yield net, x[right][:48], labels[right][:48]


def packaged(net, threat, attack):
    """The authors' package, with one attack of its standard version."""
    judge = AutoAttack(
        net,
        norm=threat.norm,
        eps=threat.eps,
        seed=SEED,
        device="cpu",
        version="custom",
        attacks=[attack],
    )
    judge.apgd.n_restarts = 1
    judge.apgd_targeted.n_target_classes = judge.fab.n_target_classes = 5
    judge.square.n_queries = 300
    return judge


def draw():
    return torch.Generator().manual_seed(SEED)


def theirs(net, x, y, threat, attack):
    """Which images the package's attack breaks, and the adversaries."""
    found, labels = packaged(net, threat, attack).run_standard_evaluation(x, y, batch_size=len(x))
    return labels != y, found


def as_mask(rows, like):
    return torch.zeros(len(like), dtype=torch.bool).index_fill_(0, rows, True)


def same_adversaries(ours, theirs, share):
    """Rounding sends a few images along other ways; the others have one adversary."""
    gaps = (ours - theirs).flatten(1).abs().amax(1)
    assert float((gaps < 1e-4).double().mean()) >= share


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_apgd_walks_as_the_package_does(trained, threat):
    net, x, y = trained
    start = random_start(x, threat, draw())
    rows, _ = apgd(Oracle(net), x, start, CrossEntropy(y), threat, steps=100)
    broken, _ = theirs(net, x, y, threat, "apgd-ce")
    assert 4 < int(broken.sum()) < len(x) - 4
    assert torch.equal(as_mask(rows, x), broken)


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_targeted_attacks_break_what_the_package_breaks(trained, threat):
    net, x, y = trained
    attacks = ensemble._attacks(Oracle(net), x, y, net(x), threat, "standard", SEED, 500)
    for name in ("apgd-t", "fab-t"):
        rows, found = attacks[name](torch.arange(len(x)))
        broken, _ = theirs(net, x, y, threat, name)
        assert torch.equal(as_mask(rows, x), broken), name
        assert (net(found).argmax(1) != y[rows]).all()
        assert (lengths(found - x[rows], threat.norm) <= threat.eps * (1 + 1e-5)).all()


def test_fab_finds_the_packages_adversaries(trained):
    net, x, y = trained
    target = net(x).sort(1)[1][:, -2]
    judge = packaged(net, THREATS[0], "fab-t").fab
    judge.targeted, judge.target_class = True, 2
    nearest = judge.attack_single_run(x, y, is_targeted=True)
    reach = lengths(nearest - x, "Linf")
    broken = (net(nearest).argmax(1) != y) & (reach <= THREATS[0].eps)
    rows, _ = fab(Oracle(net), x, y, target[:, None], THREATS[0], steps=100)
    assert torch.equal(as_mask(rows, x), broken)


@pytest.mark.parametrize("threat", [Linf(0.1), *THREATS], ids=str)
def test_targets_that_share_passes_have_the_starts_of_turns(trained, threat):
    """In one of two orders an image falls in a round of two turns: the second is taken again."""
    net, x, y = trained
    likely_first = net(x).sort(1, descending=True)[1][:, 1:6]
    again = fallen = 0
    for targets in (likely_first.flip(1), likely_first.roll(1, 1)):
        found, images = [], []
        for rows in (1, 10_000):
            oracle, state = Oracle(net), draw()
            goal = (x, y, targets, threat)
            fell, points = apgd_targeted(oracle, *goal, steps=20, rows=rows, draw=state)
            order = fell.argsort()
            found.append((fell[order], points[order], state.get_state()))
            images.append(oracle.gradient_images)
        (fell, points, state), (fell_too, points_too, state_too) = found
        assert torch.equal(fell, fell_too)
        torch.testing.assert_close(points, points_too, rtol=0, atol=1e-4)
        assert torch.equal(state, state_too)
        again += images[1] - images[0]
        fallen += len(fell)
    assert (fallen > 0) == (again > 0) == (threat in THREATS)


def test_targets_share_passes_while_no_image_falls(trained, monkeypatch):
    net, x, y = trained
    sizes = []
    monkeypatch.setattr(Oracle, "gradient", _noting(Oracle.gradient, sizes))
    targets = net(x).sort(1)[1][:, :5]
    fell, _ = apgd_targeted(
        Oracle(net), x, y, targets, Linf(0.1), steps=1, rows=3 * len(x), draw=draw()
    )
    assert len(fell) == 0
    assert [size // len(x) for size in sizes[::2]] == [1, 2, 2]


def _noting(method, sizes):
    def noted(self, x, *others):
        sizes.append(len(x))
        return method(self, x, *others)

    return noted


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_fab_walks_to_several_targets_at_once(trained, threat):
    """The images that fall are those that one target after the other would take."""
    net, x, y = trained
    oracle, targets = Oracle(net), net(x).sort(1, descending=True)[1][:, 1:6]
    words = {"threat": threat, "steps": 30}
    each = [as_mask(fab(oracle, x, y, one, **words)[0], x) for one in targets.split(1, 1)]
    rows, found = fab(oracle, x, y, targets, **words)
    assert sum(int(mask.sum()) for mask in each) > len(rows) > max(int(m.sum()) for m in each)
    assert len(rows.unique()) == len(rows)
    assert torch.equal(as_mask(rows, x), torch.stack(each).any(0))
    assert (net(found).argmax(1) != y[rows]).all()
    assert (lengths(found - x[rows], threat.norm) <= threat.eps).all()


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_the_size_of_a_batch_decides_only_how_many_targets_share_a_pass(
    trained, threat, monkeypatch
):
    monkeypatch.setattr(ensemble, "STEPS", 30)
    net, x, y = trained
    rows, clean = torch.arange(len(x)), net(x)
    found = []
    for size in (1, 2 * len(x), 500):
        attacks = ensemble._attacks(Oracle(net), x, y, clean, threat, "standard", SEED, size)
        found.append(as_mask(attacks["fab-t"](rows)[0], x))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("rows", [1, 64, 4096])
def test_square_tries_the_packages_windows(trained, rows):
    """The same adversaries, however many queries a pass tries."""
    net, x, y = trained
    threat = LARGE[0]
    found, adversaries = square(Oracle(net), x, y, threat, queries=300, rows=rows, draw=draw())
    broken, wanted = theirs(net, x, y, threat, "square")
    assert int(broken.sum()) > 4
    assert torch.equal(as_mask(found, x), broken)
    same_adversaries(adversaries, wanted[found], share=1.0)


def test_square_passes_no_window_that_changes_no_pixel():
    """The radius is below a float32's last bit, and the network takes no empty batch."""
    x, calls = torch.full((6, 3, 8, 8), 0.5), []

    class Counted(nn.Module):
        def forward(self, x):
            calls.append(len(x))
            return x.flatten(1)[:, :2]

    y = torch.zeros(6, dtype=torch.int64)
    x[:, 0, 0, 0] = 0.75
    options = {"queries": 50, "rows": 100, "draw": draw()}
    found, _ = square(Oracle(Counted()), x, y, Linf(1e-9), **options)
    assert len(found) == 0
    assert calls == [6]


def test_square_changes_the_pixels_of_its_windows():
    """Windows of all sizes in one pass, on oblong images of three channels."""
    torch.manual_seed(2)
    x, eps, queries = torch.rand(4, 3, 9, 12), 0.1, 300
    low, high = (x - eps).clamp(min=0.0), (x + eps).clamp(max=1.0)
    best = torch.where(torch.rand_like(x) < 0.5, low, high)
    order = torch.tensor([[0, 1], [11, 299], [60, 250], [298, 5]])
    windows = square_module._draw_windows(x, eps, queries, draw())
    search = square_module._Search(None, low, high, None, best, None, None)
    pixels, values, moved = square_module._changed(search, windows, order)
    points = best[:, None].repeat(1, 2, 1, 1, 1)
    points.flatten(3).scatter_(3, pixels, values)
    assert torch.equal(moved, (points != best[:, None]).flatten(2).any(2))
    for image, queue in enumerate(order.tolist()):
        for place, query in enumerate(queue):
            wanted = best[image].clone()
            top, left, side = (int(t[query]) for t in (windows.top, windows.left, windows.side))
            part = (slice(None), slice(top, top + side), slice(left, left + side))
            moved = wanted[part] + windows.change[query][:, None, None]
            wanted[part] = moved.maximum(low[image][part]).minimum(high[image][part])
            assert torch.equal(points[image, place], wanted)
            assert not torch.equal(wanted, best[image])


def test_square_in_l2_tries_the_packages_windows(trained):
    net, x, y = trained
    found, adversaries = square_l2(Oracle(net), x, y, LARGE[1], queries=300, draw=draw())
    broken, wanted = theirs(net, x, y, LARGE[1], "square")
    assert int(broken.sum()) > 4
    assert torch.equal(as_mask(found, x), broken)
    same_adversaries(adversaries, wanted[found], share=1.0)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 5, 7), (1, 28, 28)])
def test_the_projection_is_the_textbooks(norm, shape):
    """Newton's method against the package's sort, planes out of reach and flat slopes included."""
    torch.manual_seed(len(shape) + shape[-1])
    x = torch.rand(200, *shape)
    normal = torch.randn(200, *shape) * (torch.rand(200, *shape) > 0.3)
    height = torch.randn(200) * torch.logspace(-3, 2, 200)
    flat, w = x.flatten(1), normal.flatten(1)
    textbook = projection_linf if norm == "Linf" else projection_l2
    wanted = textbook(flat, w, (flat * w).sum(1) - height)
    found = project_onto_plane(flat, w, height, norm)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-4)
    inside = x.flatten(1) + found
    assert float(inside.min()) >= -1e-6
    assert float(inside.max()) <= 1 + 1e-6


def test_a_plane_through_the_point_moves_nothing():
    x, normal = torch.rand(3, 16), torch.randn(3, 16)
    for norm in ("Linf", "L2"):
        assert not project_onto_plane(x, normal, torch.zeros(3), norm).any()
        assert not project_onto_plane(x, torch.zeros_like(x), torch.ones(3), norm).any()


@pytest.mark.parametrize("loss", ["cross-entropy", "dlr", "difference"])
def test_gradients_are_autograds(loss):
    torch.manual_seed(5)
    logits = torch.randn(40, 7, dtype=torch.float64, requires_grad=True)
    y = torch.randint(0, 7, (40,))
    target = (y + torch.randint(1, 7, (40,))) % 7
    made = {
        "cross-entropy": CrossEntropy(y),
        "dlr": TargetedDLR(y, target),
        "difference": LogitDifference(y),
    }[loss]
    value = made.value(logits)
    (wanted,) = torch.autograd.grad(value.sum(), logits)
    torch.testing.assert_close(made.gradient(logits.detach()), wanted)
    kept = torch.arange(40) % 3 == 0
    torch.testing.assert_close(made.take(kept).value(logits[kept]), value[kept])


def test_dlr_is_the_papers():
    """Equation 6, written out for one image."""
    logits = torch.tensor([[3.0, 1.0, 2.0, -1.0, 0.5]])
    loss = TargetedDLR(torch.tensor([0]), torch.tensor([3]))
    assert loss.value(logits).item() == pytest.approx(-(3.0 + 1.0) / (3.0 - (1.0 + 0.5) / 2))


def test_checkpoints_are_the_papers():
    numbers, total = [], 0
    for length in checkpoints(100):
        total += length
        if total > 100:
            break
        numbers.append(total)
    assert numbers == [22, 41, 57, 70, 80, 87, 93, 99]


def test_windows_shrink_as_the_paper_says():
    """80 % of the image at first; half of that after 10 queries, a 128th from query 4,001 on."""
    sides = [window_side(query, 1024) for query in (0, 10, 11, 4000, 4001, 4999)]
    shares = [1, 1, 1 / 2, 1 / 64, 1 / 128, 1 / 128]
    assert sides == pytest.approx([math.sqrt(0.8 * share * 1024) for share in shares])


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_the_whole_verdict_is_the_packages(trained, threat, monkeypatch):
    net, x, y = trained
    monkeypatch.setattr(ensemble, "QUERIES", 300)
    monkeypatch.setattr(ensemble, "TARGETS", 5)
    judge = packaged(net, threat, "apgd-ce")
    judge.attacks_to_run = ["apgd-ce", "apgd-t", "fab-t", "square"]
    wrong = (y + 1) % 6
    labels = torch.where(torch.arange(len(y)) % 9 == 0, wrong, y)
    _, found = judge.run_standard_evaluation(x, labels, batch_size=20)
    verdict = ensemble.run(net, x, labels, threat, seed=SEED, batch_size=20)
    assert torch.equal(verdict.robust, found == labels)
    assert list(verdict.after) == judge.attacks_to_run
    assert verdict.after["square"] == float(verdict.robust.double().mean())
    broken = ~verdict.robust
    assert (net(verdict.adversaries).argmax(1)[broken] != labels[broken]).all()
    inside = lengths(verdict.adversaries - x, threat.norm) <= threat.eps * (1 + 1e-5)
    assert inside.all()
    assert 0 <= float(verdict.adversaries.min()) <= float(verdict.adversaries.max()) <= 1


@pytest.mark.parametrize("classes", [2, 3])
def test_two_or_three_classes_are_attacked(classes, monkeypatch):
    monkeypatch.setattr(ensemble, "QUERIES", 50)
    torch.manual_seed(1)
    net = Tiny(classes).eval()
    x = torch.rand(12, 1, 6, 6)
    with evaluation_mode(net):
        y = net(x).argmax(1)
        verdict = ensemble.run(net, x, y, ThreatModel("Linf", 0.3))
    assert list(verdict.after) == ["apgd-ce", "apgd-difference", "fab-t", "square"]
    assert float(verdict.robust.double().mean()) < 1


def test_an_image_passes_once_for_its_targets(trained):
    """The clean logits rank the target classes of all attacks."""
    net, x, y = trained
    verdict = ensemble.run(net, x, y, Linf(0.26), version="apgd", seed=SEED, batch_size=20)
    fell = int((~verdict.robust).sum())
    assert 0 < fell < len(x)
    assert verdict.forward_images == len(x) + fell


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_in_bf16_an_image_falls_only_where_the_float32_network_does(trained, threat, monkeypatch):
    monkeypatch.setattr(ensemble, "QUERIES", 100)
    net, x, y = trained
    x, y = x[:16], y[:16]
    exact = ensemble.run(net, x, y, threat, seed=SEED)
    verdict = ensemble.run(net, x, y, threat, seed=SEED, precision="bf16")
    broken = ~verdict.robust
    assert broken.any()
    assert (net(verdict.adversaries).argmax(1)[broken] != y[broken]).all()
    inside = lengths(verdict.adversaries - x, threat.norm) <= threat.eps * (1 + 1e-5)
    assert inside.all()
    assert (verdict.robust == exact.robust).double().mean() >= 0.9


class WrongInBf16(nn.Module):
    """Under autocast the opposite of the network: every image falls at once, and none in truth."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        logits = self.net(x)
        return -logits if torch.is_autocast_enabled("cpu") else logits


def test_what_falls_in_bf16_alone_is_attacked_in_float32(trained, monkeypatch):
    monkeypatch.setattr(ensemble, "QUERIES", 100)
    net, x, y = trained
    x, y = x[:24], y[:24]
    exact = ensemble.run(WrongInBf16(net), x, y, Linf(0.26), seed=SEED)
    verdict = ensemble.run(WrongInBf16(net), x, y, Linf(0.26), seed=SEED, precision="bf16")
    assert 0 < int(exact.robust.sum()) < len(x)
    assert torch.equal(verdict.robust, exact.robust)
    words = {"steps": 10, "restarts": 2, "seed": SEED}
    by_pgd = pgd(WrongInBf16(net), x, y, Linf(0.26), **words)
    assert 0 < int(by_pgd.sum()) < len(x)
    assert torch.equal(pgd(WrongInBf16(net), x, y, Linf(0.26), precision="bf16", **words), by_pgd)


def test_everything_fallen_or_wrong_is_no_error(trained):
    net, x, y = trained
    verdict = ensemble.run(net, x[:6], (y[:6] + 1) % 6, Linf(0.1))
    assert not verdict.robust.any()
    assert verdict.after == dict.fromkeys(("apgd-ce", "apgd-t", "fab-t", "square"), 0.0)
