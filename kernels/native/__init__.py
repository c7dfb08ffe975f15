"""The CPU backend: one C++ kernel an op, named and typed as in `reference`.

Each function checks what the kernel relies on, allocates the output and hands over addresses: for the
lists of `sgd_ema_step` and for ops of some microseconds that costs a fraction of a DLPack exchange. What
the kernels do not cover (float64, mixed strides) goes to the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..layout import transposed_rows

# After torch: the module then shares torch's OpenMP runtime, and `torch.set_num_threads` governs both.
try:
    from . import _native
except ImportError as error:
    raise ImportError(
        f"the C++ kernels are not built ({error}); install a C++ compiler and reinstall the package"
    ) from error

ORIGIN = f"C++ with {_native.isa()}" + ("" if _native.openmp else ", one thread (no OpenMP)")

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def keep_freed_memory() -> bool:
    """Ask the C library to keep freed memory in this process; True if it does (glibc only).

    It applies to all of the process, so a program calls it and a library does not. On the CPU every
    activation is a large block that is freed and allocated again at each step; left alone, glibc
    returns it to the system and pays a page fault for every 4 KiB of the next one.
    """
    return bool(_native.keep_freed_memory())


# ---- what the kernels take -------------------------------------------------------------------


def _served(x: Tensor, *companions: Tensor) -> bool:
    """`x` is float32, on the CPU and dense, and its companions have its shape and strides."""
    if x.dtype is not torch.float32 or x.device.type != "cpu":
        return False
    if not (x.is_contiguous() or _channels_last(x)):
        return False
    stride, shape = x.stride(), x.shape
    return all(t.stride() == stride and t.shape == shape for t in companions)


def _channels_last(t: Tensor) -> bool:
    return t.dim() == 4 and t.is_contiguous(memory_format=torch.channels_last)


def _logits_served(*logits: Tensor | None) -> bool:
    return all(t is None or (t.dtype in _DTYPES and t.is_contiguous()) for t in logits)


def _address(t: Tensor | None) -> tuple[int, int]:
    """Where a tensor's elements start, and their type's number."""
    return (0, 0) if t is None else (t.data_ptr(), _DTYPES[t.dtype])


def _rows(x: Tensor) -> tuple[int, int]:
    """B and D of a batch."""
    b = x.shape[0]
    return b, x.numel() // b if b else 0


# ---- attack ----------------------------------------------------------------------------------


def uniform_start(x: Tensor, eps: Tensor, rng: Tensor, norm: str, stream: int) -> Tensor:
    if not _served(x):
        return reference.uniform_start(x, eps, rng, norm, stream)
    out = torch.empty_like(x)
    seed, step = rng.tolist()
    _native.uniform_start(
        x.data_ptr(), out.data_ptr(), *_rows(x), seed, step, stream, eps.item(), norm == "L2"
    )
    return out


def attack_step(
    x: Tensor, z: Tensor, grad: Tensor, eps: Tensor, alpha: Tensor, norm: str
) -> Tensor:
    if not _served(x, z, grad) or z.dtype is not x.dtype or grad.dtype not in _DTYPES:
        return reference.attack_step(x, z, grad, eps, alpha, norm)
    out = torch.empty_like(x)
    _native.attack_step(
        x.data_ptr(),
        z.data_ptr(),
        *_address(grad),
        out.data_ptr(),
        *_rows(x),
        eps.item(),
        alpha.item(),
        norm == "L2",
        0,
        0,
        1,
    )
    return out


def attack_step_(
    x: Tensor,
    z: Tensor,
    grad: Tensor,
    eps: Tensor,
    alpha: Tensor,
    norm: str,
    network_input: Tensor | None,
) -> None:
    if (
        not _served(x, z, grad)
        or z.dtype is not x.dtype
        or grad.dtype not in _DTYPES
        or (network_input is not None and network_input.dtype not in _DTYPES)
    ):
        return reference.attack_step_(x, z, grad, eps, alpha, norm, network_input)
    _native.attack_step(
        x.data_ptr(),
        z.data_ptr(),
        *_address(grad),
        z.data_ptr(),
        *_rows(x),
        eps.item(),
        alpha.item(),
        norm == "L2",
        *_address(network_input),
        1 if network_input is None else transposed_rows(z, network_input),
    )
    return None


def cross_entropy_grad(logits: Tensor, target: Tensor, scale: float) -> Tensor:
    if not _logits_served(logits):
        return reference.cross_entropy_grad(logits, target, scale)
    out = torch.empty_like(logits)
    _native.cross_entropy_grad(
        *_address(logits), target.data_ptr(), out.data_ptr(), *logits.shape, scale
    )
    return out


def kl_grad(p_logits: Tensor, q_logits: Tensor, scale: float) -> Tensor:
    if not _logits_served(p_logits, q_logits):
        return reference.kl_grad(p_logits, q_logits, scale)
    out = torch.empty_like(q_logits)
    _native.kl_grad(
        *_address(p_logits), *_address(q_logits), out.data_ptr(), *q_logits.shape, scale
    )
    return out


def input_grad_step(
    x: Tensor,
    z: Tensor,
    stem_grad: Tensor,
    weight: Tensor,
    stride: int,
    padding: int,
    eps: Tensor,
    alpha: Tensor,
    norm: str,
) -> Tensor:
    if (
        not _served(x, z)
        or z.dtype is not x.dtype
        or stem_grad.dtype not in _DTYPES
        or weight.dtype not in _DTYPES
    ):
        return reference.input_grad_step(x, z, stem_grad, weight, stride, padding, eps, alpha, norm)
    if not (stem_grad.is_contiguous() or _channels_last(stem_grad)):
        stem_grad = stem_grad.contiguous()
    weight = weight.float().contiguous()
    out = torch.empty_like(x)
    _native.input_grad_step(
        x.data_ptr(),
        z.data_ptr(),
        *_address(stem_grad),
        not stem_grad.is_contiguous(),
        weight.data_ptr(),
        [*x.shape[1:], *stem_grad.shape[1:], *weight.shape[2:], stride, padding],
        out.data_ptr(),
        x.shape[0],
        not x.is_contiguous(),
        eps.item(),
        alpha.item(),
        norm == "L2",
    )
    return out


def stem_input_grad(
    stem_grad: Tensor, weight: Tensor, h: int, w: int, stride: int, padding: int
) -> Tensor:
    if (
        stem_grad.dtype not in _DTYPES
        or weight.dtype is not torch.float32
        or stem_grad.shape[0] == 0
    ):
        return reference.stem_input_grad(stem_grad, weight, h, w, stride, padding)
    if not (stem_grad.is_contiguous() or _channels_last(stem_grad)):
        stem_grad = stem_grad.contiguous()
    weight = weight.contiguous()
    out = weight.new_empty(stem_grad.shape[0], weight.shape[1], h, w)
    _native.stem_input_grad(
        *_address(stem_grad),
        not stem_grad.is_contiguous(),
        weight.data_ptr(),
        [*out.shape[1:], *stem_grad.shape[1:], *weight.shape[2:], stride, padding],
        out.shape[0],
        out.data_ptr(),
    )
    return out


def stem_weight_grad(
    x: Tensor, stem_grad: Tensor, kh: int, kw: int, stride: int, padding: int
) -> tuple[Tensor, Tensor]:
    if x.dtype is not torch.float32 or stem_grad.dtype is not torch.float32 or x.shape[0] == 0:
        return reference.stem_weight_grad(x, stem_grad, kh, kw, stride, padding)
    if not (stem_grad.is_contiguous() or _channels_last(stem_grad)):
        stem_grad = stem_grad.contiguous()
    x = x.contiguous()
    weight_grad = x.new_empty(stem_grad.shape[1], x.shape[1], kh, kw)
    bias_grad = x.new_empty(stem_grad.shape[1])
    _native.stem_weight_grad(
        x.data_ptr(),
        stem_grad.data_ptr(),
        not stem_grad.is_contiguous(),
        [*x.shape[1:], *stem_grad.shape[1:], kh, kw, stride, padding],
        x.shape[0],
        weight_grad.data_ptr(),
        bias_grad.data_ptr(),
    )
    return weight_grad, bias_grad


# ---- loss ------------------------------------------------------------------------------------


def local_ball_loss(
    adv: Tensor,
    target: Tensor,
    ball: Tensor | None,
    clean: Tensor | None,
    lam: Tensor,
    mu: Tensor,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    if not _logits_served(adv, ball, clean):
        return reference.local_ball_loss(adv, target, ball, clean, lam, mu, label_smoothing)
    loss = adv.new_empty((), dtype=torch.float32)
    stats = adv.new_empty(6, dtype=torch.float32)
    _native.local_ball_loss(
        *_address(adv),
        target.data_ptr(),
        *_address(ball),
        *_address(clean),
        lam.item(),
        mu.item(),
        label_smoothing,
        *adv.shape,
        loss.data_ptr(),
        stats.data_ptr(),
    )
    return loss, stats


def local_ball_loss_backward(
    grad_loss: Tensor,
    adv: Tensor,
    target: Tensor,
    ball: Tensor | None,
    clean: Tensor | None,
    lam: Tensor,
    mu: Tensor,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if not _logits_served(adv, ball, clean):
        return reference.local_ball_loss_backward(
            grad_loss, adv, target, ball, clean, lam, mu, label_smoothing
        )
    grad_adv = torch.empty_like(adv)
    grad_ball = adv.new_empty(0) if ball is None else torch.empty_like(ball)
    grad_clean = adv.new_empty(0) if clean is None else torch.empty_like(clean)
    _native.local_ball_loss_backward(
        grad_loss.item(),
        *_address(adv),
        target.data_ptr(),
        *_address(ball),
        *_address(clean),
        lam.item(),
        mu.item(),
        label_smoothing,
        *adv.shape,
        grad_adv.data_ptr(),
        grad_ball.data_ptr(),
        grad_clean.data_ptr(),
    )
    return grad_adv, grad_ball, grad_clean


# ---- data ------------------------------------------------------------------------------------


def augment(
    images: Tensor,
    index: Tensor,
    rng: Tensor,
    pad: int,
    flip: bool,
    cutout: int,
    stream: int,
    memory: Tensor | None,
    eps: Tensor | None,
    norm: str,
) -> tuple[Tensor, Tensor, Tensor]:
    b = index.shape[0]
    x = images.new_empty((b, *images.shape[1:]), dtype=torch.float32)
    where = images.new_empty((b, 3), dtype=torch.int32)
    start = x.new_empty(0) if memory is None else torch.empty_like(x)
    seed, step = rng.tolist()
    _native.augment(
        images.data_ptr(),
        index.data_ptr(),
        *images.shape,
        x.data_ptr(),
        where.data_ptr(),
        b,
        seed,
        step,
        stream,
        pad,
        flip,
        cutout,
        0 if memory is None else memory.data_ptr(),
        start.data_ptr(),
        0.0 if eps is None else eps.item(),
        norm == "L2",
    )
    return x, where, start


def recall(
    memory: Tensor, index: Tensor, where: Tensor, x: Tensor, eps: Tensor, norm: str
) -> Tensor:
    if not _served(x):
        return reference.recall(memory, index, where, x, eps, norm)
    out = torch.empty_like(x)
    _native.recall(
        memory.data_ptr(),
        index.data_ptr(),
        where.data_ptr(),
        *memory.shape,
        x.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        not x.is_contiguous(),
        eps.item(),
        norm == "L2",
    )
    return out


def remember(
    memory: Tensor, index: Tensor, where: Tensor, x: Tensor, z: Tensor, eps: Tensor
) -> None:
    if not _served(x, z) or z.dtype is not x.dtype:
        return reference.remember(memory, index, where, x, z, eps)
    _native.remember(
        memory.data_ptr(),
        index.data_ptr(),
        where.data_ptr(),
        *memory.shape,
        x.data_ptr(),
        z.data_ptr(),
        x.shape[0],
        not x.is_contiguous(),
        eps.item(),
    )
    return None


# ---- optimiser -------------------------------------------------------------------------------


def sgd_ema_step(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    averages: list[Tensor],
    lr: Tensor,
    found_inf: Tensor,
    momentum: float,
    weight_decay: list[float],
    nesterov: bool,
    ema_decay: Tensor,
) -> None:
    rows, kept = _parameters(params, grads, (momenta,), averages, weight_decay)
    if rows is None:
        return reference.sgd_ema_step(
            params,
            grads,
            momenta,
            averages,
            lr,
            found_inf,
            momentum,
            weight_decay,
            nesterov,
            ema_decay,
        )
    if found_inf.item() == 0:
        _native.sgd_ema_step(rows, lr.item(), momentum, 1.0 - ema_decay.item(), nesterov)
    del kept
    return None


def adamw_ema_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    averages: list[Tensor],
    lr: Tensor,
    count: Tensor,
    found_inf: Tensor,
    beta1: float,
    beta2: float,
    adam_eps: float,
    weight_decay: list[float],
    ema_decay: Tensor,
) -> None:
    rows, kept = _parameters(params, grads, (exp_avgs, exp_avg_sqs), averages, weight_decay)
    if rows is None:
        return reference.adamw_ema_step(
            params,
            grads,
            exp_avgs,
            exp_avg_sqs,
            averages,
            lr,
            count,
            found_inf,
            beta1,
            beta2,
            adam_eps,
            weight_decay,
            ema_decay,
        )
    if found_inf.item() == 0:
        rate, n = lr.item(), count.item()
        _native.adamw_ema_step(
            rows,
            rate,
            1.0 - beta1,
            beta2,
            1.0 - beta2,
            rate / (1.0 - beta1**n),
            (1.0 - beta2**n) ** 0.5,
            adam_eps,
            1.0 - ema_decay.item(),
        )
    del kept
    return None


def _parameters(
    params: list[Tensor],
    grads: list[Tensor],
    moments: tuple[list[Tensor], ...],
    averages: list[Tensor],
    weight_decay: list[float],
) -> tuple[list[tuple] | None, list[Tensor]]:
    """What the C++ side takes of each parameter, or None where a type or a layout is not served.

    Also returns gradients brought into another layout, which must live until the kernel has run.
    """
    float32 = torch.float32
    rows, kept = [], []
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        stride = p.stride()
        state = [m[i] for m in moments]
        e = averages[i] if averages else None
        if (
            not (p.is_contiguous() or _channels_last(p))
            or p.dtype is not float32
            or g.dtype not in _DTYPES
            or any(m.dtype is not float32 or m.stride() != stride for m in state)
            or (e is not None and (e.dtype is not float32 or e.stride() != stride))
        ):
            return None, kept
        if g.stride() != stride:
            g = torch.empty_like(p, dtype=g.dtype).copy_(g)
            kept.append(g)
        first, second = state[0].data_ptr(), state[1].data_ptr() if len(state) > 1 else 0
        average = 0 if e is None else e.data_ptr()
        rows.append(
            (p.data_ptr(), *_address(g), first, second, average, p.numel(), weight_decay[i])
        )
    return rows, kept
