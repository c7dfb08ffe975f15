"""The optimiser steps, on every backend."""

import math

import pytest
import torch

from engine import kernels
from engine.kernels import reference

from .support import DECAY, adamw_state, assert_accurate, normal, optimiser_state


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("with_average", [True, False])
@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_ema_step(backend, device, nesterov, with_average, grad_dtype, layout):
    state = optimiser_state(device, grad_dtype, layout)
    if not with_average:
        state = (*state[:3], [])
    options = (0.9, DECAY, nesterov, torch.tensor(0.99))
    copies = []
    for dtype in (torch.float32, torch.float64):
        copy = [[t.detach().cpu().clone().to(dtype) for t in group] for group in state]
        lr, overflow = torch.tensor(0.1, dtype=dtype), torch.tensor(0.0, dtype=dtype)
        for _ in range(2):
            reference.sgd_ema_step(*copy, lr, overflow, *options)
        copies.append(copy)
    lr, overflow = torch.tensor(0.1, device=device), torch.zeros(1, device=device)
    for _ in range(2):
        kernels.sgd_ema_step(
            *state,
            lr=lr,
            found_inf=overflow,
            momentum=0.9,
            weight_decay=DECAY,
            nesterov=nesterov,
            ema_decay=0.99,
        )
    plain, exact = copies
    for group, name in ((0, "params"), (2, "momenta"), (3, "averages")):
        for actual, low, high in zip(state[group], plain[group], exact[group], strict=True):
            assert_accurate(name, actual, low, high)


def test_sgd_ema_step_is_skipped_on_overflow(backend, device):
    params, grads, momenta, averages = optimiser_state(device)
    grads[0][0, 0, 0, 0] = math.inf
    grads[5][3, 3] = math.nan
    before = [[t.clone() for t in group] for group in (params, momenta, averages)]
    kernels.sgd_ema_step(
        params,
        grads,
        momenta,
        averages,
        lr=0.1,
        found_inf=torch.ones((), device=device),
        weight_decay=DECAY,
        ema_decay=0.99,
    )
    for old, new in zip(before, (params, momenta, averages), strict=True):
        for a, b in zip(old, new, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("with_average", [True, False])
def test_adamw_ema_step(backend, device, with_average, grad_dtype, layout):
    state = adamw_state(device, grad_dtype, layout)
    if not with_average:
        state = (*state[:4], [])
    copies = []
    for dtype in (torch.float32, torch.float64):
        copy = [[t.detach().cpu().clone().to(dtype) for t in group] for group in state]
        lr, overflow = torch.tensor(0.01, dtype=dtype), torch.tensor(0.0, dtype=dtype)
        for n in (1.0, 2.0):
            rest = (0.9, 0.999, 1e-8, DECAY, torch.tensor(0.99))
            reference.adamw_ema_step(*copy, lr, torch.tensor(n), overflow, *rest)
        copies.append(copy)
    for n in (1.0, 2.0):
        kernels.adamw_ema_step(
            *state,
            lr=torch.tensor(0.01, device=device),
            count=torch.tensor(n, device=device),
            found_inf=torch.zeros(1, device=device),
            weight_decay=DECAY,
            ema_decay=0.99,
        )
    plain, exact = copies
    for group, name in ((0, "params"), (2, "first"), (3, "second"), (4, "averages")):
        for actual, low, high in zip(state[group], plain[group], exact[group], strict=True):
            assert_accurate(name, actual, low, high)


def test_adamw_ema_step_is_torchs_adamw(backend, device):
    ours, *_ = adamw_state(device)
    theirs = [t.clone().requires_grad_() for t in ours]
    average = [t.clone() for t in ours]
    averages, first, second = ([t.clone() * scale for t in ours] for scale in (1, 0, 0))
    opt = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1)
    for n in range(1, 21):
        grads = [normal(t.shape, device, 0.1, 1000 * n + i) for i, t in enumerate(ours)]
        for t, g in zip(theirs, grads, strict=True):
            t.grad = g.clone()
        opt.step()
        kernels.adamw_ema_step(
            ours,
            grads,
            first,
            second,
            averages,
            lr=0.01,
            count=torch.tensor(float(n), device=device),
            found_inf=torch.zeros((), device=device),
            weight_decay=[0.1] * len(ours),
            ema_decay=0.9,
        )
        for e, t in zip(average, theirs, strict=True):
            e.lerp_(t.detach(), 0.1)
    torch.testing.assert_close(ours, [t.detach() for t in theirs], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(averages, average, atol=2e-6, rtol=1e-5)


def test_adamw_ema_step_is_skipped_on_overflow(backend, device):
    params, grads, first, second, averages = adamw_state(device)
    grads[0][0, 0, 0, 0] = math.inf
    kept = (params, first, second, averages)
    before = [[t.clone() for t in group] for group in kept]
    kernels.adamw_ema_step(
        params,
        grads,
        first,
        second,
        averages,
        lr=0.1,
        # A first step that is skipped leaves the count at 0: nothing may be divided by it.
        count=torch.zeros((), device=device),
        found_inf=torch.ones((), device=device),
        weight_decay=DECAY,
        ema_decay=0.99,
    )
    for old, new in zip(before, kept, strict=True):
        for a, b in zip(old, new, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float16], ids=str)
def test_perturb_weights_and_undo(backend, device, grad_dtype, layout):
    params, grads, *_ = optimiser_state(device, grad_dtype, layout)
    before = [p.clone() for p in params]
    wanted = []
    for dtype in (torch.float32, torch.float64):
        state = [[t.detach().cpu().clone().to(dtype) for t in group] for group in (params, grads)]
        copies = [torch.empty_like(p) for p in state[0]]
        reference.perturb_weights(*state, copies, torch.tensor(0.01, dtype=dtype))
        wanted.append(state[0])
    copies = [torch.full_like(p, math.nan) for p in params]
    kernels.perturb_weights(params, grads, copies, gamma=torch.tensor(0.01, device=device))
    for p, old, copy, low, high in zip(params, before, copies, *wanted, strict=True):
        assert torch.equal(copy, old)
        assert_accurate("params", p, low, high, rounding=8.0)
        if p.numel():
            assert (p - old).norm().item() == pytest.approx(0.01 * old.norm().item(), rel=1e-3)
    kernels.restore_weights(params, copies)
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))


def test_a_weight_whose_step_is_not_finite_stays(backend, device):
    params, grads, *_ = optimiser_state(device)
    grads[0][0, 0, 0, 0] = math.inf
    grads[1][0] = math.nan
    grads[2].zero_()
    before = [p.clone() for p in params]
    copies = [torch.empty_like(p) for p in params]
    kernels.perturb_weights(params, grads, copies, gamma=0.01)
    moved = [not torch.equal(p, old) for p, old in zip(params, before, strict=True)]
    assert moved == [False, False, False, False, True, True, True]
    assert all(torch.equal(c, old) for c, old in zip(copies, before, strict=True))
