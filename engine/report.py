"""The report of a run: one HTML page that needs nothing beside it, and the same pictures as PNGs."""

from __future__ import annotations

import base64
import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from markupsafe import Markup
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from . import evaluation, files, kernels, plots, rng, runner
from . import recipe as recipes
from .adversary import Attack, away_from, climb
from .data import datasets
from .errors import EngineError
from .plots import Example, Surface, Sweep, Tile
from .recipe import Recipe
from .runs import Run
from .threat import ThreatModel, as_written

_STEPS = 20
_SWEEP_EXAMPLES = 256
_SWEEP_RADII = 10
_GRID_EXAMPLES = 8
_SURFACE_EXAMPLES = 32
_SURFACE_POINTS = 33
_SURFACE_REACH = 2.0
# Floating-point operations that a picture may take, some ten seconds; what needs more is left out.
_BUDGET = {"cpu": 5e11, "cuda": 3e14}


def build(run: Run) -> Path:
    """Write `report.html` and `pictures/*.png` from what lies in the run folder; returns the page's path.

    What cannot be shown (no evaluation yet, no checkpoint, no test images on this machine) is
    replaced by a sentence that says why, and its old picture goes.

    Raises:
        EngineError: for files that are damaged or not a run's, or a folder that cannot be written.
    """
    try:
        return _build(run)
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        ArithmeticError,
        jinja2.UndefinedError,
    ) as error:
        # Only a stranger's or a damaged folder gets here: what the engine writes it can read.
        what = str(error).split("\n")[0]
        raise EngineError(
            f"{run.path}: its files are not what a run writes ({type(error).__name__}: {what})"
        ) from error


def _build(run: Run) -> Path:
    rows, found = run.metrics(), run.read_json("evaluation.json")
    summary, environment = run.read_json("summary.json"), run.read_json("environment.json")
    best = summary.get("best_epoch") or _best_epoch(rows)
    with plots.style():
        views = [
            _curves(run.recipe, rows, best),
            *_views_of_model(run, found),
        ]
        for view in views:
            _save(view, run.path / "pictures" / f"{view.name}.png")
    context = {
        "recipe": run.recipe,
        "folder": run.path.name,
        "best": best,
        "headline": _headline(run.recipe),
        "numbers": _numbers(found),
        "facts": _facts(run.recipe, rows, summary, best),
        "cascade": _cascade(found),
        "evaluation": found,
        "masking": run.read_json("masking.json"),
        "worst_case": _worst_case(found),
        "views": {view.name: view for view in views},
        "first_fields": _first_fields(run.recipe),
        "all_fields": _all_fields(run.recipe),
        "environment": {k: v for k, v in environment.items() if v is not None},
        "radius": as_written,
    }
    page = run.path / "report.html"
    files.write_text(page, render("report", **context))
    return page


@dataclass
class View:
    """A picture of the report, or why there is none.

    Attributes:
        name: of the PNG and in the template.
        png: the figure to save.
        charts: its parts as inline SVG.
        examples: of the grid, which the page lays out by itself.
        about: numbers for the caption.
        missing: a sentence in place of the picture.
    """

    name: str
    png: Figure | None = None
    charts: list[Markup] = field(default_factory=list)
    examples: Sequence[Example] = ()
    about: dict[str, Any] = field(default_factory=dict)
    missing: str = ""


def _save(view: View, path: Path) -> None:
    if view.png is not None:
        plots.save_png(view.png, path)
        return
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise EngineError(f"cannot remove {path}: {error.strerror}") from error


def render(name: str, **context: Any) -> str:
    """A page from `templates/NAME.html.j2`, in the project's colours."""
    folder = resources.files("engine").joinpath("templates")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=jinja2.FunctionLoader(lambda part: folder.joinpath(part).read_text("utf-8")),
    )
    environment.filters |= {"seconds": _seconds, "percent": _percent, "image": _data_uri}
    colours = {
        "light": Markup(plots.css_variables()),
        "dark": Markup(plots.css_variables(dark=True)),
    }
    page = environment.get_template(f"{name}.html.j2").render(**colours, **context)
    return page.strip() + "\n"


# ---- pictures ----------------------------------------------------------------------------------


def _curves(recipe: Recipe, rows: list[dict[str, Any]], best: int | None) -> View:
    if not rows:
        return View("curves", missing="No epoch has been logged, so there is no curve to show.")
    weights = {
        term: getattr(recipe.objective, f"{term}_weight", 1.0) for term in ("local", "global")
    }
    figure, axes = plots.panels(2, height=3.8)
    charts = []
    for number, ax in enumerate(axes):
        alone, (own,) = plots.panels(height=3.8)
        for target in (ax, own):
            if number == 0:
                plots.draw_accuracy(target, rows, best)
            else:
                plots.draw_losses(target, rows, best, weights)
        charts.append(Markup(plots.svg(alone, f"curves{number}")))
    return View("curves", figure, charts)


def _views_of_model(run: Run, found: Mapping[str, Any]) -> list[View]:
    names = ("eps", "grid", "surface")
    checkpoint = found.get("checkpoint", "best")
    if not (run.path / f"{checkpoint}.safetensors").is_file():
        reason = (
            f"The run has no checkpoint {checkpoint}.safetensors yet, so this picture is missing."
        )
        return [View(name, missing=reason) for name in names]
    try:
        model = runner.load_model(run, checkpoint)
        x, y = runner.test_set(run.recipe)
        classes = datasets.info(run.recipe.data.name).classes
    except EngineError as error:
        reason = f"This picture is missing: {error}.".replace("`", "")
        return [View(name, missing=reason) for name in names]
    if run.recipe.threat.eps == 0:
        reason = "The recipe's eps is 0: there is no threat ball to show."
        return [View(name, missing=reason) for name in names]
    with evaluation.evaluation_mode(model), _one_thread():
        return [
            _eps(run.recipe, model, x, y, found),
            _grid(run.recipe, model, x, y, classes),
            _surface(run.recipe, model, x, y),
        ]


def _eps(recipe: Recipe, model: nn.Module, x: Tensor, y: Tensor, found: Mapping[str, Any]) -> View:
    passes = 2 * _STEPS * (_SWEEP_RADII - 1)
    count = min(_SWEEP_EXAMPLES, len(x), _affordable(model, x, passes))
    if count < min(32, len(x)):
        return _too_slow("eps")
    radii = np.linspace(0.0, 3.0 * recipe.threat.eps, _SWEEP_RADII)
    accuracy = []
    for eps in radii:
        threat = ThreatModel(recipe.threat.norm, float(eps))
        robust = evaluation.pgd(
            model, x[:count], y[:count], threat, steps=_STEPS, restarts=1, seed=recipe.seed
        )
        accuracy.append(float(robust.double().mean()))
    sweep = Sweep(radii, np.array(accuracy), count, recipe.threat.eps)
    others = {
        f"{label}, {found['examples']} images": float(found[key]) / 100
        for key, label in (("pgd_acc", found.get("pgd")), ("autoattack_acc", "AutoAttack"))
        if found.get(key) is not None
    }

    figure, (ax,) = plots.panels()
    plots.draw_sweep(ax, sweep, others, recipe.threat.norm)

    about = {"examples": count, "last": accuracy[-1], "steps": _STEPS}
    return View("eps", figure, [Markup(plots.svg(figure, "eps"))], about=about)


def _grid(recipe: Recipe, model: nn.Module, x: Tensor, y: Tensor, classes: Sequence[str]) -> View:
    chosen = _first_of_each_class(y, _GRID_EXAMPLES)
    x, y, threat = x[chosen], y[chosen], recipe.threat
    state = rng.state(recipe.seed, x.device)
    adversary, _ = Attack(steps=_STEPS)(model, x, y, threat, state=state)
    rho = getattr(recipe.objective, "rho", 0.5)
    ball = _worst_of_ball(model, adversary, ThreatModel(threat.norm, rho * threat.eps), state)
    delta = adversary - x
    # Linf perturbations share one scale, L2 ones have each their own.
    reach = (
        torch.full((len(x),), threat.eps)
        if threat.norm == "Linf"
        else delta.abs().flatten(1).amax(1).cpu().clamp(min=1e-12)
    )
    columns = (("clean", x), ("adversary", adversary), ("local ball", ball))
    with torch.no_grad():
        said = [F.softmax(model(images), dim=1).cpu().max(dim=1) for _, images in columns]
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
            for (title, images), guess in zip(columns, said, strict=True)
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
    return View("grid", plots.examples_figure(examples), examples=examples, about=about)


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
    plots.draw_relief(both, surface, 121)
    plots.draw_plane(both.add_subplot(122), surface, norm)
    both.subplots_adjust(left=0.02, right=0.95, top=0.88, bottom=0.12, wspace=0.12)
    plots.draw_relief(alone, surface)
    alone.subplots_adjust(left=0.0, right=0.97, top=0.9, bottom=0.06)
    above, (ax,) = plots.panels(height=4.0)
    plots.draw_plane(ax, surface, norm)
    charts = [Markup(plots.svg(alone, "relief")), Markup(plots.svg(above, "plane"))]
    return View("surface", both, charts, about={"examples": count, "crossed": surface.crossed})


def _affordable(model: nn.Module, x: Tensor, passes: int) -> int:
    """How many images can have `passes` passes each (forward, or input gradient) within the budget.

    Counted, not timed: the same run gives the same report on a busy machine.
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
    """One CPU thread in the block: these batches are too small to gain from more, and threads that
    wait for each other on a busy machine cost many times the work."""
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
    """Positions of the first image of every class, in test order; at most `most`."""
    seen: dict[int, int] = {}
    for position, label in enumerate(y.tolist()):
        seen.setdefault(label, position)
    return sorted(seen.values())[:most]


def _worst_of_ball(model: nn.Module, centre: Tensor, ball: ThreatModel, state: Tensor) -> Tensor:
    """Ascent on KL(p(centre) || p(b)) over the ball around `centre`: the training's search, with more steps."""
    with torch.no_grad():
        target = model(centre)
    point = kernels.uniform_start(centre, ball.eps, state, norm=ball.norm, stream=rng.LOCAL)
    worst, _ = climb(
        model,
        centre,
        point,
        away_from(target),
        steps=_STEPS,
        eps=ball.eps,
        alpha=2.5 * ball.eps / _STEPS,
        norm=ball.norm,
    )
    return worst


def _orthogonal(noise: Tensor, direction: Tensor) -> Tensor:
    """Unit vectors, one a sample, at right angles to `direction`."""
    flat, along = noise.flatten(1), direction.flatten(1)
    unit = F.normalize(along, dim=1)
    flat = flat - (flat * unit).sum(1, keepdim=True) * unit
    return F.normalize(flat, dim=1).view_as(noise)


def _rgb(image: Tensor) -> np.ndarray:
    """[C, H, W] as [H, W, 3]; one channel is grey."""
    pixels = image.detach().cpu().float().permute(1, 2, 0).numpy()
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels


def _perturbation(change: Tensor) -> np.ndarray:
    """[C, H, W] in [-1, 1] as [H, W, 3]: one channel by a diverging map, three around mid-grey."""
    if change.shape[0] == 1:
        return plots.DIVERGING(0.5 + 0.5 * change[0].numpy())[..., :3]
    return _rgb(0.5 + 0.5 * change)


def _data_uri(pixels: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(plots.png_of(pixels)).decode()


# ---- words and numbers -------------------------------------------------------------------------


def _best_epoch(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """The epoch that the trainer would have kept: the last of the highest validation PGD accuracies."""
    validated = [r for r in rows if "val_pgd" in r]
    return max(validated, key=lambda r: (r["val_pgd"], r["epoch"]))["epoch"] if validated else None


def _headline(recipe: Recipe) -> str:
    attack, objective = recipe.attack, recipe.objective
    weights = {
        "k": attack.steps,
        "λ": getattr(objective, "local_weight", None),
        "μ": getattr(objective, "global_weight", None),
        "ρ": getattr(objective, "rho", None),
    }
    # No-break spaces keep a name and its value on one line.
    options = [f"{k}\u00a0=\u00a0{v:g}" for k, v in weights.items() if v is not None]
    if share := _balls_share(objective):
        options.append(f"balls {share}")
    epochs = f"{recipe.optim.epochs} epoch{'s' * (recipe.optim.epochs != 1)}"
    start = " started from the adversary memory" if attack.start == "memory" else ""
    return (
        f"{recipe.model.name} on {recipe.data.name}, {epochs} of {objective.name} training "
        f"({', '.join(options)}{start}) against {recipe.threat.norm} perturbations "
        f"of at most {as_written(recipe.threat.eps)}."
    )


def _balls_share(objective: Any) -> str:
    """What part of a batch gets local balls; "" for all of it or where there are none."""
    share = getattr(objective, "local_share", 1.0)
    return f"for {share:g} of each batch" if share < 1 else ""


def _numbers(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The three big numbers; a value of None has not been measured."""
    version = found.get("autoattack_version")
    shown = (
        ("clean", "Clean accuracy", "clean_acc", "test images as they are"),
        ("pgd", "PGD accuracy", "pgd_acc", _pgd_words(found.get("pgd"))),
        (
            "autoattack",
            "AutoAttack accuracy",
            "autoattack_acc",
            "its two APGD attacks only" if version == "apgd" else "standard: four attacks",
        ),
    )
    numbers = []
    for name, title, key, how in shown:
        value = None if found.get(key) is None else float(found[key]) / 100
        error = None
        if value is not None:
            error = math.sqrt(value * (1 - value) / max(int(found["examples"]), 1))
        numbers.append({"name": name, "title": title, "value": value, "error": error, "how": how})
    return numbers


def _pgd_words(name: str | None) -> str:
    """`PGD-50-10` in words."""
    if name is None:
        return "with restarts"
    _, steps, restarts = name.split("-")
    return f"{steps} steps, {restarts} restart{'s' * (restarts != '1')}"


def _worst_case(found: Mapping[str, Any]) -> float | None:
    """Share that withstood every attack, where it says more than either alone."""
    worst = found.get("worst_case_acc")
    if worst in (None, found.get("autoattack_acc"), found.get("pgd_acc")):
        return None
    return float(worst) / 100


def _facts(
    recipe: Recipe,
    rows: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    best: int | None,
) -> list[tuple[str, str, str]]:
    """(value, what it is, how it was measured)."""
    seconds = summary.get("train_seconds", rows[-1].get("train_seconds") if rows else None)
    facts = []
    if seconds is not None:
        facts.append((_seconds(seconds), "training time", "steps and data, evaluation excluded"))
    passes = recipe.objective.passes(recipe.attack)
    parts = f"{passes.forward:g} forward, {passes.input_grad:g} input, {passes.weight_grad:g} weight gradient"
    facts.append((str(passes.total), "passes a step", parts))
    if rows and "images_per_second" in rows[-1]:
        rate = sum(r["images_per_second"] for r in rows) / len(rows)
        facts.append((f"{rate:,.0f}", "images a second", "mean over the epochs"))
    if best is not None:
        facts.append(
            (f"{best} of {recipe.optim.epochs}", "best epoch", "by validation PGD accuracy")
        )
    return facts


def _cascade(found: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Accuracy in percent: clean, then after each of AutoAttack's attacks."""
    after = found.get("after_each_attack") or {}
    if not after:
        return []
    names = {"apgd-ce": "APGD, cross-entropy", "apgd-t": "APGD, targeted", "fab-t": "FAB, targeted"}
    stages = [("no attack", float(found["clean_acc"]))]
    stages += [(f"+ {names.get(k, k.capitalize())}", float(v)) for k, v in after.items()]
    return stages


def _first_fields(recipe: Recipe) -> list[tuple[str, str]]:
    """What a reader asks for first."""
    attack, optim, objective = recipe.attack, recipe.optim, recipe.objective
    start = "its last adversary (memory)" if attack.start == "memory" else "a random point"
    alpha = as_written(attack.step_size(recipe.threat.eps))
    fields = [
        ("Data", f"{recipe.data.name}{_augmentation(recipe)}"),
        ("Network", recipe.model.name),
        ("Threat", f"{recipe.threat.norm}, eps {as_written(recipe.threat.eps)}"),
        ("Attack in training", f"{attack.steps} steps of {alpha}, from {start}"),
        ("Objective", objective.name),
    ]
    for name, symbol in (("local_weight", "λ"), ("global_weight", "μ"), ("rho", "ρ")):
        if hasattr(objective, name):
            fields.append(
                (
                    f"{name.replace('_', ' ').capitalize()} {symbol}",
                    _shown(getattr(objective, name)),
                )
            )
    if share := _balls_share(objective):
        fields.append(("Local balls", share))
    average = f", averaged weights ({optim.ema:g})" if optim.ema else ""
    fields += [
        ("Optimiser", f"{optim.name}, {recipe.schedule.name} to {optim.lr:g}{average}"),
        ("Length", f"{optim.epochs} epochs, batches of {optim.batch_size}"),
        ("Seed", str(recipe.seed)),
    ]
    return fields


def _augmentation(recipe: Recipe) -> str:
    done = [f"crops after padding by {recipe.data.pad}"] if recipe.data.pad else []
    done += ["mirrored"] if recipe.data.flip else []
    return f" ({', '.join(done)})" if done else ""


def _all_fields(recipe: Recipe) -> list[dict[str, Any]]:
    """Every field: name, value, whether it differs from the default, description."""
    fields = []
    for name, _, default, description in recipes.options(type(recipe.objective)):
        value: Any = recipe
        for part in name.split("."):
            value = getattr(value, part)
        fields.append(
            {
                "name": name,
                "value": _shown(value),
                "changed": value != default,
                "description": description,
            }
        )
    return fields


def _shown(value: Any) -> str:
    if value is None:
        return "left out"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(_shown(v) for v in value) if isinstance(value, tuple) else str(value)


def _seconds(value: float) -> str:
    if value < 100:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"
