"""What every op means, in plain PyTorch.

This file is the definition: the C++ and Triton backends are tested against it, and it serves any
device they do not. Every function runs in float64 as well, and takes tensors that `ops` has already
checked. Two conventions hold throughout.

*Memory order.* `x` and its companions are dense and share one layout (contiguous or channels_last),
and "element i" means the i-th element in memory. One sample is one contiguous run of D elements
either way, so a backend works on a flat [B, D] view and never asks for the layout.

*Randomness.* Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
The key is the 64-bit seed; the 128-bit counter is (block, stream, step low, step high). Seed and
step live in the int64 device tensor `rng` = (seed, step), so a captured graph draws fresh numbers on
every replay once `rng[1]` has been advanced. `stream` separates the draws made within one step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
# Draws of one number per sample (the L2 radius) must not meet those of one number per element.
RADIUS_STREAM = 1 << 31


# ---- random numbers --------------------------------------------------------------------------


def philox(rng: Tensor, stream: int, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words (held in int64) for each counter block.

    Args:
        rng: int64 [2], (seed, step).
        stream: second counter word, in [0, 2^32).
        blocks: int64 [n], first counter word, in [0, 2^32).
    """
    seed, step = rng[0], rng[1]
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    c0 = blocks & _MASK
    c1 = torch.full_like(c0, stream & _MASK)
    c2 = (step & _MASK).expand_as(c0)
    c3 = ((step >> 32) & _MASK).expand_as(c0)
    for _ in range(10):
        # int64 products wrap modulo 2^64, so both halves of the unsigned product survive the masks.
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def random_words(rng: Tensor, stream: int, n: int) -> Tensor:
    """int64 [n] words in [0, 2^32); word i is output i % 4 of block i // 4."""
    blocks = torch.arange((n + 3) // 4, device=rng.device)
    return torch.stack(philox(rng, stream, blocks), dim=1).reshape(-1)[:n]


def to_uniform(words: Tensor, dtype: torch.dtype) -> Tensor:
    """The top 24 bits as a number in [0, 1), exact in float32."""
    return (words >> 8).to(dtype) * 2.0**-24


def _to_normal(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Box-Muller on neighbouring words: words (2j, 2j+1) give normals (2j, 2j+1)."""
    pairs = torch.cat([words, words.new_zeros(words.numel() % 2)]).view(-1, 2)
    # 1 - u lies in (0, 1]: the logarithm is finite.
    radius = torch.sqrt(-2.0 * torch.log(1.0 - to_uniform(pairs[:, 0], dtype)))
    angle = (2.0 * math.pi) * to_uniform(pairs[:, 1], dtype)
    return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], 1).view(-1)[
        : words.numel()
    ]


# ---- layout ----------------------------------------------------------------------------------


def _rows(t: Tensor) -> Tensor:
    """[B, D] view of a dense tensor in memory order."""
    if t.dim() == 4 and not t.is_contiguous():
        t = t.permute(0, 2, 3, 1)
    return t.reshape(t.shape[0], -1) if t.shape[0] else t.reshape(0, math.prod(t.shape[1:]))


def _like(rows: Tensor, t: Tensor) -> Tensor:
    """Inverse of `_rows`: give the [B, D] result the shape and layout of `t`."""
    if t.dim() == 4 and not t.is_contiguous():
        b, c, h, w = t.shape
        return rows.view(b, h, w, c).permute(0, 3, 1, 2)
    return rows.view(t.shape)


# ---- attack ----------------------------------------------------------------------------------


def uniform_start(x: Tensor, eps: Tensor, rng: Tensor, norm: str, stream: int) -> Tensor:
    xr, eps = _rows(x), eps.to(x.dtype)
    b, d = xr.shape
    words = random_words(rng, stream, b * d)
    if norm == "Linf":
        delta = (2.0 * to_uniform(words, x.dtype).view(b, d) - 1.0) * eps
    else:
        normal = _to_normal(words, x.dtype).view(b, d)
        direction = normal / normal.norm(dim=1, keepdim=True).clamp_min(1e-12)
        radius = to_uniform(random_words(rng, stream + RADIUS_STREAM, b), x.dtype)
        # u^(1/D) makes the point uniform in the ball's volume, not in its radius.
        delta = direction * (radius ** (1.0 / max(d, 1)) * eps).view(b, 1)
    # Clipping moves every pixel towards x, so the point stays in the ball.
    return _like((xr + delta).clamp(0.0, 1.0), x)


def attack_step(
    x: Tensor, z: Tensor, grad: Tensor, eps: Tensor, alpha: Tensor, norm: str
) -> Tensor:
    xr, zr, gr = _rows(x), _rows(z), _rows(grad).to(x.dtype)
    eps, alpha = eps.to(x.dtype), alpha.to(x.dtype)
    if norm == "Linf":
        # sign(NaN) counts as 0: one bad gradient value must not spread into the image.
        moved = zr + alpha * torch.sign(gr).nan_to_num(0.0)
        moved = torch.minimum(torch.maximum(moved, xr - eps), xr + eps)
    else:
        length = gr.norm(dim=1, keepdim=True)
        # A sample without a usable direction (zero, overflowed or NaN gradient) stays where it is.
        usable = (length > 0) & torch.isfinite(length)
        unit = torch.where(usable, gr, 0.0) / torch.where(usable, length, 1.0)
        delta = zr + alpha * unit - xr
        size = delta.norm(dim=1, keepdim=True)
        moved = xr + delta * torch.where(size > eps, eps / size.clamp_min(1e-30), 1.0)
    return _like(moved.clamp(0.0, 1.0), x)


def attack_step_(
    x: Tensor,
    z: Tensor,
    grad: Tensor,
    eps: Tensor,
    alpha: Tensor,
    norm: str,
    network_input: Tensor | None,
) -> None:
    z.copy_(attack_step(x, z, grad, eps, alpha, norm))
    if network_input is not None:
        network_input.copy_(z)


def cross_entropy_grad(logits: Tensor, target: Tensor, scale: float) -> Tensor:
    grad = torch.softmax(_wide(logits), dim=1)
    grad.scatter_add_(1, target.view(-1, 1), -torch.ones_like(grad[:, :1]))
    return (grad * scale).to(logits.dtype)


def kl_grad(p_logits: Tensor, q_logits: Tensor, scale: float) -> Tensor:
    q, p = torch.softmax(_wide(q_logits), dim=1), torch.softmax(_wide(p_logits), dim=1)
    return ((q - p) * scale).to(q_logits.dtype)


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
    grad = stem_input_grad(stem_grad, weight, *x.shape[2:], stride, padding)
    if not x.is_contiguous():
        grad = grad.contiguous(memory_format=torch.channels_last)
    return attack_step(x, z, grad, eps, alpha, norm)


def stem_input_grad(
    stem_grad: Tensor, weight: Tensor, h: int, w: int, stride: int, padding: int
) -> Tensor:
    out_channels, _, kh, kw = weight.shape
    flat_grad = stem_grad.to(weight.dtype).flatten(2)
    # Transposed convolution as matrix product and col2im: several times faster on CPUs than the
    # library's convolution backward when the image has 1 or 3 channels.
    columns = weight.reshape(out_channels, -1).t() @ flat_grad
    return torch.nn.functional.fold(columns, (h, w), (kh, kw), padding=padding, stride=stride)


def stem_weight_grad(
    x: Tensor, stem_grad: Tensor, kh: int, kw: int, stride: int, padding: int
) -> tuple[Tensor, Tensor]:
    out_channels = stem_grad.shape[1]
    weight = x.new_empty(out_channels, x.shape[1], kh, kw, dtype=stem_grad.dtype)
    _, weight_grad, bias_grad = torch.ops.aten.convolution_backward(
        stem_grad,
        x.to(stem_grad.dtype),
        weight,
        [out_channels],
        [stride, stride],
        [padding, padding],
        [1, 1],
        False,
        [0, 0],
        1,
        [False, True, True],
    )
    return weight_grad.contiguous(), bias_grad


# ---- loss ------------------------------------------------------------------------------------


def _wide(t: Tensor) -> Tensor:
    """At least float32: losses are never formed in 16 bits."""
    return t if t.dtype == torch.float64 else t.float()


def local_ball_loss(
    adv: Tensor,
    target: Tensor,
    ball: Tensor | None,
    clean: Tensor | None,
    lam: Tensor,
    mu: Tensor,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    n = max(adv.shape[0], 1)
    log_a = torch.log_softmax(_wide(adv), dim=1)
    dtype = log_a.dtype
    zero = torch.zeros((), dtype=dtype, device=adv.device)

    def correct(logits: Tensor | None) -> Tensor:
        if logits is None:
            return zero
        return (logits.argmax(dim=1) == target).sum().to(dtype)

    nll = -log_a.gather(1, target.view(-1, 1)).sum()
    ce = ((1.0 - label_smoothing) * nll - label_smoothing * log_a.mean(dim=1).sum()) / n
    local = zero if ball is None else _kl(log_a, torch.log_softmax(_wide(ball), dim=1)) / n
    tie = zero if clean is None else _kl(torch.log_softmax(_wide(clean), dim=1), log_a) / n
    loss = ce + lam.to(dtype) * local + mu.to(dtype) * tie
    stats = torch.stack([ce, local, tie, correct(adv), correct(ball), correct(clean)]).detach()
    return loss, stats


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Sum over the batch of KL(p || q)."""
    return (log_p.exp() * (log_p - log_q)).sum()


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
    classes = adv.shape[1]
    log_a = torch.log_softmax(_wide(adv), dim=1)
    a, dtype = log_a.exp(), log_a.dtype
    scale = grad_loss.to(dtype) / max(adv.shape[0], 1)
    wanted = torch.full_like(a, label_smoothing / classes)
    wanted.scatter_add_(1, target.view(-1, 1), torch.full_like(a[:, :1], 1.0 - label_smoothing))
    grad_adv = a - wanted
    grad_ball, grad_clean = adv.new_empty(0), adv.new_empty(0)
    if ball is not None:
        log_b = torch.log_softmax(_wide(ball), dim=1)
        gap = log_a - log_b
        grad_adv = grad_adv + lam.to(dtype) * a * (gap - (a * gap).sum(dim=1, keepdim=True))
        grad_ball = (scale * lam.to(dtype) * (log_b.exp() - a)).to(ball.dtype)
    if clean is not None:
        log_c = torch.log_softmax(_wide(clean), dim=1)
        c, gap = log_c.exp(), log_c - log_a
        grad_adv = grad_adv + mu.to(dtype) * (a - c)
        gap = gap - (c * gap).sum(dim=1, keepdim=True)
        grad_clean = (scale * mu.to(dtype) * c * gap).to(clean.dtype)
    return (scale * grad_adv).to(adv.dtype), grad_ball, grad_clean


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
    _check_range(index, images)
    h, w = images.shape[2:]
    drawn = draw_crops(rng, index.shape[0], pad, flip, stream, h, w)
    where = drawn[:, :3].contiguous()
    x = crop(images, index, where).to(torch.float32) / 255.0
    if cutout:
        rows = torch.arange(h, device=x.device) - (drawn[:, 3, None] - cutout // 2)
        columns = torch.arange(w, device=x.device) - (drawn[:, 4, None] - cutout // 2)
        inside_y, inside_x = (rows >= 0) & (rows < cutout), (columns >= 0) & (columns < cutout)
        x = x.masked_fill((inside_y[:, :, None] & inside_x[:, None, :])[:, None], 0.0)
    if memory is None or eps is None:
        return x, where, x.new_empty(0)
    return x, where, recall(memory, index, where, x, eps, norm)


def draw_crops(rng: Tensor, b: int, pad: int, flip: bool, stream: int, h: int, w: int) -> Tensor:
    """int32 [B, 5]: (dy, dx, mirrored) of every crop, and the centre (y, x) of its cutout."""
    words = random_words(rng, stream, 4 * b).view(b, 4)
    side = 2 * pad + 1
    # word * side / 2^32 by a multiply and a shift: the same integer in every backend.
    dy = ((words[:, 0] * side) >> 32) - pad
    dx = ((words[:, 1] * side) >> 32) - pad
    mirrored = (words[:, 2] >> 31) if flip else torch.zeros_like(dy)
    y, x = ((words[:, 3] & 0xFFFF) * h) >> 16, ((words[:, 3] >> 16) * w) >> 16
    return torch.stack([dy, dx, mirrored, y, x], dim=1).to(torch.int32)


def _check_range(index: Tensor, of: Tensor) -> None:
    """On the CPU: reading a device's index would wait for it."""
    if (
        index.device.type == "cpu"
        and index.numel()
        and not 0 <= index.min() <= index.max() < len(of)
    ):
        raise IndexError(f"index must lie in [0, {len(of)})")


def crop(images: Tensor, index: Tensor, where: Tensor) -> Tensor:
    """images[index] shifted by (dy, dx) with zeros outside, then mirrored: out[y, x] = in[y+dy, x+dx]."""
    _, channels, h, w = images.shape
    source, inside = _source_pixels(where, h, w)
    picked = images[index].flatten(2)
    picked = picked.gather(2, source[:, None].expand(-1, channels, -1))
    return torch.where(inside[:, None], picked, 0).view(-1, channels, h, w)


def _source_pixels(where: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
    """For every output pixel: the flat source pixel int64 [B, H*W], and whether it lies in the image."""
    where = where.long()
    dy, dx, mirrored = where[:, 0, None, None], where[:, 1, None, None], where[:, 2, None, None]
    y = torch.arange(h, device=where.device)[None, :, None] + dy
    column = torch.arange(w, device=where.device)[None, None, :]
    x = torch.where(mirrored > 0, w - 1 - column, column) + dx
    inside = (y >= 0) & (y < h) & (x >= 0) & (x < w)
    source = y.clamp(0, h - 1) * w + x.clamp(0, w - 1)
    return source.flatten(1), inside.flatten(1)


def recall(
    memory: Tensor, index: Tensor, where: Tensor, x: Tensor, eps: Tensor, norm: str
) -> Tensor:
    quantum = eps.to(x.dtype) / 127.0
    _check_range(index, memory)
    delta = crop(memory, index, where).to(x.dtype) * quantum
    start = x + delta
    # Rounding to int8 steps can leave the L2 ball; a zero step projects back.
    return attack_step(x, start, torch.zeros_like(x), eps, eps, norm)


def remember(
    memory: Tensor, index: Tensor, where: Tensor, x: Tensor, z: Tensor, eps: Tensor
) -> None:
    # eps = 0 leaves nothing to store.
    steps = (z - x) * (127.0 / eps.to(x.dtype).clamp_min(1e-12))
    steps = steps.round().clamp(-127, 127).to(torch.int8)
    dy, dx, mirrored = where.unbind(1)
    back = torch.stack([-dy, torch.where(mirrored > 0, dx, -dx), mirrored], dim=1)
    _, inside = _source_pixels(back, *memory.shape[2:])
    _check_range(index, memory)
    everything = torch.arange(len(index), device=index.device)
    moved_back = crop(steps, everything, back)
    inside = inside.view(-1, 1, *memory.shape[2:])
    # Pixels that the crop cut away keep what they had.
    memory[index] = torch.where(inside, moved_back, memory[index])


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
    # Arithmetic, not a branch: the flag is read on the device only.
    go = found_inf == 0
    for p, g, m, decay in zip(params, grads, momenta, weight_decay, strict=True):
        d = g.to(p.dtype) + decay * p
        new_m = momentum * m + d
        step = d + momentum * new_m if nesterov else new_m
        new_p = p - lr.to(p.dtype) * step
        m.copy_(torch.where(go, new_m, m))
        p.copy_(torch.where(go, new_p, p))
    _average(params, averages, go, ema_decay)


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
    go = found_inf == 0
    # In float64: 1 - beta^n cancels.
    corrections = [1.0 - beta ** count.double() for beta in (beta1, beta2)]
    for p, g, m, v, decay in zip(params, grads, exp_avgs, exp_avg_sqs, weight_decay, strict=True):
        d, rate = g.to(p.dtype), lr.to(p.dtype)
        new_m = m + (1.0 - beta1) * (d - m)
        new_v = beta2 * v + (1.0 - beta2) * d * d
        root = corrections[1].sqrt().to(p.dtype)
        size = (lr.double() / corrections[0]).to(p.dtype)
        new_p = (1.0 - rate * decay) * p - size * new_m / (new_v.sqrt() / root + adam_eps)
        m.copy_(torch.where(go, new_m, m))
        v.copy_(torch.where(go, new_v, v))
        p.copy_(torch.where(go, new_p, p))
    _average(params, averages, go, ema_decay)


def _average(params: list[Tensor], averages: list[Tensor], go: Tensor, ema_decay: Tensor) -> None:
    for p, e in zip(params, averages, strict=False):
        e.copy_(torch.where(go, e + (1.0 - ema_decay.to(p.dtype)) * (p - e), e))
