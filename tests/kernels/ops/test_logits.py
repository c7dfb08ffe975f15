"""The losses of logits and their gradients, on every backend."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from engine import kernels
from engine.kernels import backends, reference

from .support import (
    HALF,
    ROWS,
    check,
    check_loss,
    generator,
    lay_out,
    logit_inputs,
    loss_and_gradients,
    property_test,
    skip_bfloat16,
    targets,
)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_logit_gradients(backend, device, interpreted, shape, dtype):
    skip_bfloat16(interpreted, dtype)
    p, q, _ = logit_inputs(shape, device, dtype)
    check("cross_entropy_grad", q, targets(*shape, device), scale=3.0)
    check("kl_grad", p, q, scale=0.5)


def mixed(rows, classes, device):
    """Labels of which some are one label twice, and shares with 0 and 1 among them."""
    first, second = targets(rows, classes, device), targets(rows, classes, device, seed=9)
    second[::3] = first[::3]
    share = torch.rand(rows, generator=generator(10))
    share[:2] = torch.tensor([0.0, 1.0])[:rows]
    return kernels.MixedLabels(first, second, share.to(device))


def dense(labels, classes):
    first, second, share = (t.cpu() for t in labels)
    parts = torch.zeros(len(first), classes, dtype=torch.float64)
    parts.scatter_add_(1, first[:, None], share.double()[:, None])
    return parts.scatter_add_(1, second[:, None], 1 - share.double()[:, None])


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("shape", [*ROWS, (2500, 10)], ids=str)
def test_mixed_labels_are_probabilities(backend, device, interpreted, shape, dtype):
    """The ops against F.cross_entropy with probabilities as targets, in float64."""
    skip_bfloat16(interpreted, dtype)
    labels, smoothing, lam = mixed(*shape, device), 0.1, 0.5
    wanted = dense(labels, shape[1])
    leaves = [t.requires_grad_() for t in logit_inputs(shape, device, dtype)[:2]]
    loss, stats = kernels.local_ball_loss(
        leaves[0], labels, leaves[1], lam=lam, label_smoothing=smoothing
    )
    loss.backward()
    exact = [t.detach().cpu().double().requires_grad_() for t in leaves]
    ce = F.cross_entropy(exact[0], wanted, label_smoothing=smoothing, reduction="sum")
    ce = ce / max(shape[0], 1)
    kl = F.kl_div(
        exact[1].log_softmax(1), exact[0].log_softmax(1), reduction="sum", log_target=True
    ) / max(shape[0], 1)
    (ce + lam * kl).backward()
    near = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-3}
    torch.testing.assert_close(
        stats.cross_entropy.cpu().double(), ce.detach(), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(
        loss.detach().cpu().double(), (ce + lam * kl).detach(), rtol=1e-4, atol=1e-5
    )
    for leaf, other in zip(leaves, exact, strict=True):
        torch.testing.assert_close(leaf.grad.cpu().double(), other.grad, **near)
    # The count takes the first label.
    first = kernels.local_ball_loss(leaves[0].detach(), labels.first)[1]
    assert torch.equal(stats.correct_adv, first.correct_adv)
    grad = kernels.cross_entropy_grad(leaves[0].detach(), labels, scale=3.0)
    expected = 3 * (exact[0].detach().softmax(1) - wanted)
    torch.testing.assert_close(grad.cpu().double(), expected, **near)


def test_a_share_of_one_is_the_label_alone(backend, device):
    adv, ball, clean = logit_inputs((7, 10), device)
    target = targets(7, 10, device)
    labels = kernels.MixedLabels(target, (target + 1) % 10, torch.ones(7, device=device))
    assert torch.equal(
        kernels.local_ball_loss(adv, labels, ball, clean)[0],
        kernels.local_ball_loss(adv, target, ball, clean)[0],
    )
    assert torch.equal(
        kernels.cross_entropy_grad(adv, labels), kernels.cross_entropy_grad(adv, target)
    )


def test_logit_gradients_of_strided_logits(backend, device):
    p, q, _ = (lay_out(t.t(), "strided").t() for t in logit_inputs((6, 10), device))
    check("cross_entropy_grad", q, targets(6, 10, device))
    check("kl_grad", p, q)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logit_gradients_keep_a_bad_row_to_itself(backend, device, bad):
    p, q, _ = logit_inputs((6, 10), device)
    q[2, 4] = bad
    target = targets(6, 10, device)
    for out in (kernels.cross_entropy_grad(q, target), kernels.kl_grad(p, q)):
        assert out[2].isnan().all()
        assert torch.isfinite(out[[0, 1, 3, 4, 5]]).all()


def test_logit_gradients_of_an_excluded_class(backend, device):
    _, q, _ = logit_inputs((4, 10), device)
    q[:, 3] = -math.inf
    check("cross_entropy_grad", q, torch.zeros(4, dtype=torch.int64, device=device))


def test_logit_gradients_are_those_of_the_losses():
    """The reference's formulas against autograd through the losses, in float64."""
    p, q, _ = (t.double() for t in logit_inputs((5, 7), "cpu"))
    target, q = targets(5, 7, "cpu"), q.requires_grad_()
    (ce,) = torch.autograd.grad(torch.nn.functional.cross_entropy(q, target, reduction="sum"), q)
    torch.testing.assert_close(reference.cross_entropy_grad(q.detach(), target, 1.0), ce)
    kl_loss = torch.nn.functional.kl_div(
        q.log_softmax(1), p.log_softmax(1), reduction="sum", log_target=True
    )
    (kl,) = torch.autograd.grad(kl_loss, q)
    torch.testing.assert_close(reference.kl_grad(p, q.detach(), 1.0), kl)


TERMS = {"all": (True, True), "local": (True, False), "global": (False, True), "ce": (False, False)}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_loss_and_gradients(backend, device, shape, terms, smoothing):
    adv, ball, clean = logit_inputs(shape, device)
    with_ball, with_clean = TERMS[terms]
    check_loss(
        adv,
        targets(*shape, device),
        ball if with_ball else None,
        clean if with_clean else None,
        smoothing=smoothing,
    )


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", ROWS, ids=str)
def test_loss_and_gradients_in_half_precision(backend, device, interpreted, shape, dtype):
    skip_bfloat16(interpreted, dtype)
    adv, ball, clean = logit_inputs(shape, device, dtype)
    check_loss(adv, targets(*shape, device), ball, clean, smoothing=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_loss_is_finite_for_extreme_logits(backend, device, dtype, classes):
    signs = (torch.randint(0, 2, (3, 9, classes), generator=generator()) * 2 - 1).to(device)
    adv, ball, clean = (1e4 * signs).to(dtype)
    got = check_loss(adv, targets(9, classes, device), ball, clean)
    for t in got:
        assert torch.isfinite(t).all()


def test_loss_of_strided_logits(backend, device):
    adv, ball, clean = (lay_out(t, "strided") for t in logit_inputs((6, 10), device))
    check_loss(adv, targets(6, 10, device), ball, clean)


def test_loss_with_identical_logits_has_no_divergence(backend, device):
    adv, _, _ = logit_inputs((6, 10), device)
    loss, stats = kernels.local_ball_loss(adv, targets(6, 10, device), adv.clone(), adv.clone())
    assert stats.local_kl == 0
    assert stats.global_kl == 0
    assert loss == stats.cross_entropy


def test_loss_counts_take_the_first_of_equal_classes(backend, device):
    flat = torch.ones(4, 10, device=device)
    target = torch.tensor([0, 0, 1, 9], device=device)
    _, stats = kernels.local_ball_loss(flat, target, flat, flat)
    assert torch.stack(stats[3:]).tolist() == [2, 2, 2]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_loss_of_a_nan_is_nan(backend, device, which):
    logits = logit_inputs((6, 10), device)
    logits[which][3, 3] = math.nan
    adv, ball, clean = logits
    loss, *_, grad_adv, grad_ball, grad_clean = loss_and_gradients(
        adv, targets(6, 10, device), ball, clean, 1.0, 1.0, 0.0, 1.0
    )
    assert loss.isnan()
    assert grad_adv[3].isnan().any()
    others = [0, 1, 2, 4, 5]
    for grad in (grad_adv, grad_ball, grad_clean):
        assert torch.isfinite(grad[others]).all()


def test_loss_of_any_shape_and_weight(backend, device, interpreted):
    @property_test(
        interpreted,
        rows=st.integers(0, 40),
        classes=st.integers(1, 130),
        terms=st.sampled_from(sorted(TERMS)),
        scale=st.sampled_from([0.0, 0.1, 10.0, 300.0]),
        lam=st.floats(0, 10, width=32),
        mu=st.floats(0, 10, width=32),
        smoothing=st.floats(0, 0.9),
    )
    def check_one(rows, classes, terms, scale, lam, mu, smoothing):
        adv, ball, clean = logit_inputs((rows, classes), device, scale=scale)
        with_ball, with_clean = TERMS[terms]
        target = targets(rows, classes, device)
        ball, clean = ball if with_ball else None, clean if with_clean else None
        check_loss(adv, target, ball, clean, lam, mu, smoothing, rounding=64)


@pytest.mark.parametrize("terms", TERMS)
def test_gradcheck_of_the_reference(terms):
    with_ball, with_clean = TERMS[terms]
    adv, ball, clean = (t.double().requires_grad_() for t in logit_inputs((4, 5), "cpu", scale=1.0))
    target = targets(4, 5, "cpu")

    def loss(*logits):
        given_logits = iter(logits)
        return kernels.local_ball_loss(
            next(given_logits),
            target,
            next(given_logits) if with_ball else None,
            next(given_logits) if with_clean else None,
            lam=2.0,
            mu=0.5,
            label_smoothing=0.1,
        )[0]

    wanted = [adv] + [ball] * with_ball + [clean] * with_clean
    with backends.use("reference"):
        assert torch.autograd.gradcheck(loss, wanted)
