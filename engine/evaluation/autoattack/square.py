"""Square Attack in Linf balls: random search with square windows, from logits alone.

Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via random
search" (arXiv 1912.00049), with the margin loss and the window schedule of arXiv 2003.01690.

The windows of all queries are drawn beforehand and an image accepts few of them. So a pass tries
several queries of an image at once, as if the earlier ones had been refused; from an accepted query
on the image tries again. Every image meets the same queries in the same order as one by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...threat import ThreatModel
from .oracle import Attacked, Oracle, margin, per_sample

_FIRST_SHARE = 0.8  # share of the image that the first windows cover
# The share halves after these queries, however many there are: AutoAttack ends at 5,000.
_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


def window_side(query: int, pixels: int) -> float:
    """Return the side of the window at a query, before rounding [pixels]."""
    return math.sqrt(_FIRST_SHARE / 2 ** sum(query > after for after in _HALVINGS) * pixels)


@dataclass
class _Search(Attacked):
    """Hold the images under attack.

    Attributes:
        image: position in the batch; low, high: the ball within [0, 1]; y: labels.
        best, margin: the best point so far and its margin; query: the next query.
    """

    image: Tensor
    low: Tensor
    high: Tensor
    y: Tensor
    best: Tensor
    margin: Tensor
    query: Tensor


def square(
    oracle: Oracle,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    queries: int,
    rows: int,
    draw: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Attack a batch in an Linf ball by random search.

    Args:
        x: float32 [B, C, H, W] in [0, 1], classified rightly; y: int64 [B].
        queries: an image [count]; rows: images in a pass, at most about this many.
        draw: a CPU generator.
    Returns:
        Positions int64 [F] of the images that fell, and an adversary of each.
    """
    stripes = _stripes(x, draw)
    windows = _draw_windows(x, threat.eps, queries, draw)
    low, high = (x - threat.eps).clamp(min=0.0), (x + threat.eps).clamp(max=1.0)
    start = (x + threat.eps * stripes).clamp(0.0, 1.0)
    search = _Search(
        image=torch.arange(len(x), device=x.device),
        low=low,
        high=high,
        y=y,
        best=start,
        margin=margin(oracle.logits(start), y),
        query=torch.zeros(len(x), dtype=torch.int64, device=x.device),
    )
    fallen = [(search.image[:0], x[:0])]
    # Accepted queries a tried one, lately: it decides how many are tried at once.
    accepted = 1.0
    while True:
        broken = search.margin <= 0
        if broken.any():
            fallen.append((search.image[broken], search.best[broken]))
        stays = ~broken & (search.query < queries)
        if not stays.all():
            search.keep(stays)
        if len(search.image) == 0:
            break
        depth = max(1, min(int(0.3 / accepted), rows // len(search.image)))
        tried, taken = _try(oracle, search, windows, depth, queries)
        accepted = 0.9 * accepted + 0.1 * max(taken / max(tried, 1), 1e-3)
    images, adversaries = zip(*fallen, strict=True)
    return torch.cat(images), torch.cat(adversaries)


@dataclass(frozen=True)
class _Windows:
    """Hold the windows of all queries: corners and sides int64 [Q], changes float [Q, C]."""

    top: Tensor
    left: Tensor
    side: Tensor
    change: Tensor


def _signs(uniform: Tensor) -> Tensor:
    return (2 * uniform - 1).sign()


def _stripes(x: Tensor, draw: torch.Generator) -> Tensor:
    """Return vertical stripes of -1 and 1, [B, C, 1, W]: the start of the search."""
    b, c, _, w = x.shape
    return _signs(torch.rand((b, c, 1, w), generator=draw)).to(x.device)


def _draw_windows(x: Tensor, eps: float, queries: int, draw: torch.Generator) -> _Windows:
    """Draw all windows, in the order in which one query after the other would."""
    _, c, h, w = x.shape
    sides = [min(max(round(window_side(query, h * w)), 1), h, w) for query in range(queries)]
    side = torch.tensor(sides)
    uniform = torch.rand((queries, 2 + c), generator=draw)
    top, left = ((n - side) * uniform[:, i] for i, n in enumerate((h, w)))
    return _Windows(
        top=top.long().to(x.device),
        left=left.long().to(x.device),
        side=side.to(x.device),
        change=(2 * eps * _signs(uniform[:, 2:])).to(x.device),
    )


def _try(
    oracle: Oracle, search: _Search, windows: _Windows, depth: int, queries: int
) -> tuple[int, int]:
    """Try the next `depth` queries of every image.

    Returns:
        How many queries were tried, and how many were accepted.
    """
    count = len(search.image)
    order = search.query[:, None] + torch.arange(depth, device=search.query.device)
    real = order < queries
    points = _changed(search, windows, order.clamp(max=queries - 1))
    logits = oracle.logits(points.flatten(0, 1))
    margins = margin(logits, search.y.repeat_interleave(depth)).view(count, depth)
    better = ((margins < search.margin[:, None]) | (margins <= 0)) & real
    hit = better.any(1)
    first = better.to(torch.uint8).argmax(1)
    here = torch.arange(count, device=first.device)
    search.margin = torch.where(hit, margins[here, first], search.margin)
    search.best = torch.where(per_sample(hit, search.best), points[here, first], search.best)
    advanced = torch.where(hit, first + 1, depth)
    search.query = search.query + advanced
    return int(advanced.sum()), int(hit.sum())


def _changed(search: _Search, windows: _Windows, order: Tensor) -> Tensor:
    """Return each image's best point with each of its next windows changed, [B, depth, C, H, W].

    Only the pixels of the windows are computed: late windows have four pixels of an image.
    """
    b, c, _, w = search.best.shape
    depth, side = order.shape[1], windows.side[order]
    # A window smaller than the largest one writes its last row and column again.
    cells = torch.arange(int(side.max()), device=order.device)
    cells = torch.minimum(cells, side[..., None] - 1)
    rows, columns = (start[order][..., None] + cells for start in (windows.top, windows.left))
    pixels = (rows[..., :, None] * w + columns[..., None, :]).view(b, 1, -1).expand(-1, c, -1)
    best, low, high = (
        t.flatten(2).gather(2, pixels).view(b, c, depth, -1)
        for t in (search.best, search.low, search.high)
    )
    change = windows.change[order].transpose(1, 2)[..., None]
    values = torch.minimum(torch.maximum(best + change, low), high).transpose(1, 2)
    points = search.best[:, None].repeat(1, depth, 1, 1, 1)
    pixels = pixels.view(b, c, depth, -1).transpose(1, 2)
    points.flatten(3).scatter_(3, pixels, values)
    return points
