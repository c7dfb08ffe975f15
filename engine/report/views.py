"""Compute the report's pictures from a run: robust accuracy against eps, examples, loss surface."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from markupsafe import Markup
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from .. import pictures, rng
from ..adversary.ascent import away_from, climb, random_point
from ..adversary.attack import Attack
from ..errors import EngineError
from ..evaluation import robust_accuracy
from ..recipes import Recipe
from ..runs import evaluate, images
from ..runs.folder import Run
from ..threat import ThreatModel
from . import curves, robustness
from .robustness import Example, Surface, Sweep, Tile

_STEPS = 20
_SWEEP_EXAMPLES = 256
_SWEEP_RADII = 10
_GRID_EXAMPLES = 8
_SURFACE_EXAMPLES = 32
_SURFACE_POINTS = 33
_SURFACE_REACH = 2.0
# A picture may take so many floating-point operations, about ten seconds.
_BUDGET = {"cpu": 5e11, "cuda": 3e14}


@dataclass
class View:
    """Hold a picture of the report, or the reason for its absence.

    Attributes:
        name: of the PNG and in the template.
        png: the figure to save.
        charts: its parts as inline SVG.
        examples: of the image grid; the page lays them out.
        about: numbers for the caption.
        missing: a sentence in place of the picture.
    """

    name: str
    png: Figure | None = None
    charts: list[Markup] = field(default_factory=list)
    examples: Sequence[Example] = ()
    about: dict[str, Any] = field(default_factory=dict)
    missing: str = ""


def curves_view(recipe: Recipe, rows: list[dict[str, Any]], best: int | None) -> View:
    if not rows:
        return View("curves", missing="No epoch has been logged, so there is no curve to show.")
    weights = {
        term: getattr(recipe.objective, f"{term}_weight", 1.0) for term in ("local", "global")
    }
    figure, axes = pictures.panels(2, height=3.8)
    charts = []
    for number, ax in enumerate(axes):
        alone, (own,) = pictures.panels(height=3.8)
        for target in (ax, own):
            if number == 0:
                curves.draw_accuracy(target, rows, best)
            else:
                curves.draw_losses(target, rows, best, weights)
        charts.append(Markup(pictures.svg(alone, f"curves{number}")))
    return View("curves", figure, charts)


def views_of_model(run: Run, evaluation: Mapping[str, Any]) -> list[View]:
    names = ("eps", "grid", "surface")
    checkpoint = evaluation.get("checkpoint", "best")
    if not (run.path / f"{checkpoint}.safetensors").is_file():
        reason = (
            f"The run has no checkpoint {checkpoint}.safetensors yet, so this picture is missing."
        )
        return [View(name, missing=reason) for name in names]
    try:
        model = evaluate.load_model(run, checkpoint)
        # A folder of pictures is not held in memory.
        most = None if run.recipe.data.size is None else _SWEEP_EXAMPLES
        x, y = images.first_test_images(run.recipe, most)
        classes = images.classes(run.recipe)
    except EngineError as error:
        reason = f"This picture is missing: {error}.".replace("`", "")
        return [View(name, missing=reason) for name in names]
    if run.recipe.threat.eps == 0:
        reason = "The recipe's eps is 0: there is no threat ball to show."
        return [View(name, missing=reason) for name in names]
    with robust_accuracy.evaluation_mode(model), _one_thread():
        return [
            _eps(run.recipe, model, x, y, evaluation),
            _grid(run.recipe, model, x, y, classes),
            _surface(run.recipe, model, x, y),
        ]


def _eps(
    recipe: Recipe, model: nn.Module, x: Tensor, y: Tensor, evaluation: Mapping[str, Any]
) -> View:
    passes = 2 * _STEPS * (_SWEEP_RADII - 1)
    count = min(_SWEEP_EXAMPLES, len(x), _affordable(model, x, passes))
    if count < min(32, len(x)):
        return _too_slow("eps")
    radii = np.linspace(0.0, 3.0 * recipe.threat.eps, _SWEEP_RADII)
    accuracy = []
    for eps in radii:
        threat = ThreatModel(recipe.threat.norm, float(eps))
        robust = robust_accuracy.pgd(
            model, x[:count], y[:count], threat, steps=_STEPS, restarts=1, seed=recipe.seed
        )
        accuracy.append(float(robust.double().mean()))
    sweep = Sweep(radii, np.array(accuracy), count, recipe.threat.eps)
    others = {
        f"{label}, {evaluation['examples']} images": float(evaluation[key]) / 100
        for key, label in (("pgd_acc", evaluation.get("pgd")), ("autoattack_acc", "AutoAttack"))
        if evaluation.get(key) is not None
    }

    figure, (ax,) = pictures.panels()
    robustness.draw_sweep(ax, sweep, others, recipe.threat.norm)

    about = {"examples": count, "last": accuracy[-1], "steps": _STEPS}
    return View("eps", figure, [Markup(pictures.svg(figure, "eps"))], about=about)


def _grid(recipe: Recipe, model: nn.Module, x: Tensor, y: Tensor, classes: Sequence[str]) -> View:
    chosen = _first_of_each_class(y, _GRID_EXAMPLES)
    x, y, threat = x[chosen], y[chosen], recipe.threat
    state = rng.state(recipe.seed, x.device)
    adversary, _ = Attack(steps=_STEPS)(model, x, y, threat, state=state)
    rho = getattr(recipe.objective, "rho", 0.5)
    ball = _worst_of_ball(model, adversary, ThreatModel(threat.norm, rho * threat.eps), state)
    delta = adversary - x
    # Linf perturbations share one scale; each L2 perturbation has its own.
    reach = (
        torch.full((len(x),), threat.eps)
        if threat.norm == "Linf"
        else delta.abs().flatten(1).amax(1).cpu().clamp(min=1e-12)
    )
    columns = (("clean", x), ("adversary", adversary), ("local ball", ball))
    with torch.no_grad():
        answers = [F.softmax(model(images), dim=1).cpu().max(dim=1) for _, images in columns]
    examples = []
    for i, label in enumerate(y.tolist()):
        tiles = [
            Tile(
                title,
                _rgb(images[i]),
                predicted=classes[int(guess.indices[i])],
                confidence=float(guess.values[i]),
                right=int(guess.indices[i]) == label,
            )
            for (title, images), guess in zip(columns, answers, strict=True)
        ]
        change = delta[i].cpu().float() / float(reach[i])
        tiles.insert(1, Tile("perturbation", _perturbation(change)))
        examples.append(Example(classes[label], tuple(tiles)))
    about = {
        "rho": rho,
        "radius": rho * threat.eps,
        "trained_on_ball": hasattr(recipe.objective, "rho"),
        "steps": _STEPS,
        "magnified": 0.5 / threat.eps if threat.norm == "Linf" else None,
    }
    return View("grid", robustness.examples_figure(examples), examples=examples, about=about)


def _surface(recipe: Recipe, model: nn.Module, x: Tensor, y: Tensor) -> View:
    points, eps, norm = _SURFACE_POINTS, recipe.threat.eps, recipe.threat.norm
    count = min(_SURFACE_EXAMPLES, len(x), _affordable(model, x, points * points))
    if count < 1:
        return _too_slow("surface")
    x, y = x[:count], y[:count]
    state = rng.state(recipe.seed, x.device)
    adversary, _ = Attack(steps=_STEPS)(model, x, y, recipe.threat, state=state)
    generator = torch.Generator().manual_seed(recipe.seed)
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    if norm == "Linf":
        along, across = adversary - x, eps * noise.sign()
    else:
        along, across = adversary - x, eps * _orthogonal(noise, adversary - x)
    steps = np.linspace(-_SURFACE_REACH, _SURFACE_REACH, points)
    loss, right = np.zeros((points, points)), np.zeros((points, points))
    with torch.no_grad():
        for row, t in enumerate(steps):
            line = [(x + s * along + t * across).clamp(0, 1) for s in steps]
            logits = torch.cat([model(part) for part in torch.cat(line).split(1000)])
            target = y.repeat(points)
            entropy = F.cross_entropy(logits.float(), target, reduction="none")
            loss[row] = entropy.view(points, count).mean(1).cpu().numpy()
            hits = (logits.argmax(1) == target).double()
            right[row] = hits.view(points, count).mean(1).cpu().numpy()
    surface = Surface(steps, loss, right, count)
    both, alone = Figure(figsize=(10.6, 4.4)), Figure(figsize=(4.6, 4.0))
    robustness.draw_relief(both, surface, 121)
    robustness.draw_plane(both.add_subplot(122), surface, norm)
    both.subplots_adjust(left=0.02, right=0.95, top=0.88, bottom=0.12, wspace=0.12)
    robustness.draw_relief(alone, surface)
    alone.subplots_adjust(left=0.0, right=0.97, top=0.9, bottom=0.06)
    above, (ax,) = pictures.panels(height=4.0)
    robustness.draw_plane(ax, surface, norm)
    charts = [Markup(pictures.svg(alone, "relief")), Markup(pictures.svg(above, "plane"))]
    return View("surface", both, charts, about={"examples": count, "crossed": surface.crossed})


def _affordable(model: nn.Module, x: Tensor, passes: int) -> int:
    """Return how many images can have `passes` passes each within the budget.

    A pass is a forward pass or an input gradient. The budget counts operations, not seconds: the
    same run gives the same report on a busy machine.
    """
    spent = 0

    def count(layer: nn.Module, _: object, out: Tensor) -> None:
        nonlocal spent
        spent += 2 * out.numel() * layer.weight[0].numel()  # type: ignore[operator,index]

    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    try:
        with torch.no_grad():
            model(x[:1])
    finally:
        for hook in hooks:
            hook.remove()
    return int(_BUDGET[x.device.type] / max(spent * passes, 1))


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Use one CPU thread in the block.

    These batches are too small to gain from more threads, and on a busy machine threads that wait
    for each other cost many times the work.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _too_slow(name: str) -> View:
    return View(
        name,
        missing="This picture was left out: the network is too large for it on this device. "
        "Rebuild the report on a machine with a GPU to see it.",
    )


def _first_of_each_class(y: Tensor, most: int) -> list[int]:
    """Return the positions of the first image of every class, in test order, at most `most`."""
    seen: dict[int, int] = {}
    for position, label in enumerate(y.tolist()):
        seen.setdefault(label, position)
    return sorted(seen.values())[:most]


def _worst_of_ball(model: nn.Module, centre: Tensor, threat: ThreatModel, state: Tensor) -> Tensor:
    """Ascend KL(p(centre) || p(b)) over the ball around `centre`.

    This is the search of the training with more steps.
    """
    with torch.no_grad():
        target = model(centre)
    ball = threat.around(centre)
    point = random_point(ball, state, stream=rng.LOCAL)
    alpha = 2.5 * threat.eps / _STEPS
    worst, _ = climb(model, ball, point, away_from(target), steps=_STEPS, alpha=alpha)
    return worst


def _orthogonal(noise: Tensor, direction: Tensor) -> Tensor:
    """Return unit vectors, one a sample, at right angles to `direction`."""
    flat, along = noise.flatten(1), direction.flatten(1)
    unit = F.normalize(along, dim=1)
    flat = flat - (flat * unit).sum(1, keepdim=True) * unit
    return F.normalize(flat, dim=1).view_as(noise)


def _rgb(image: Tensor) -> np.ndarray:
    """Turn [C, H, W] into [H, W, 3]; one channel becomes grey."""
    pixels = image.detach().cpu().float().permute(1, 2, 0).numpy()
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


def _perturbation(change: Tensor) -> np.ndarray:
    """Turn a perturbation [C, H, W] in [-1, 1] into an image [H, W, 3].

    One channel gets a diverging colour map; three channels lie around mid-grey.
    """
    if change.shape[0] == 1:
        return pictures.DIVERGING(0.5 + 0.5 * change[0].numpy())[..., :3]
    return _rgb(0.5 + 0.5 * change)
