"""The losses of logits and their gradients, on every backend."""

import math

import pytest
import torch
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
