"""Time whole training steps against the bare network passes they need, and against rival loops.

All calls on one network are timed in one run, in turn. `bare` is exactly the forward passes, input
gradients and weight gradients that an objective declares, by plain autograd on the same network in
the same layout: no attack, no loss, no optimiser. Everything is in float32 and on the device that
`engine train` would take.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import PGD, TRADES, AdversaryMemory, Attack, LocalBall, Schedule, models
from engine.data.loaders import Batch, ResidentLoader
from engine.device import machine, precision
from engine.device.capture import CudaGraphs, unavailable
from engine.models import compiled
from engine.objectives import Objective, Passes
from engine.performance import timing
from engine.threat import Linf
from engine.training.optimiser import Optimiser
from engine.training.step import Step

from . import clones, rivals

EPS = 0.1
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Method:
    """Hold one objective with its attack."""

    label: str
    objective: Objective
    attack: Attack


def _method(label: str, objective: Objective, k: int, start: str = "random") -> Method:
    return Method(label, objective, Attack(steps=k, start=start))  # type: ignore[arg-type]


_CHEAP = LocalBall(direction="ce", local_weight=1.0, rho=0.25)
PGD10, TRADES10 = _method("pgd", PGD(), 10), _method("trades", TRADES(), 10)
METHODS = [
    _method("local-ball, ce, memory", _CHEAP, 1, "memory"),
    _method("local-ball, ce, memory", _CHEAP, 2, "memory"),
    _method("local-ball, kl", LocalBall(), 2),
    _method("pgd, memory", PGD(), 1, "memory"),
    _method("pgd, memory", PGD(), 2, "memory"),
    PGD10,
    TRADES10,
]


# The method that each clone trains by.
CLONED = {"fast_adversarial": PGD10, "trades": TRADES10}


@dataclass(frozen=True)
class Setting:
    """Hold a network, a batch, and the methods to time on it."""

    network: str
    shape: tuple[int, int, int, int]
    methods: list[Method]
    packages: bool  # also time the packages from PyPI and torch.compile
    loops: bool  # also time the well-known loops
    seconds: float


def settings(quick: bool) -> list[Setting]:
    mnist, small = (256, 1, 28, 28), (128, 1, 28, 28)
    first = Setting("fast-at-mnist", mnist, METHODS, True, True, 26.0 if quick else 90.0)
    if quick:
        return [
            first,
            Setting("small-cnn", small, [METHODS[1], PGD10], False, True, 16.0),
            Setting("preact-resnet18", (16, 3, 32, 32), [METHODS[0]], False, False, 12.0),
        ]
    return [
        first,
        Setting("small-cnn", small, METHODS, False, True, 120.0),
        Setting("preact-resnet18", (32, 3, 32, 32), METHODS[:2], False, False, 120.0),
    ]


def network(setting: Setting, *, ours: bool = True) -> nn.Module:
    """Build a fresh network on the device.

    Ours are channels_last, as recipes build them; the rivals' have the default layout.
    """
    torch.manual_seed(0)
    _, channels, size, _ = setting.shape
    built = models.build(setting.network, in_channels=channels, image_size=size, classes=10)
    built = built.to(machine.device())
    return built.to(memory_format=torch.channels_last) if ours else rivals.plain(built)  # type: ignore[call-overload]


def our_step(
    setting: Setting, method: Method, *, compile: bool = False, captured: bool = False
) -> Callable[[], None]:
    """Return a whole step of ours: loader, attack, loss, optimiser, average, memory."""
    step, loader = built_step(setting, method, compile=compile, captured=captured)

    def call() -> None:
        if step.done % len(loader) == 0:
            loader.begin(step.done // len(loader))
        step()

    return call


def built_step(
    setting: Setting, method: Method, *, compile: bool = False, captured: bool = False
) -> tuple[Step, ResidentLoader]:
    """Return a step that makes its batches itself, as in training, and its loader."""
    data, labels = _data(setting)
    images, device = (data * 255).to(torch.uint8), data.device
    memory = None
    if method.attack.start == "memory":
        memory = AdversaryMemory(len(images), images.shape[1:], Linf(EPS), device=device)
    loader = ResidentLoader(images, labels, setting.shape[0], device=device, memory=memory)
    model = network(setting)
    model.train()
    steps = 1_000  # length of the schedule: more steps than `side_by_side` takes samples
    step = Step(
        model,
        objective=method.objective,
        threat=Linf(EPS),
        attack=method.attack,
        optimiser=Optimiser(
            model,
            lr=Schedule(name="piecewise", milestones=()).rates(rivals.LR, steps),
            momentum=rivals.MOMENTUM,
            weight_decay=rivals.WEIGHT_DECAY,
            ema=0.999,
        ),
        memory=memory,
        take=loader.take,
        device=device,
        compile=compile,
        recorder=CudaGraphs(device) if captured else None,
    )
    return step, loader


def bare_passes(model: nn.Module, x: Tensor, passes: Passes) -> Callable[[], None]:
    """Return a call of the bare passes of one step, on `x`, by plain autograd."""
    parameters = list(model.parameters())
    counts = (passes.weight_grad, passes.forward, passes.input_grad)
    trained, forwards, inputs = (int(count) for count in counts)
    if (trained, forwards, inputs) != counts:
        raise ValueError(f"cannot run passes of a part of the batch: {passes}")
    forwards, inputs = forwards - trained, inputs - trained
    seed = torch.randn_like(model(x))
    attacks = min(forwards, inputs)

    def run() -> None:
        model.eval()
        for _ in range(attacks):
            point = x.detach().requires_grad_()
            torch.autograd.grad(model(point), point, seed)
        with torch.no_grad():
            for _ in range(forwards - attacks):
                model(x)
        model.train()
        for number in range(trained):
            # This input gradient shares its forward pass with the loss.
            shared = number < inputs - attacks
            point = x.detach().requires_grad_(shared)
            logits = model(point)
            if shared:
                torch.autograd.grad(logits, point, seed, retain_graph=True)
            torch.autograd.grad(logits, parameters, seed)

    return run


def _data(setting: Setting) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    n, device = 4 * setting.shape[0], machine.device()
    x = torch.rand((n, *setting.shape[1:]), generator=draw)
    return x.to(device), torch.randint(0, 10, (n,), generator=draw).to(device)


_SAME_UPDATE = 0.05


def agrees(loop: Callable[..., rivals.Step], method: Method) -> bool:
    """Tell whether one step of a rival's loop and one of ours give the same weights.

    Both start from the same weights and the same attack start, on the Fast-AT network: it has no
    BatchNorm, whose mode differs between the loops. Class 0 stays right whatever the attack does,
    as some attacks skip images that are wrong already. The attack takes three steps, and each of
    them matters: the last of TRADES's ten moves the update by 2 % only.
    """
    method = replace(method, attack=replace(method.attack, steps=3, alpha=EPS / 4))
    setting = Setting("fast-at-mnist", (64, 1, 28, 28), [method], False, False, 0.0)
    x, y = (t[:64] for t in _data(setting))
    draw = torch.Generator().manual_seed(2)
    noise = 0.05 * torch.rand(x.shape, generator=draw)
    start = (x + noise.to(x.device)).clamp(0.0, 1.0)
    rival, ours = network(setting, ours=False), network(setting)
    y = torch.zeros_like(y)
    for net in (rival, ours):
        _answer_first_class(net, spread=20.0)
    before = torch.cat([p.detach().flatten() for p in ours.parameters()])
    alpha = method.attack.step_size(EPS)
    loop(rival, EPS, alpha, method.attack.steps)(x, y, start)
    ours.train()
    step = Step(
        ours,
        objective=method.objective,
        threat=Linf(EPS),
        attack=method.attack,
        optimiser=Optimiser(
            ours, lr=[rivals.LR], momentum=rivals.MOMENTUM, weight_decay=rivals.WEIGHT_DECAY
        ),
        device=x.device,
    )
    step(Batch(x, y, start=start))
    # Rounding may flip the sign of a gradient near zero, and some pixels then differ.
    one, other = (
        torch.cat([p.detach().flatten() for p in net.parameters()]) - before
        for net in (ours, rival)
    )
    return bool((one - other).norm() < _SAME_UPDATE * other.norm())


def _answer_first_class(net: nn.Module, spread: float = 1.0) -> None:
    """Make class 0 win for every image; the other logits are `spread` times as far apart."""
    last = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        last.weight.mul_(spread)
        last.bias[0] += 8.0


# ---- running ---------------------------------------------------------------------------------


def run(quick: bool, cloned: Mapping[str, Path] | None = None) -> list[dict[str, Any]]:
    """Time every setting.

    Args:
        quick: fewer methods and samples; under two minutes without clones.
        cloned: folders by the names of `clones.HOMES`; code in them is executed.
    Returns:
        One row per network, method and mode: network, batch, objective, k, mode, p20_ms, p50_ms,
            p80_ms, passes, overhead_vs_passes (the step over its bare passes), speedup_vs (by
            rival; absent or disagreeing rivals are left out), share_of_pgd10 (of our PGD-10 step),
            note. Ratios are medians over rounds in which both sides were timed.
    Raises:
        EngineError: for a folder that is no such clone, before the first timing; or if its code
            fails.
    """
    clones_of = [(setting, _cloned(setting, cloned or {})) for setting in settings(quick)]
    # By default PyTorch uses tf32 in the rivals' convolutions on a GPU.
    with precision.arithmetic("fp32", machine.device()):
        return [row for setting, own in clones_of for row in _measure(setting, own)]


def _cloned(setting: Setting, folders: Mapping[str, Path]) -> list[tuple[clones.Clone, Method]]:
    """Return the clones with an opponent in a setting.

    PGD-10 opposes every method but TRADES.
    """
    return [
        (clones.load(name, folder, setting.shape[1]), CLONED[name])
        for name, folder in folders.items()
        if any((method is TRADES10) == (name == "trades") for method in setting.methods)
    ]


def _measure(setting: Setting, cloned: list[tuple[clones.Clone, Method]]) -> list[dict[str, Any]]:
    device = machine.device()
    x, y = (t[: setting.shape[0]] for t in _data(setting))
    calls: dict[str, Callable[[], object]] = {}
    for method in setting.methods:
        key = _key(method)
        calls[f"ours {key}"] = our_step(setting, method)
        passes = method.objective.passes(method.attack)
        calls[f"bare {key}"] = bare_passes(rivals.plain(network(setting)), x, passes)
        if unavailable(device) is None:
            calls[f"captured {key}"] = our_step(setting, method, captured=True)
    notes: list[str] = []
    if setting.packages:
        if missing := compiled.unavailable(device):
            notes.append(f"not compiled: {missing}")
        else:
            calls[f"compiled {_key(PGD10)}"] = our_step(setting, PGD10, compile=True)
    for name, step in _rivals(setting, notes):
        calls[name] = _bind(step, x, y)
    for clone, method in cloned:
        notes.append(clone.note)
        if agrees(clone.loop, method):
            net = network(setting, ours=False)
            # Without this an attack that stops at wrong images would be timed at fewer steps.
            _answer_first_class(net)
            alpha = method.attack.step_size(EPS)
            step = clone.loop(net, EPS, alpha, method.attack.steps)
            calls[clone.label] = _bind(step, x, torch.zeros_like(y))
        else:
            notes.append(
                f"{clone.label} disagrees with our step, or draws its start in an unknown way: "
                "no ratio"
            )
    times = timing.side_by_side(calls, device=device, seconds=setting.seconds, sample_ms=0.0)
    rows = []
    for method in setting.methods:
        key = _key(method)
        for mode, call in (("eager", "ours"), ("compiled", "compiled"), ("captured", "captured")):
            if f"{call} {key}" not in times:
                continue
            t = times[f"{call} {key}"]
            against = {
                name: round(times[name].over(t), 3) for name in _opponents(method) if name in times
            }
            own = times.get(f"ours {_key(PGD10)}")
            rows.append(
                {
                    "network": setting.network,
                    "batch": "x".join(map(str, setting.shape)),
                    "objective": method.label,
                    "k": method.attack.steps,
                    "mode": mode,
                    "p20_ms": round(t.p20, 3),
                    "p50_ms": round(t.p50, 3),
                    "p80_ms": round(t.p80, 3),
                    "passes": method.objective.passes(method.attack).total,
                    "overhead_vs_passes": round(t.over(times[f"bare {key}"]), 3),
                    "speedup_vs": against,
                    "share_of_pgd10": None if own is None else round(t.over(own), 3),
                    "note": "; ".join(notes),
                }
            )
    return rows


def _rivals(setting: Setting, notes: list[str]) -> list[tuple[str, rivals.Step]]:
    """Return the opponents of a setting that are installed and agree with our step."""
    loops: list[tuple[str, rivals.Step]] = []
    alpha = PGD10.attack.step_size(EPS)
    if setting.loops:
        for name, loop, method in (
            ("fast_adversarial-style", rivals.fast_adversarial, PGD10),
            ("TRADES-style", rivals.trades, TRADES10),
        ):
            if not any(m is method for m in setting.methods):
                continue
            if agrees(loop, method):
                loops.append((name, loop(network(setting, ours=False), EPS, alpha, 10)))
            else:
                notes.append(f"{name} disagrees with our step: no ratio")
    if setting.packages:
        if compiled.unavailable(machine.device()) is None:
            net: Any = torch.compile(network(setting, ours=False))
            loops.append(("torch.compile of it", rivals.fast_adversarial(net, EPS, alpha, 10)))
        for name, make in (
            ("torchattacks", lambda net: rivals.torchattacks_pgd(net, EPS, alpha, 10)),
            ("foolbox", lambda net: rivals.foolbox_pgd(net, EPS, alpha, 10)),
            ("toolbox", lambda net: rivals.toolbox(net, EPS, alpha, 10, setting.shape, 10)),
        ):
            try:
                loops.append((name, make(network(setting, ours=False))))
            except ImportError as error:
                notes.append(f"{name} is not there ({error}): see `make rivals`")
    return loops


def _opponents(method: Method) -> tuple[str, ...]:
    if method is TRADES10:
        return ("TRADES-style", "TRADES (clone)")
    return (
        "fast_adversarial-style",
        "torch.compile of it",
        "torchattacks",
        "foolbox",
        "toolbox",
        "fast_adversarial (clone)",
    )


def _bind(step: rivals.Step, x: Tensor, y: Tensor) -> Callable[[], object]:
    return lambda: step(x, y)


def _key(method: Method) -> str:
    return f"{method.label} k={method.attack.steps}"
