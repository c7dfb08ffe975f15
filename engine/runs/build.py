"""Build the parts of a training run from a recipe: network, step, loader."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import models
from ..adversary.host_memory import HostMemory
from ..adversary.memory import AdversaryMemory
from ..data import loaders
from ..data.loaders import Batch, Loader
from ..data.loaders.resident import extras_of
from ..data.photos import Photos
from ..device import apex, capture, precision
from ..device.capture import Recorder
from ..device.distributed import World
from ..device.machine import device
from ..errors import EngineError
from ..evaluation.robust_accuracy import attack_names
from ..recipes import Recipe
from ..registers import loaders as registered_loaders
from ..registers import optimisers
from ..training.optimiser import Optimiser
from ..training.perturbation import Perturbation
from ..training.registered import Registered
from ..training.step import Step
from .images import Images, Split, classes, extra_set, split, test_images, test_size
from .pretrained import start_from

ALONE: World = World()
# The schedule is a list of every step's learning rate.
_MOST_STEPS = 10_000_000
# For each external optimiser, ours with the same number of moments.
_OURS = {
    "torch-sgd": "sgd",
    "torch-adamw": "adamw",
    "apex-sgd": "sgd",
    "apex-adam": "adamw",
    "apex-lamb": "adamw",
}


def build_model(
    recipe: Recipe,
    images: Images | None,
    classes: int,
    shape: torch.Size,
    *,
    init: bool = False,
) -> Any:
    """Build the recipe's network.

    Args:
        images: uint8 [N, C, H, W] or pictures, which give the statistics to normalise by; None: a
            checkpoint will.
        classes: number of logits.
        shape: of an image, [C, H, W].
        init: load the weights of `model.pretrained`, where the recipe has one.
    Raises:
        EngineError: for a network that does not fit the images or the weights.
    """
    mean = std = None
    if recipe.model.normalise:
        if images is None:
            # The checkpoint overwrites these.
            mean, std = (0.0,) * shape[0], (1.0,) * shape[0]
        elif isinstance(images, Photos):
            mean, std = images.statistics()
        else:
            scaled = images[:10_000].float() / 255.0
            mean = tuple(scaled.mean(dim=(0, 2, 3)).tolist())
            std = tuple(scaled.std(dim=(0, 2, 3)).tolist())
    model = models.build(
        recipe.model.name,
        in_channels=shape[0],
        image_size=shape[1:],
        classes=classes,
        width=recipe.model.width,
        drop_path=recipe.model.drop_path,
        mean=mean,
        std=std,
    )
    if init and recipe.model.pretrained is not None:
        start_from(model, Path(recipe.model.pretrained), classes)
    # Convolutions run faster in this format, on CPUs (docs/performance.md) and on tensor cores.
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def check(recipe: Recipe, *, evaluated: bool = True, processes: int = 1) -> None:
    """Refuse every mistake in a recipe before a run folder exists.

    Args:
        processes: the number of processes that will share each batch.
    Raises:
        EngineError: for data that is absent or damaged, a network that does not fit it, a batch
            larger than the training set, and as `build_step` does.
    """
    _check_device(recipe, device())
    parts = split(recipe)
    images, _ = parts.train
    model = build_model(recipe, images, len(parts.classes), images.shape[1:], init=True)
    _check_registered(recipe, model, parts)
    side = min(images.shape[2:])
    if recipe.data.pad >= side:
        raise EngineError(f"data.pad = {recipe.data.pad} is as large as the images")
    if recipe.data.cutout > 2 * side:
        raise EngineError(f"data.cutout = {recipe.data.cutout} is more than the whole image")
    _check_changes(recipe, images.shape[1])
    if recipe.data.loader == "dali" and (missing := loaders.dali.unavailable()):
        raise EngineError(f"data.loader = dali: {missing}")
    if recipe.optim.batch_size > len(images):
        raise EngineError(
            f"optim.batch_size = {recipe.optim.batch_size}, but there are {len(images)} training "
            "images: lower it"
        )
    World(size=processes).share(recipe.optim.batch_size)
    if recipe.attack.memory == "host" and processes > 1:
        raise EngineError("attack.memory = host is for one process: drop --nproc, or take device")
    steps = recipe.optim.epochs * steps_per_epoch(recipe)
    if steps > _MOST_STEPS:
        raise EngineError(
            f"optim.epochs = {recipe.optim.epochs} makes {steps:,} steps: at most {_MOST_STEPS:,}"
        )
    if extra_set(recipe) is not None:
        extras_of(recipe.optim.batch_size // processes, recipe.data.extra_share)
    if recipe.step.sync_batch_norm and not torch.cuda.is_available():
        raise EngineError("step.sync_batch_norm needs CUDA devices: PyTorch has none for the CPU")
    if evaluated:
        test_images(recipe)


def _check_registered(recipe: Recipe, model: Any, parts: Split) -> None:
    """Make a registered optimiser and a registered loader once: their makers may be wrong."""
    if (make := optimisers.maker(recipe.optim.name)) is not None:
        optim, params = recipe.optim, list(model.parameters())
        options = {"momentum": optim.momentum, "weight_decay": optim.weight_decay}
        Registered(make, optim.name, params, optim.lr, **options)
    if registered_loaders.maker(recipe.data.loader) is not None:
        _loader_of(recipe, parts, device(), ALONE, None).close()


def _check_changes(recipe: Recipe, channels: int) -> None:
    data = recipe.data
    if data.size is not None:
        return
    if data.jitter and channels != 3:
        raise EngineError(f"data.jitter needs images of 3 channels; {data.name} has {channels}")
    options = {"extra": data.extra is not None, **sampling_of(recipe)}
    if option := loaders.refused(data.loader, options):
        raise EngineError(f"data.{option} with data.loader = {data.loader}: take resident")


def notes(recipe: Recipe, *, evaluated: bool = True) -> list[str]:
    """Return a line for everything that a run does otherwise than its recipe says."""
    parts = split(recipe)
    lines = []
    held_out, total = len(parts.validation[0]), parts.total
    if recipe.data.validation >= total:
        lines.append(
            f"data.validation = {recipe.data.validation}, but {recipe.data.name} has {total} "
            f"training images: {held_out} of them, a fifth, are held out"
        )
    return lines + (evaluation_notes(recipe) if evaluated else [])


def evaluation_notes(recipe: Recipe) -> list[str]:
    """Return a line for everything that an evaluation does otherwise than the recipe says."""
    lines = []
    asked, total = recipe.evaluation.examples, test_size(recipe)
    if asked is not None and asked > total:
        lines.append(
            f"evaluation.examples = {asked}, but {recipe.data.name} has {total} test images: "
            "all of them are used"
        )
    attacks = attack_names(recipe.evaluation.autoattack, len(classes(recipe)))
    if "apgd-difference" in attacks:
        lines.append(
            f"{recipe.data.name} has {len(classes(recipe))} classes and AutoAttack's targeted APGD "
            f"needs 4: AutoAttack here is {', '.join(attacks)}"
        )
    return lines


def _check_device(recipe: Recipe, target: torch.device) -> None:
    precision.resolve(recipe.step.precision, target)
    if recipe.step.capture == "on" and (missing := capture.unavailable(target)):
        raise EngineError(f"step.capture = on: {missing}")
    if recipe.optim.name.startswith("apex"):
        apex.check(recipe.optim.name, target)


def build_step(
    recipe: Recipe,
    model: Any,
    *,
    steps: int,
    memory: AdversaryMemory | None = None,
    take: Callable[[Tensor], Batch] | None = None,
    recorder: Recorder | None = None,
    rank: int = 0,
) -> Step:
    """Return the recipe's step for `model`, on the model's device.

    Args:
        steps: the number of steps in the whole run, the schedule's length.
        take: makes the batches on the device, see `Step`.
        recorder: captures the step; left out: CUDA graphs where the recipe wants them.
        rank: this process's rank among those that share the run.
    Raises:
        EngineError: for a precision, an optimiser or a capture that this device does not have.
    """
    optim, target = recipe.optim, next(model.parameters()).device
    _check_device(recipe, target)
    if recorder is None and recipe.step.capture != "off" and not capture.unavailable(target):
        recorder = capture.CudaGraphs(target)
    return Step(
        model,
        objective=recipe.objective,
        threat=recipe.threat,
        attack=recipe.attack,
        optimiser=Optimiser(
            model,
            lr=recipe.schedule.rates(optim.lr, steps),
            name=optim.name,
            momentum=optim.momentum,
            weight_decay=optim.weight_decay,
            ema=optim.ema,
        ),
        memory=memory,
        radii=recipe.schedule.radii(recipe.threat.eps, steps),
        perturbation=_perturbation(recipe, model, steps),
        take=take,
        precision=recipe.step.precision,
        seed=recipe.seed,
        rank=rank,
        device=target,
        compile=recipe.step.compile == "on",
        deterministic=recipe.step.deterministic,
        recorder=recorder,
    )


def _perturbation(recipe: Recipe, model: Any, steps: int) -> Perturbation | None:
    weights = recipe.weights
    if not weights.perturb:
        return None
    first = (weights.from_epoch - 1) * steps // recipe.optim.epochs
    return Perturbation(model, weights.perturb, first)


def without_gpu(recipe: Recipe, target: torch.device) -> Recipe:
    """Return the recipe with stand-ins for the parts that the CPU or the meta device lacks.

    On the CPU: no CUDA graph, fp32 for tf32, and our optimisers for apex's. The meta device has
    shapes and no numbers: there also our optimisers for torch's, which read numbers, and float32
    throughout, which every operator supports.
    """
    step, name = recipe.step, recipe.optim.name
    meta = target.type == "meta"
    if meta or name.startswith("apex"):
        # Most optimisers of others have two moments.
        name = _OURS.get(name, "adamw" if optimisers.maker(name) else name)
    exact = "fp32" if meta or step.precision == "tf32" else step.precision
    return replace(
        recipe,
        step=replace(step, capture="off", precision=exact),
        optim=replace(recipe.optim, name=name),
    )


def memory_for(
    recipe: Recipe, images: Images, target: torch.device | str = "cpu"
) -> AdversaryMemory | None:
    """Return the adversary memory of images [N, C, H, W], if the attack starts from one."""
    if recipe.attack.start != "memory":
        return None
    return AdversaryMemory(
        len(images), images.shape[1:], recipe.threat, seed=recipe.seed, device=target
    )


def steps_per_epoch(recipe: Recipe) -> int:
    """Return the number of steps in one pass over the recipe's training set."""
    return len(split(recipe).train[0]) // recipe.optim.batch_size * recipe.optim.replays


def prepare(
    recipe: Recipe, epochs: int, world: World = ALONE, folder: Path | None = None
) -> tuple[Step, Loader]:
    """Return the recipe's training step and its loader, on the device, for a schedule of `epochs`.

    Several processes each take their share of every batch.

    Args:
        folder: for an adversary memory on the host; None: a temporary one.
    """
    torch.manual_seed(recipe.seed)
    target = device()
    parts = split(recipe)
    images, _ = parts.train
    model = build_model(recipe, images, len(parts.classes), images.shape[1:], init=True).to(target)
    if recipe.step.sync_batch_norm:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    on_host = recipe.attack.memory == "host"
    memory = None if on_host else memory_for(recipe, images, target)
    loader = _loader_of(recipe, parts, target, world, memory)
    if on_host:
        memory = _on_host(recipe, images, target, folder)
    step = build_step(
        recipe,
        model,
        steps=epochs * len(loader),
        memory=memory,
        # The host must know the samples of a step to read their rows.
        take=None if on_host else loader.take,
        rank=world.rank,
    )
    return step, loader


def _loader_of(
    recipe: Recipe,
    parts: Split,
    target: torch.device,
    world: World,
    memory: AdversaryMemory | None,
) -> Loader:
    return loaders.build(
        recipe.data.loader,
        *parts.train,
        world.share(recipe.optim.batch_size),
        device=target,
        memory=memory,
        workers=recipe.data.workers,
        extra=extra_set(recipe),
        share=recipe.data.extra_share,
        # A memory on the host has room for the extra images too.
        numbered=recipe.attack.memory == "host",
        rank=world.rank,
        world=world.size,
        **sampling_of(recipe),
    )


def _on_host(
    recipe: Recipe, images: Images, target: torch.device, folder: Path | None
) -> HostMemory:
    extra = extra_set(recipe)
    return HostMemory(
        len(images) + (0 if extra is None else len(extra[0])),
        images.shape[1:],
        recipe.threat,
        batch=recipe.optim.batch_size,
        folder=folder,
        seed=recipe.seed,
        device=target,
    )


def sampling_of(recipe: Recipe) -> dict[str, Any]:
    """Return a loader's options for the recipe's draws."""
    data = recipe.data
    drawn: dict[str, Any] = {
        "cutout": data.cutout,
        "cutmix": data.cutmix,
        "erase": data.erase,
        "jitter": data.jitter,
    }
    if data.size is not None:
        drawn = {"scale": data.scale, "jitter": data.jitter}
    return {
        "seed": recipe.seed,
        "pad": data.pad,
        "flip": data.flip,
        "replays": recipe.optim.replays,
        **drawn,
    }


def step_of(recipe: Recipe) -> Callable[[], None]:
    """Return a function that does one training step of the recipe on its data, for timing."""
    step, loader = prepare(recipe, epochs=1 + 10_000 // steps_per_epoch(recipe))
    step.train()

    taken = step.take is not None
    epochs = (loader.feed(epoch, taken=taken) for epoch in itertools.count())
    batches = itertools.chain.from_iterable(epochs)

    def call() -> None:
        step(next(batches))
        if step.device.type == "cuda":
            torch.cuda.synchronize()

    return call
