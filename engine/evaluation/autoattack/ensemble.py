"""AutoAttack: APGD on two losses, FAB and Square, one after the other on the images that are left.

Croce & Hein (arXiv 2003.01690), the standard version. From one seed it draws the random numbers
that the authors' package draws on the CPU, so both attack along the same iterates up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...errors import EngineError
from ...threat import ThreatModel
from ..work import Work
from .apgd import apgd, random_start
from .fab import fab
from .losses import CrossEntropy, LogitDifference, Loss
from .oracle import Oracle
from .square import square
from .square_l2 import square_l2
from .targeted import apgd_targeted
from .verdict import Attack, Verdict, in_turn

STEPS, TARGETS, QUERIES = 100, 9, 5000
VERSIONS = ("standard", "apgd")
# Places in a batch, int64 [F], and an adversary of each.
_Found = tuple[Tensor, Tensor]
# One try of an attack: from positions of images, a generator and the try's number.
_Once = Callable[[Tensor, torch.Generator, int], _Found]


def run(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    version: str = "standard",
    seed: int = 0,
    batch_size: int = 500,
    work: Work | None = None,
    precision: str = "fp32",
) -> Verdict:
    """Attack images with all attacks of a version.

    Args:
        model: in evaluation mode, [0, 1] images to logits [B, K], K >= 2. With two or three classes
            APGD climbs the logit difference in place of the targeted DLR loss, which needs four.
        x: float32 [N, C, H, W] in [0, 1]; y: int64 [N].
        version: "standard" (four attacks), or "apgd" for the first two, APGD on the cross-entropy
            with five restarts.
        seed: of every batch of every attack.
        batch_size: images in memory at once.
        work: runs the batches; left out: here and silently.
        precision: of the attacks' passes, "fp32" or "bf16". An image falls only where the float32
            network is wrong.
    Raises:
        EngineError: for another version.
    """
    if version not in VERSIONS:
        raise EngineError(f"version must be one of {', '.join(VERSIONS)}, got {version!r}")
    work = work or Work()
    oracle = Oracle(model, x[:batch_size])
    fast = oracle if precision == "fp32" else Oracle(model, precision=precision)
    clean = torch.cat([oracle.exact_logits(images) for images in x.split(batch_size)])
    options = (x, y, clean, threat, version, seed, batch_size)
    attacks = {
        name: _verified(oracle, y, attack) for name, attack in _attacks(oracle, *options).items()
    }
    if fast is not oracle:
        claims = _attacks(fast, *options)
        attacks = {
            name: _verified(oracle, y, claims[name], attack) for name, attack in attacks.items()
        }
    verdict = in_turn(attacks, x, clean.argmax(1) == y, batch_size, work)
    return replace(
        verdict,
        notes=[*work.notes, *_notes(verdict.after)],
        forward_images=sum(o.forward_images for o in {oracle, fast}),
        gradient_images=sum(o.gradient_images for o in {oracle, fast}),
    )


def _verified(oracle: Oracle, y: Tensor, attack: Attack, exact: Attack | None = None) -> Attack:
    """Return `attack`, whose adversaries count only if the float32 network falls for them.

    The network judges each adversary as it would be published.

    Args:
        exact: where `attack` runs in bf16: the same in float32. An image that falls in bf16 alone
            has left `attack` early, so `exact` attacks it. An image that stands has then withstood
            the whole attack in one of the two.
    """

    def verified(rows: Tensor) -> tuple[Tensor, Tensor]:
        claimed, found = attack(rows)
        wrong = oracle.is_wrong(found, y[claimed])
        fallen, adversaries = claimed[wrong], found[wrong]
        if exact is None or wrong.all():
            return fallen, adversaries
        more, others = exact(claimed[~wrong])
        return torch.cat([fallen, more]), torch.cat([adversaries, others])

    return verified


def _notes(after: dict[str, float]) -> list[str]:
    """Warn as the authors' package does: where Square alone takes more than 0.2 points."""
    *by_gradient, last = after
    taken = after[by_gradient[-1]] - after[last]
    if last != "square" or taken <= 0.002:
        return []
    return [
        f"Square lowered the robust accuracy by {taken:.2%}: gradients may be masked, and "
        "AutoAttack may overstate the robust accuracy"
    ]


def _attacks(
    oracle: Oracle,
    x: Tensor,
    y: Tensor,
    clean: Tensor,
    threat: ThreatModel,
    version: str,
    seed: int,
    batch_size: int,
) -> dict[str, Attack]:
    """Return the attacks of a version by name, in their order; what they find is not verified.

    Args:
        clean: logits [N, K] at the images x.
    """
    classes = clean.shape[1]
    targets = min(TARGETS, classes - 1)
    # Column i holds the class with the logit that is largest after i + 1 others.
    ranked = clean.sort(dim=1)[1].flip(1)[:, 1 : targets + 1]

    def climb(rows: Tensor, loss: Loss, draw: torch.Generator) -> _Found:
        start = random_start(x[rows], threat, draw)
        return apgd(oracle, x[rows], start, loss, threat, steps=STEPS)

    def apgd_ce(rows: Tensor, draw: torch.Generator, _: int) -> _Found:
        return climb(rows, CrossEntropy(y[rows]), draw)

    def apgd_difference(rows: Tensor, draw: torch.Generator, _: int) -> _Found:
        return climb(rows, LogitDifference(y[rows]), draw)

    def apgd_t(rows: Tensor, draw: torch.Generator, _: int) -> _Found:
        goal = (x[rows], y[rows], ranked[rows], threat)
        return apgd_targeted(oracle, *goal, steps=STEPS, rows=batch_size, draw=draw)

    def fab_t(rows: Tensor) -> _Found:
        at_once = max(1, batch_size // max(1, len(rows)))

        def towards(rows: Tensor, draw: torch.Generator, number: int) -> _Found:
            some = ranked[rows, number : number + at_once]
            return fab(oracle, x[rows], y[rows], some, threat, steps=STEPS)

        return tried(towards, range(0, targets, at_once))(rows)

    def random_search(rows: Tensor, draw: torch.Generator, _: int) -> _Found:
        if threat.norm == "L2":
            return square_l2(oracle, x[rows], y[rows], threat, queries=QUERIES, draw=draw)
        return square(oracle, x[rows], y[rows], threat, queries=QUERIES, rows=batch_size, draw=draw)

    def tried(once: _Once, tries: range) -> Attack:
        return lambda rows: _repeat(rows, once, tries, torch.Generator().manual_seed(seed), x[:0])

    single = range(1)
    attacks = {"apgd-ce": tried(apgd_ce, range(5 if version == "apgd" else 1))}
    if classes >= 4:
        attacks["apgd-t"] = tried(apgd_t, single)
    else:
        attacks["apgd-difference"] = tried(apgd_difference, single)
    if version == "standard":
        attacks |= {"fab-t": fab_t, "square": tried(random_search, single)}
    return attacks


def _repeat(
    rows: Tensor, once: _Once, tries: range, draw: torch.Generator, none: Tensor
) -> tuple[Tensor, Tensor]:
    """Try an attack several times, each time on the images that are left.

    Args:
        none: no images, [0, C, H, W].
    """
    fallen = [(rows[:0], none)]
    for number in tries:
        if len(rows) == 0:
            break
        places, found = once(rows, draw, number)
        fallen.append((rows[places], found))
        stays = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        stays[places] = False
        rows = rows[stays]
    images, adversaries = zip(*fallen, strict=True)
    return torch.cat(images), torch.cat(adversaries)
