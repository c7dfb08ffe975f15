"""Philox random numbers of a (seed, step) state, the same in every backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_MASK = 0xFFFFFFFF
# Keeps the draws per sample (the L2 radius) apart from the draws per element.
RADIUS_STREAM = 1 << 31


def philox(rng: Tensor, stream: int, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return four 32-bit words (held in int64) for each counter block.

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
    """Return int64 [n] words in [0, 2^32); word i is output i % 4 of block i // 4."""
    blocks = torch.arange((n + 3) // 4, device=rng.device)
    return torch.stack(philox(rng, stream, blocks), dim=1).reshape(-1)[:n]


def to_uniform(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the top 24 bits as a number in [0, 1), exact in float32."""
    return (words >> 8).to(dtype) * 2.0**-24


def to_normal(words: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn words (2j, 2j+1) into two standard normals by Box and Muller's transform (1958)."""
    pairs = torch.cat([words, words.new_zeros(words.numel() % 2)]).view(-1, 2)
    # 1 - u lies in (0, 1]: the logarithm is finite.
    radius = torch.sqrt(-2.0 * torch.log(1.0 - to_uniform(pairs[:, 0], dtype)))
    angle = (2.0 * math.pi) * to_uniform(pairs[:, 1], dtype)
    return torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], 1).view(-1)[
        : words.numel()
    ]


def as_rows(t: Tensor) -> Tensor:
    """Return a [B, D] view of a dense tensor in memory order."""
    if t.dim() == 4 and not t.is_contiguous():
        t = t.permute(0, 2, 3, 1)
    return t.reshape(t.shape[0], -1) if t.shape[0] else t.reshape(0, math.prod(t.shape[1:]))


def as_batch(rows: Tensor, t: Tensor) -> Tensor:
    """Give a [B, D] result the shape and layout of `t`; the inverse of `as_rows`."""
    if t.dim() == 4 and not t.is_contiguous():
        b, c, h, w = t.shape
        return rows.view(b, h, w, c).permute(0, 3, 1, 2)
    return rows.view(t.shape)
