"""The Python interface: train, attack and evaluate any module on any images."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from . import rng
from .adversary.attack import Attack
from .adversary.inputs import check_device, check_network, check_pair, device_of, ready
from .adversary.memory import AdversaryMemory
from .data import arrays
from .data.loaders import Loader, ResidentLoader, TensorLoader
from .device.capture import CudaGraphs, unavailable
from .device.precision import Precision, arithmetic
from .errors import EngineError
from .evaluation.autoattack import ensemble
from .evaluation.autoattack.verdict import Verdict
from .evaluation.robust_accuracy import Report, evaluate, evaluation_mode
from .objectives import LocalBall, Objective
from .recipes.fields import Data, Optim, StepOptions
from .recipes.reading import complaint
from .registers import optimisers
from .text import shown
from .threat import ThreatModel, check_pixels, check_threat
from .training.optimiser import Optimiser
from .training.perturbation import Perturbation
from .training.schedule import Schedule
from .training.step import Step
from .training.trainer import Hooks, Result, Trainer

_CPU = torch.device("cpu")

__all__ = ["Report", "Verdict", "attack", "autoattack", "evaluate", "train"]


@torch.enable_grad()
def train(
    model: nn.Module,
    data: tuple[Tensor, Tensor] | tuple[np.ndarray, np.ndarray] | Iterable,
    threat: ThreatModel,
    *,
    attack: Attack | None = None,
    objective: Objective | None = None,
    epochs: int = 10,
    batch_size: int = 128,
    lr: float = 0.05,
    optimiser: str = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    ema: float = 0.0,
    schedule: Schedule | None = None,
    validation: tuple[Tensor, Tensor] | None = None,
    pad: int = 0,
    flip: bool = False,
    cutmix: bool = False,
    erase: float = 0.0,
    jitter: float = 0.0,
    extra: tuple[Tensor, Tensor] | tuple[np.ndarray, np.ndarray] | None = None,
    extra_share: float = 0.7,
    perturb: float = 0.0,
    precision: Precision = "auto",
    seed: int = 0,
    hooks: Hooks | None = None,
) -> Result:
    """Train `model` in place, on its own device.

    Args:
        model: any module from images in [0, 1] to logits [B, K], normalisation inside.
        data: (images, labels), tensors or NumPy arrays: images uint8 [N, C, H, W] or float32
            [N, ...] in [0, 1], labels int64 [N]; or an iterable with a length that yields such
            (x, y) batches, such as a DataLoader. An iterable sets batch size, crops and mirroring.
        threat: the threat to train against.
        attack: default two steps from a random start. A start from memory needs (images, labels).
        objective: default `LocalBall()`.
        epochs: passes over the data, >= 1.
        batch_size: images a step, >= 1.
        lr: peak learning rate, > 0.
        optimiser: "sgd", "adamw" (fused with the average), "torch-sgd", "torch-adamw", or apex's
            if apex is built.
        momentum: of SGD, in [0, 1).
        weight_decay: >= 0.
        ema: decay of the weights' moving average, in [0, 1); 0: no average.
        schedule: course of the learning rate and of eps over the run, default one cycle at constant
            eps.
        validation: held-out (x, y), floats in [0, 1], to choose `Result.best`.
        pad, flip, cutmix, erase, jitter: changes of uint8 images, see `kernels.augment`; cutmix
            needs an attack from a random start.
        extra: more images and labels, like `data`, in `extra_share` of every batch (0..1).
        perturb: gamma of adversarial weight perturbation, in [0, 1); 0: none. Not with apex's
            optimisers.
        precision: of the network's passes: "fp32", "tf32", "bf16", "fp16", or "auto" (bf16 on GPUs
            that have it).
        seed: of batches, crops, attacks and dropout.
        hooks: functions to call during the run.
    Returns:
        The trained network (its moving average with `ema` > 0) and the best epoch's state dict.
    Raises:
        EngineError: for data that does not fit, images that are not in [0, 1] or not finite (a
            loader's first batch), a network that cannot be attacked, an argument out of its range,
            or a loss that is no longer finite.
    """
    device = device_of(model)
    if device is None or not any(p.requires_grad for p in model.parameters()):
        raise EngineError("the model has no parameters to train")
    check_threat(threat)
    _check_optimiser(optimiser, perturb)
    rates = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "ema": ema}
    _check_ranges(Optim, **rates, epochs=epochs, batch_size=batch_size)
    _check_ranges(Data, pad=pad, erase=erase, jitter=jitter)
    _check_ranges(StepOptions, precision=precision)
    attack, objective = attack or Attack(), objective or LocalBall()
    schedule = schedule or Schedule()
    for given, kind in ((attack, Attack), (objective, Objective), (schedule, Schedule)):
        if not isinstance(given, kind):
            name = kind.__name__
            raise EngineError(f"{name.lower()} must be an engine.{name}, got {shown(given)}")
    if validation is not None:
        validation = arrays.pair(validation, device) or validation
        check_pair(*validation)
        check_pixels(validation[0])
        _check_attacked(model, *validation, device)
    torch.manual_seed(seed)
    memory: AdversaryMemory | None = None
    feed: Loader
    if tensors := arrays.pair(data, device):
        images, labels = tensors
        check_pair(images, labels)
        _check_attacked(model, images, labels, device)
        memory = _memory(images, threat, attack, cutmix=cutmix, seed=seed, device=device)
        feed = ResidentLoader(
            images,
            labels,
            batch_size,
            seed=seed,
            pad=pad,
            flip=flip,
            cutmix=cutmix,
            erase=erase,
            jitter=jitter,
            extra=None if extra is None else arrays.pair(extra, device),
            share=extra_share,
            device=device,
            memory=memory,
        )
    elif cutmix or erase or jitter or extra is not None:
        raise EngineError(
            "cutmix, erase, jitter and extra need (images, labels) tensors, not a loader"
        )
    elif attack.start == "memory":
        raise EngineError("attack.start = memory needs (images, labels) tensors, not a loader")
    else:
        feed = TensorLoader(data, device)
    steps = epochs * len(feed)
    step = Step(
        model,
        objective=objective,
        threat=threat,
        attack=attack,
        optimiser=Optimiser(
            model,
            lr=schedule.rates(lr, steps),
            name=optimiser,
            momentum=momentum,
            weight_decay=weight_decay,
            ema=ema,
        ),
        memory=memory,
        radii=schedule.radii(threat.eps, steps),
        perturbation=Perturbation(model, perturb) if perturb else None,
        take=feed.take,
        precision=precision,
        seed=seed,
        device=device,
        recorder=None if unavailable(device) else CudaGraphs(device),
    )
    try:
        return Trainer(
            step, feed, epochs=epochs, validation=validation, seed=seed, hooks=hooks
        ).run()
    finally:
        step.close()


def _check_optimiser(optimiser: object, perturb: float) -> None:
    """Raise an EngineError for no optimiser's name, or one that takes no perturbed weights."""
    if not isinstance(optimiser, str) or optimiser not in optimisers:
        given = optimiser if isinstance(optimiser, str) else type(optimiser).__name__
        raise EngineError(
            f"optimiser must be a name, not {given}: one of "
            f"{', '.join(optimisers.names())}; lr, momentum and weight_decay are arguments"
        )
    if perturb and (not 0 <= perturb < 1 or optimiser.startswith("apex")):
        raise EngineError(
            f"perturb = {perturb} must be in [0, 1), with sgd, adamw or torch's optimisers, not "
            f"{optimiser}"
        )


def _memory(
    images: Tensor,
    threat: ThreatModel,
    attack: Attack,
    *,
    cutmix: bool,
    seed: int,
    device: torch.device,
) -> AdversaryMemory | None:
    """Return the memory that an attack starts from, if it does."""
    if attack.memory == "host":
        raise EngineError("attack.memory = host is for `engine train`: here take device")
    if attack.start != "memory":
        return None
    if images.dim() != 4:
        raise EngineError("the adversary memory holds images [N, C, H, W] only")
    if cutmix:
        raise EngineError(
            "cutmix with attack.start = memory: a mixed image has no place in the adversary "
            "memory: take start = random"
        )
    return AdversaryMemory(len(images), images.shape[1:], threat, seed=seed, device=device)


def _check_ranges(section: type, **values: object) -> None:
    """Raise an EngineError for a value that a recipe's section refuses."""
    try:
        section(**values)
    except ValidationError as error:
        raise EngineError(complaint(error)) from None


def _check_attacked(model: nn.Module, x: Tensor, y: Tensor, device: torch.device) -> None:
    """Raise an EngineError where a network cannot be attacked on images, uint8 or float32.

    Args:
        device: of the network; the images may lie on another, as training brings them over.
    """
    first = x[:1].to(device)
    first = first if first.is_floating_point() else first.float() / 255
    with evaluation_mode(model):
        check_network(model, first, y)


@torch.enable_grad()
def attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    steps: int = 10,
    alpha: float | None = None,
    seed: int = 0,
) -> Tensor:
    """Attack `x` by projected gradient ascent on the cross-entropy.

    Args:
        model: [0, 1] images to logits; attacked in evaluation mode, restored afterwards.
        x: float32 [B, ...] in [0, 1]; y: whole numbers [B].
        threat: the ball of the adversaries.
        steps: gradient steps, >= 0.
        alpha: step size in pixel units, > 0; default as for `Attack`.
        seed: of the random start.
    Returns:
        The adversaries, like `x`, inside the threat ball and [0, 1].
    Raises:
        EngineError: for images that are not in [0, 1] or not finite, labels that do not fit them,
            or a network that cannot be attacked.
    """
    check_threat(threat)
    device = device_of(model)
    x, y = arrays.pair((x, y), device or _CPU) or (x, y)
    check_pair(x, y)
    check_pixels(x)
    check_device(x, y, device)
    _check_attacked(model, x, y, x.device)
    with evaluation_mode(model):
        adversary, _ = Attack(steps=steps, alpha=alpha)(
            model, x, y, threat, state=rng.state(seed, x.device)
        )
    return adversary


def autoattack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    threat: ThreatModel,
    *,
    version: Literal["standard", "apgd"] = "standard",
    seed: int = 0,
    batch_size: int = 500,
) -> Verdict:
    """Run AutoAttack (Croce & Hein, arXiv 2003.01690) in the engine's own, faster form.

    Args:
        model: [0, 1] images to logits [N, K], K >= 2; attacked in evaluation mode, restored
            afterwards.
        x: float32 [N, C, H, W] in [0, 1]; y: whole numbers [N]; tensors on the model's device, or
            NumPy arrays.
        threat: the ball to attack in.
        version: "standard" (APGD-CE, targeted APGD, targeted FAB, Square), or "apgd" (the first
            two).
        seed: of the random starts and windows; batch_size: images in memory at once.
    Returns:
        Which images withstood all attacks, and an adversary of each other image.
    Raises:
        EngineError: if the images leave [0, 1] or there are none, if the labels do not fit them, or
            if the network cannot be attacked (`check_network` lists the cases).
    """
    check_threat(threat)
    device = device_of(model)
    x, y = ready(*(arrays.pair((x, y), device or _CPU) or (x, y)), device, pictures=True)
    with arithmetic("fp32", x.device), evaluation_mode(model):
        check_network(model, x, y)
        return ensemble.run(model, x, y, threat, version=version, seed=seed, batch_size=batch_size)
