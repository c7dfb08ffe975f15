"""The form of a step that is fastest on this device: `step.compile = "auto"`.

A long run times a few steps of each form before it begins. The fastest is remembered for the
device, the network, the shapes and the versions, in a file beside the cache of data sets.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import files
from ..data.datasets import data_root
from ..device import distributed
from ..device.distributed import World
from ..device.machine import device, environment
from ..errors import EngineError
from ..progress import stderr
from ..recipes import Recipe
from . import synthetic
from .build import ALONE, steps_per_epoch
from .images import facts

# A shorter run would spend a good part of its time on the search [s].
LONG = 600.0
_WARM_UP, _TIMED = 3, 5


@dataclass(frozen=True)
class Form:
    """Hold how a step runs.

    Attributes:
        compile: the network's passes go through torch.compile.
        search: cuDNN searches for each convolution's fastest algorithm (GPU only).
    """

    compile: bool = False
    search: bool = False

    @property
    def name(self) -> str:
        """The form in words."""
        compiled = "compiled" if self.compile else "not compiled"
        return compiled + (", cuDNN searching" if self.search else "")

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Let cuDNN search in the block, if the form says so."""
        cudnn = torch.backends.cudnn
        before, cudnn.benchmark = cudnn.benchmark, self.search or cudnn.benchmark
        try:
            yield
        finally:
            cudnn.benchmark = before


def choose(recipe: Recipe, world: World = ALONE) -> Form:
    """Return the form of the recipe's step.

    With `step.compile` on or off, that is the answer. With auto it is the remembered form, or the
    fastest of the forms as timed here. A run that takes less than `LONG` seconds is not compiled,
    and neither is a run of several processes without a remembered form.
    """
    if recipe.step.compile != "auto":
        return Form(compile=recipe.step.compile == "on")
    place, about = _place(), _about(recipe)
    known = _read(place).get(_key(about))
    # All processes must run alike.
    known = distributed.gather_objects(known)[0]
    if known is not None:
        form = Form(known["compile"], known["search"])
        _say(f"{form.name} (remembered from {known['time']})", known["milliseconds"])
        return form
    if world.size > 1:
        _say("not compiled: several processes time no forms, and none is remembered", {})
        return Form()
    plain = Form()
    milliseconds = {plain.name: _time(recipe, plain)}
    steps = recipe.optim.epochs * steps_per_epoch(recipe)
    if steps * milliseconds[plain.name] < 1e3 * LONG:
        _say(f"not compiled: the run takes less than {LONG:.0f} s", milliseconds)
        return plain
    forms = {plain.name: plain} | {form.name: form for form in _others(recipe)}
    for name, form in forms.items():
        if name not in milliseconds:
            with contextlib.suppress(RuntimeError, EngineError):
                milliseconds[name] = _time(recipe, form)
    best = forms[min(milliseconds, key=lambda name: milliseconds[name])]
    entry = {**asdict(best), "milliseconds": milliseconds, "about": about}
    _remember(place, _key(about), {**entry, "time": environment()["time"]})
    _say(best.name, milliseconds)
    return best


def remembered() -> list[str]:
    """Return a line for each remembered form."""
    lines = []
    for entry in _read(_place()).values():
        about, form = entry["about"], Form(entry["compile"], entry["search"])
        step = f"{about['device']}, {about['network']}, batch {about['batch']}"
        lines.append(f"{step}: {_told(form.name, entry['milliseconds'])}")
    return lines


def _others(recipe: Recipe) -> list[Form]:
    if device().type != "cuda" or recipe.step.deterministic:
        return [Form(compile=True)]
    return [Form(search=True), Form(compile=True), Form(compile=True, search=True)]


def _time(recipe: Recipe, form: Form) -> float:
    """Return the median time of a step on random images [ms]; compilation is not in it."""
    target = device()
    switched = replace(recipe, step=replace(recipe.step, compile="on" if form.compile else "off"))
    times = []
    with form.applied(), torch.random.fork_rng():
        step = synthetic.step(switched, target, steps=_WARM_UP + _TIMED)
        with contextlib.closing(step):
            batch = synthetic.batch(recipe, target)
            for _ in range(_WARM_UP + _TIMED):
                _wait(target)
                begin = time.perf_counter()
                step(batch)
                _wait(target)
                times.append(1e3 * (time.perf_counter() - begin))
    return sorted(times[_WARM_UP:])[_TIMED // 2]


def _wait(target: torch.device) -> None:
    if target.type == "cuda":
        torch.cuda.synchronize(target)


def _about(recipe: Recipe) -> dict[str, Any]:
    """Return what the fastest form depends on, as plain JSON values."""
    machine = environment()
    gpu = machine["gpu"]
    shape = facts(recipe).shape
    return {
        "device": gpu or f"{machine['cpu']}, {machine['threads']} threads",
        "versions": [machine["engine"], machine["torch"], torch.backends.cudnn.version()],
        "network": recipe.model.name,
        "width": recipe.model.width,
        "batch": "x".join(map(str, (recipe.optim.batch_size, *shape))),
        "step": repr((recipe.step, recipe.objective, recipe.attack, recipe.threat.norm)),
        "optimiser": recipe.optim.name,
    }


def _key(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def _place() -> Path:
    return data_root() / "cache" / "steps.json"


def _read(place: Path) -> dict[str, dict[str, Any]]:
    """Return the remembered forms by key; a file that is not one of ours holds none."""
    try:
        found = json.loads(files.read_text(place))
    except (EngineError, ValueError, RecursionError):
        return {}
    entries = found.items() if isinstance(found, dict) else ()
    return {key: entry for key, entry in entries if _is_whole(entry)}


def _is_whole(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and all(isinstance(entry.get(name), bool) for name in ("compile", "search"))
        and all(isinstance(entry.get(name), dict) for name in ("milliseconds", "about"))
        and isinstance(entry.get("time"), str)
        and all(name in entry["about"] for name in ("device", "network", "batch"))
        and all(isinstance(ms, float) for ms in entry["milliseconds"].values())
    )


def _remember(place: Path, key: str, entry: dict[str, Any]) -> None:
    """Add an entry. A folder that cannot be written costs the memory and nothing else."""
    with contextlib.suppress(EngineError, OSError):
        files.make_folder(place.parent)
        files.write_json(place, _read(place) | {key: entry})


def _told(choice: str, milliseconds: dict[str, float]) -> str:
    times = ", ".join(f"{name} {ms:.3g} ms a step" for name, ms in milliseconds.items())
    return f"{choice}; timed: {times}" if times else choice


def _say(choice: str, milliseconds: dict[str, float]) -> None:
    stderr.print(
        f"step.compile = auto: {_told(choice, milliseconds)}", highlight=False, soft_wrap=True
    )
