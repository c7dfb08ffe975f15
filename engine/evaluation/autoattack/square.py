"""Square Attack in Linf balls: random search with square windows, from logits alone.

Andriushchenko et al., "Square Attack: a query-efficient black-box adversarial attack via random
search" (arXiv 1912.00049), with the margin loss and the window schedule of arXiv 2003.01690.

The windows of all queries are drawn beforehand and an image accepts few of them. So a pass tries
several queries of an image at once, as if the earlier ones had been refused; from an accepted query
on the image tries again. Every image meets the same queries in the same order as one by one. A
query that changes no pixel cannot be accepted, and does not pass the network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...threat import ThreatModel
from .draws import uniform
from .oracle import Attacked, Nearby, Oracle, margin

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
    near = Nearby(oracle, start)
    fallen = [(search.image[:0], x[:0])]
    # Of the queries tried lately, the shares that were accepted and that passed the network. They
    # decide how many are tried at once.
    accepted = passed = 1.0
    while True:
        broken = search.margin <= 0
        if broken.any():
            fallen.append((search.image[broken], search.best[broken]))
        stays = ~broken & (search.query < queries)
        if not stays.all():
            search.keep(stays)
            near.keep(stays)
        if len(search.image) == 0:
            break
        depth = max(1, min(int(0.3 / accepted), int(rows / (len(search.image) * passed))))
        tried, points, taken = _try(near, search, windows, depth, queries)
        accepted = 0.9 * accepted + 0.1 * max(taken / tried, 1e-3)
        passed = 0.9 * passed + 0.1 * max(points / (depth * len(search.image)), 0.1)
    images, adversaries = zip(*fallen, strict=True)
    return torch.cat(images), torch.cat(adversaries)


@dataclass(frozen=True)
class _Windows:
    """Hold the windows of all queries: corners and sides int64 [Q], changes float [Q, C]."""

    top: Tensor
    left: Tensor
    side: Tensor
    change: Tensor


def _signs(drawn: Tensor) -> Tensor:
    return (2 * drawn - 1).sign()


def _stripes(x: Tensor, draw: torch.Generator) -> Tensor:
    """Return vertical stripes of -1 and 1, [B, C, 1, W]: the start of the search."""
    b, c, _, w = x.shape
    return _signs(uniform((b, c, 1, w), draw)).to(x.device)


def _draw_windows(x: Tensor, eps: float, queries: int, draw: torch.Generator) -> _Windows:
    """Draw all windows, in the order in which one query after the other would."""
    _, c, h, w = x.shape
    sides = [min(max(round(window_side(query, h * w)), 1), h, w) for query in range(queries)]
    side = torch.tensor(sides, device="cpu")
    drawn = uniform((queries, 2 + c), draw)
    top, left = ((n - side) * drawn[:, i] for i, n in enumerate((h, w)))
    return _Windows(
        top=top.long().to(x.device),
        left=left.long().to(x.device),
        side=side.to(x.device),
        change=(2 * eps * _signs(drawn[:, 2:])).to(x.device),
    )


def _try(
    near: Nearby, search: _Search, windows: _Windows, depth: int, queries: int
) -> tuple[int, int, int]:
    """Try the next `depth` queries of every image.

    Returns:
        How many queries were tried, how many points passed the network, and how many queries were
        accepted.
    """
    count = len(search.image)
    order = search.query[:, None] + torch.arange(depth, device=search.query.device)
    real = order < queries
    order = order.clamp(max=queries - 1)
    pixels, values, moved = _changed(search, windows, order)
    image, place = (moved & real).nonzero(as_tuple=True)
    if len(image) == 0:
        search.query = search.query + depth
        return count * depth, 0, 0
    points = search.best[image]
    # A view: of images in another order than NCHW or NHWC there is none, and this raises.
    points.view(*points.shape[:2], -1).scatter_(2, pixels[image, place], values[image, place])
    query = order[image, place]
    corner, side = (windows.top[query], windows.left[query]), int(windows.side[order].max())
    logits = near.logits(points, image, corner, side)
    # A query that moves no pixel leaves the margin as it is, so it is refused without a pass.
    margins = search.margin.new_full((count, depth), float("inf"))
    margins[image, place] = margin(logits, search.y[image])
    better = (margins < search.margin[:, None]) | (margins <= 0)
    hit = better.any(1)
    first = better.to(torch.uint8).argmax(1)
    # Each image's first better point, in the order of `points`.
    taken = (better & (better.cumsum(1) == 1))[image, place]
    search.margin = torch.where(hit, margins.gather(1, first[:, None])[:, 0], search.margin)
    search.best[hit] = points[taken]
    near.move(hit, search.best)
    advanced = torch.where(hit, first + 1, depth)
    search.query = search.query + advanced
    return int(advanced.sum()), len(points), int(hit.sum())


def _changed(search: _Search, windows: _Windows, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the changes of each image's best point by each of its next windows.

    Returns:
        The windows' pixels, as positions in a channel, int64 [B, depth, C, pixels]; their values
        after the change, the same shape; where a value changes, bool [B, depth].
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
    values = torch.minimum(torch.maximum(best + change, low), high)
    moved = (values != best).any(3).any(1)
    return pixels.view(b, c, depth, -1).transpose(1, 2), values.transpose(1, 2), moved
