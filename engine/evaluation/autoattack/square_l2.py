"""Square Attack in L2 balls: random search that moves the perturbation's energy between windows.

Andriushchenko et al. (arXiv 1912.00049), section 3.3. A query's random signs depend on which images
are left, so queries are made one by one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...threat import ThreatModel
from .draws import uniform
from .oracle import Oracle, lengths, margin, per_sample
from .square import window_side

_TINY = 1e-12


def square_l2(
    oracle: Oracle,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    queries: int,
    draw: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Attack a batch in an L2 ball by random search.

    Args:
        x: float32 [B, C, H, W] in [0, 1], classified rightly; y: int64 [B].
        queries: an image [count].
        draw: a CPU generator.
    Returns:
        Positions int64 [F] of the images that fell, and an adversary of each.
    """
    _, c, h, w = x.shape
    image = torch.arange(len(x), device=x.device)
    best = _scaled(x, _first_perturbation(x, draw), threat.eps)
    least = margin(oracle.logits(best), y)
    fallen = [(image[:0], x[:0])]
    for query in range(queries + 1):
        broken = least <= 0
        if broken.any():
            fallen.append((image[broken], best[broken]))
            image, x, y, best, least = (t[~broken] for t in (image, x, y, best, least))
        if query == queries or len(image) == 0:
            break
        side = max(round(window_side(query, h * w)), 3)
        side = min(side + (side % 2 == 0), h, w)
        top, left, top2, left2 = (int((n - side) * uniform((), draw)) for n in (h, w, h, w))
        hill = _signed_hill(side, c, len(x), draw).to(x.device)
        delta = _moved(best - x, hill, threat.eps, (top, left), (top2, left2))
        point = _scaled(x, delta, threat.eps)
        found = margin(oracle.logits(point), y)
        better = (found < least) | (found <= 0)
        least = torch.where(better, found, least)
        best = torch.where(per_sample(better, best), point, best)
    images, adversaries = zip(*fallen, strict=True)
    return torch.cat(images), torch.cat(adversaries)


def _moved(
    delta: Tensor, hill: Tensor, eps: float, first: tuple[int, int], second: tuple[int, int]
) -> Tensor:
    """Return the perturbation with the second window's energy, and what was unused, in the first.

    Args:
        delta: [B, C, H, W]; hill: the signed pattern [B, C, s, s] to add in the first window.
        first, second: corners of the windows.
    """
    side = hill.shape[-1]
    (top, left), (top2, left2) = first, second
    one = (..., slice(top, top + side), slice(left, left + side))
    two = (..., slice(top2, top2 + side), slice(left2, left2 + side))
    unused = (eps**2 - per_sample(lengths(delta, "L2") ** 2, delta)).clamp(min=0.0)
    outside = delta.clone()
    outside[one] = 0.0
    outside[two] = 0.0
    energy = _energy(delta) - _energy(outside)
    pattern = hill + delta[one] / (_TINY + _energy(delta[one]).sqrt())
    scale = (unused / delta.shape[1] + energy.clamp(min=0.0)).sqrt()
    moved = delta.clone()
    moved[two] = 0.0
    moved[one] = pattern / (_TINY + _energy(pattern).sqrt()) * scale
    return moved


def _energy(delta: Tensor) -> Tensor:
    """Return the sum of squares of each channel, [B, C, 1, 1]."""
    return delta.square().sum((-2, -1), keepdim=True)


def _scaled(x: Tensor, delta: Tensor, eps: float) -> Tensor:
    """Return x plus the perturbation stretched to length eps, clipped to [0, 1]."""
    return (x + delta / per_sample(lengths(delta, "L2") + _TINY, x) * eps).clamp(0.0, 1.0)


def _first_perturbation(x: Tensor, draw: torch.Generator) -> Tensor:
    """Return a grid of hills with random signs, about five by five, [B, C, H, W]."""
    b, c, h, w = x.shape
    delta = torch.zeros((b, c, h, w), dtype=torch.float32, device="cpu")
    # Five hills find no room in an image of under five pixels.
    side = max(min(h, w) // 5, 1)
    edge = max((min(h, w) - side * 5) // 2, 0)
    for row in range(h // side):
        for column in range(w // side):
            top, left = edge + row * side, edge + column * side
            hill = _signed_hill(side, c, b, draw)
            # Beyond the last edge of an oblong image there may be a part of a hill.
            hill = hill[:, :, : max(h - top, 0), : max(w - left, 0)]
            delta[:, :, top : top + side, left : left + side] += hill
    return delta.to(x.device)


def _signed_hill(side: int, channels: int, batch: int, draw: torch.Generator) -> Tensor:
    """Return a hill and a valley side by side, each channel with a random sign, [B, C, s, s]."""
    pattern = torch.zeros((side, side), dtype=torch.float32, device="cpu")
    half = side // 2
    pattern[:half] = _hill(half, side)
    pattern[half:] = -_hill(side - half, side)
    pattern /= pattern.norm()
    if uniform((), draw) > 0.5:
        pattern = pattern.T
    signs = 2 * uniform((batch, channels, 1, 1), draw) - 1
    return pattern * signs.sign()


def _hill(height: int, width: int) -> Tensor:
    """Return concentric rectangles that grow towards the middle, [height, width], of norm 1."""
    rows, columns = ((torch.arange(n, device="cpu") - n // 2).abs() for n in (height, width))
    ring = torch.maximum(rows[:, None], columns[None, :])
    rings = max(height // 2, width // 2) + 1
    steps = 1.0 / torch.arange(1, rings + 1, dtype=torch.float32, device="cpu").square()
    above = steps.flip(0).cumsum(0).flip(0)
    hill = above[ring]
    return hill / hill.norm()
