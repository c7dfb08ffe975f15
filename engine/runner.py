"""From a recipe to a trained, evaluated, reported run."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import apex, capture, distributed, evaluation, masking, models, phases, precision
from .capture import Recorder
from .checkpoint import Checkpoints
from .data import datasets, loaders
from .data.loaders import Batch, Loader, ResidentLoader
from .distributed import World
from .errors import EngineError
from .memory import AdversaryMemory
from .optim import Optimiser, OptimiserName
from .progress import EvaluationBar, TrainingBar, bar
from .recipe import Recipe
from .runs import Run
from .signals import Stopped, Watch
from .step import Step
from .trainer import Hooks, Result, Trainer

_ALONE = World()
# Enough for differences of five points, and affordable.
_MASKING_EXAMPLES = 500

# By the name of an optimiser that is not ours the one of ours with as many moments.
_OURS: dict[OptimiserName, OptimiserName] = {
    "torch-sgd": "sgd",
    "torch-adamw": "adamw",
    "apex-sgd": "sgd",
    "apex-adam": "adamw",
    "apex-lamb": "adamw",
}

# One dataset serves the check, the training, the evaluation and the report of a process.
_load = lru_cache(maxsize=4)(datasets.load)


def device() -> torch.device:
    """What this process computes on: its current GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@dataclass(frozen=True)
class Split:
    """Training and validation images of a recipe: uint8 [N, C, H, W], int64 [N]."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    classes: tuple[str, ...]


def split(recipe: Recipe) -> Split:
    """The training set cut in two by a permutation that depends on the dataset alone.

    So every seed and every recipe on a dataset validates on the same images.
    """
    data = _load(recipe.data.name, "train")
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    held_out, rest = order[: recipe.data.validation], order[recipe.data.validation :]
    if recipe.data.train_examples is not None:
        rest = rest[: recipe.data.train_examples]
    if len(rest) == 0:
        raise EngineError(
            f"data.validation = {recipe.data.validation} leaves none of the {len(order)} images to train on"
        )
    return Split(
        (data.images[rest], data.labels[rest]),
        (data.images[held_out], data.labels[held_out]),
        data.classes,
    )


def build_model(recipe: Recipe, images: Tensor | None, classes: int, shape: torch.Size) -> Any:
    """The recipe's network for images [C, H, W] = `shape`; `images` give the statistics to normalise by."""
    if shape[1] != shape[2]:
        raise EngineError(
            f"images of {shape[1]}x{shape[2]} pixels: the networks here take square ones"
        )
    mean = std = None
    if recipe.model.normalise:
        if images is None:
            # Overwritten by the checkpoint's own.
            mean, std = (0.0,) * shape[0], (1.0,) * shape[0]
        else:
            scaled = images[:10_000].float() / 255.0
            mean = tuple(scaled.mean(dim=(0, 2, 3)).tolist())
            std = tuple(scaled.std(dim=(0, 2, 3)).tolist())
    model = models.build(
        recipe.model.name,
        in_channels=shape[0],
        image_size=shape[-1],
        classes=classes,
        width=recipe.model.width,
        mean=mean,
        std=std,
    )
    # Convolutions run faster on it, on CPUs (docs/performance.md) and on tensor cores alike.
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def check(recipe: Recipe, *, evaluated: bool = True, processes: int = 1) -> None:
    """Meet every mistake in a recipe before a run folder exists.

    Args:
        processes: that will share each batch.
    Raises:
        EngineError: for data that is absent or damaged, a network that does not fit it, a batch
            larger than the training set, more test images than there are, and as `build_step` does.
    """
    _check_device(recipe, device())
    parts = split(recipe)
    images, _ = parts.train
    build_model(recipe, images, len(parts.classes), images.shape[1:])
    side = min(images.shape[2:])
    if recipe.data.pad >= side:
        raise EngineError(f"data.pad = {recipe.data.pad} is as large as the images")
    if recipe.data.cutout > 2 * side:
        raise EngineError(f"data.cutout = {recipe.data.cutout} is more than the whole image")
    if recipe.data.loader == "dali" and (missing := loaders.dali.unavailable()):
        raise EngineError(f"data.loader = dali: {missing}")
    if recipe.optim.batch_size > len(images):
        raise EngineError(
            f"optim.batch_size = {recipe.optim.batch_size}, but there are {len(images)} training images"
        )
    World(size=processes).share(recipe.optim.batch_size)
    if recipe.step.sync_batch_norm and not torch.cuda.is_available():
        raise EngineError("step.sync_batch_norm needs CUDA devices: PyTorch has none for the CPU")
    if evaluated:
        test_set(recipe)


def _check_device(recipe: Recipe, where: torch.device) -> None:
    precision.resolve(recipe.step.precision, where)
    if recipe.step.capture == "on" and (missing := capture.unavailable(where)):
        raise EngineError(f"step.capture = on: {missing}")
    if recipe.optim.name.startswith("apex"):
        apex.check(recipe.optim.name, where)


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
    """The recipe's step for `model`, on the model's device.

    Args:
        steps: of the whole run: the schedule's length.
        take: makes the batches on the device, see `Step`.
        recorder: captures the step; left out: CUDA graphs where the recipe wants them.
        rank: this process's among those that share the run.
    Raises:
        EngineError: for a precision, an optimiser or a capture that this device does not have.
    """
    optim, where = recipe.optim, next(model.parameters()).device
    _check_device(recipe, where)
    if recorder is None and recipe.step.capture != "off" and not capture.unavailable(where):
        recorder = capture.CudaGraphs(where)
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
        take=take,
        precision=recipe.step.precision,
        seed=recipe.seed,
        rank=rank,
        device=where,
        compile=recipe.step.compile,
        recorder=recorder,
    )


def without_gpu(recipe: Recipe, where: torch.device) -> Recipe:
    """The recipe with stand-ins for what `where`, the CPU or the meta device, lacks.

    On the CPU: no CUDA graph, fp32 for tf32, ours for apex's optimisers. The meta device has shapes and no
    numbers: there ours for torch's, which read some, and float32 throughout, as every operator has it there.
    """
    step, name = recipe.step, recipe.optim.name
    meta = where.type == "meta"
    if meta or name.startswith("apex"):
        name = _OURS.get(name, name)
    exact = "fp32" if meta or step.precision == "tf32" else step.precision
    return replace(
        recipe,
        step=replace(step, capture="off", precision=exact),
        optim=replace(recipe.optim, name=name),
    )


def memory_for(
    recipe: Recipe, images: Tensor, where: torch.device | str = "cpu"
) -> AdversaryMemory | None:
    """The adversary memory of training images [N, C, H, W], if the recipe's attack starts from one."""
    if recipe.attack.start != "memory":
        return None
    return AdversaryMemory(
        len(images), images.shape[1:], recipe.threat, seed=recipe.seed, device=where
    )


def steps_per_epoch(recipe: Recipe) -> int:
    """Training steps in one pass over the recipe's training set."""
    return len(split(recipe).train[0]) // recipe.optim.batch_size * recipe.optim.replays


def prepare(recipe: Recipe, epochs: int, world: World = _ALONE) -> tuple[Step, Loader]:
    """The recipe's training step and its batches, on the device, for a schedule of `epochs`.

    Several processes each take their share of every batch.
    """
    torch.manual_seed(recipe.seed)
    where = device()
    parts = split(recipe)
    images, labels = parts.train
    model = build_model(recipe, images, len(parts.classes), images.shape[1:]).to(where)
    if recipe.step.sync_batch_norm:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    memory = memory_for(recipe, images, where)
    loader = loaders.build(
        recipe.data.loader,
        images,
        labels,
        world.share(recipe.optim.batch_size),
        device=where,
        memory=memory,
        workers=recipe.data.workers,
        rank=world.rank,
        world=world.size,
        **sampling_of(recipe),
    )
    take = loader.take if isinstance(loader, ResidentLoader) else None
    step = build_step(
        recipe, model, steps=epochs * len(loader), memory=memory, take=take, rank=world.rank
    )
    return step, loader


def build_trainer(
    recipe: Recipe, step: Step, loader: Loader, hooks: Hooks, world: World = _ALONE
) -> Trainer:
    """The recipe's epochs of what `prepare` gave, validated on its held-out images."""
    return Trainer(
        step,
        loader,
        epochs=recipe.optim.epochs,
        validation=as_floats(*_part(split(recipe).validation, world), step.device),
        validation_steps=recipe.validation.steps,
        validation_loss=recipe.validation.loss,
        validate_every=recipe.validation.every,
        seed=recipe.seed,
        hooks=hooks,
    )


def sampling_of(recipe: Recipe) -> dict[str, Any]:
    """How the recipe draws its batches, as a loader's options."""
    data = recipe.data
    return {
        "seed": recipe.seed,
        "pad": data.pad,
        "flip": data.flip,
        "cutout": data.cutout,
        "replays": recipe.optim.replays,
    }


def step_of(recipe: Recipe) -> Callable[[], None]:
    """One training step of the recipe on its own data, as often as it is called: for timing."""
    step, loader = prepare(recipe, epochs=1 + 10_000 // steps_per_epoch(recipe))
    step.train()

    def batches() -> Iterator[Batch | None]:
        for epoch in itertools.count():
            if isinstance(loader, ResidentLoader):
                loader.begin(epoch)
                yield from itertools.repeat(None, len(loader))
            else:
                yield from loader.epoch(epoch)

    stream = batches()

    def call() -> None:
        step(next(stream))
        if step.device.type == "cuda":
            torch.cuda.synchronize()

    return call


def train(run: Run, world: World = _ALONE) -> Result:
    """Train as the run's recipe says, from its newest checkpoint where it has one, logging and saving into its folder.

    Args:
        world: the processes that train together; the first alone writes.
    Raises:
        EngineError: for whatever fails; the folder keeps what it had.
        Stopped: on SIGINT or SIGTERM, after a checkpoint.
    """
    recipe = run.recipe
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    try:
        with run.locked() if world.first else contextlib.nullcontext():
            return _train(run, world)
    except (MemoryError, RuntimeError) as error:
        if distributed.is_broken(error):
            raise EngineError(
                f"process {world.rank} has lost another process of this run: {str(error).splitlines()[0]}"
            ) from None
        if not _is_out_of_memory(error) or world.size > 1:
            raise
    # Outside the handler: the exception holds every tensor of the step that did not fit.
    raise EngineError(_what_fits(recipe))


def _train(run: Run, world: World) -> Result:
    recipe = run.recipe
    step, loader = prepare(recipe, recipe.optim.epochs, world)
    checkpoints = Checkpoints(
        run.path / "checkpoints", keep=recipe.checkpoint.keep, seconds=recipe.checkpoint.seconds
    )
    board = None
    with bar() as progress, Watch() as watch, phases.nvtx():
        shown = TrainingBar(progress, recipe.name, recipe.optim.epochs)

        def epoch(row: dict[str, Any]) -> None:
            run.log(row)
            shown.epoch(row)
            for name, value in row.items():
                if board is not None and name not in ("epoch", "step"):
                    board.add_scalar(name, value, row["step"])

        def keep(name: str, model: torch.nn.Module, row: dict[str, Any]) -> None:
            run.save(name, model, epoch=row["epoch"], recipe=recipe.name)

        def save(how: Callable[..., None]) -> None:
            tensors, about = trainer.state()
            how(step.done, tensors, {**about, "logged": run.logged()})

        def safe_point() -> None:
            # Of several processes the first stops, at a step of its own; the others find it gone. Each at
            # its own step, one would wait for ever for the other's gradients.
            if watch.stop is not None and world.first:
                save(checkpoints.save)
                raise Stopped(watch.stop)
            # Within an epoch the processes' means and BatchNorm statistics differ: then what is saved is
            # exact for one process, and for several the first one's, on a signal only.
            whole = world.size == 1 or trainer.step.batches == 0
            if world.first and whole and (watch.save or checkpoints.due()):
                watch.save = False
                save(checkpoints.try_save)

        first = Hooks(shown.step, epoch, keep, safe_point)
        hooks = first if world.first else Hooks(safe_point=safe_point)
        trainer = build_trainer(recipe, step, loader, hooks, world)
        try:
            # The first sets damaged ones aside before the others look.
            found = checkpoints.latest() if world.first else None
            distributed.wait()
            found = found if world.first else checkpoints.latest()
            if found is not None:
                trainer.load(*found)
            if world.first:
                run.cut_log(_logged(found[1]) if found else 0)
                trainer.result.rows = run.metrics()
                board = _tensorboard(run.path, step.done)
            try:
                result = trainer.run()
            except RuntimeError as error:
                if watch.stop is None or not distributed.is_broken(error):
                    raise
                raise Stopped(watch.stop) from None
            if world.first and (found is None or step.done > found[1]["done"]):
                # What is left is evaluation: that a resumed run starts there.
                save(checkpoints.save)
        finally:
            step.close()
            loader.close()
    if board is not None:
        board.close()
    return result


def _part(pair: tuple[Tensor, Tensor], world: World) -> tuple[Tensor, Tensor]:
    x, y = pair
    return x[world.rank :: world.size], y[world.rank :: world.size]


def _logged(about: dict[str, Any]) -> int:
    size = about.get("logged")
    if not isinstance(size, int) or size < 0:
        raise EngineError("the checkpoint is not a whole one: it does not say what was logged")
    return size


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        "can't allocate memory" in str(error) or "not enough memory" in str(error)
    )


def _what_fits(recipe: Recipe) -> str:
    """What to say when memory has run out: the largest of half, a quarter, ... of the batch that a step ran with."""
    batch = recipe.optim.batch_size
    said = f"out of memory with optim.batch_size = {batch}"
    for smaller in itertools.takewhile(bool, (batch >> n for n in itertools.count(1))):
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            fitting = replace(recipe, optim=replace(recipe.optim, batch_size=smaller))
            step_of(fitting)()
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            continue
        return f"{said}: a step with --optim.batch_size {smaller} fits"
    return f"{said}, and not even one image fits: take a smaller network"


def load_model(run: Run, checkpoint: str = "best") -> Any:
    """The run's network with a checkpoint's weights, in evaluation mode."""
    data = _load(run.recipe.data.name, "test")
    model = build_model(run.recipe, None, len(data.classes), data.images.shape[1:])
    run.load_into(model, checkpoint)
    return model.to(device()).eval()


def test_size(recipe: Recipe) -> int:
    """How many test images the recipe's dataset has."""
    return len(_load(recipe.data.name, "test").images)


def classes(recipe: Recipe) -> tuple[str, ...]:
    """The names of the dataset's classes."""
    return _load(recipe.data.name, "test").classes


def test_set(recipe: Recipe) -> tuple[Tensor, Tensor]:
    """The first `evaluation.examples` test images as floats in [0, 1], on the device."""
    data = _load(recipe.data.name, "test")
    n = recipe.evaluation.examples
    if n is not None and n > len(data.images):
        raise EngineError(
            f"evaluation.examples = {n}, but {recipe.data.name} has {len(data.images)} test images"
        )
    return as_floats(data.images[:n], data.labels[:n], device())


def evaluate_run(run: Run, checkpoint: str = "best") -> evaluation.Report:
    """Evaluate a checkpoint on the test images and write evaluation.json."""
    recipe = run.recipe
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    x, y = test_set(recipe)
    with bar() as progress:
        report = evaluation.evaluate(
            load_model(run, checkpoint),
            x,
            y,
            recipe.threat,
            pgd_steps=recipe.evaluation.pgd_steps,
            pgd_restarts=recipe.evaluation.pgd_restarts,
            autoattack_version=recipe.evaluation.autoattack,
            batch_size=recipe.evaluation.batch_size,
            seed=recipe.seed,
            progress=EvaluationBar(progress),
        )
    model_options = recipe.model
    width = "" if model_options.width is None else f", width {model_options.width}"
    fields = evaluation.robustbench_fields(
        report,
        name=recipe.name,
        architecture=model_options.name + width,
        dataset=recipe.data.name,
    )
    run.write_json("evaluation.json", {**fields, "checkpoint": checkpoint})
    return report


def check_masking(
    run: Run, checkpoint: str = "best", surrogate: Run | None = None
) -> dict[str, Any]:
    """Look for masked gradients on the first test images; writes and returns masking.json.

    Args:
        surrogate: a run on the same dataset, whose adversaries are transferred to this one.
    Raises:
        EngineError: for a surrogate of another dataset.
    """
    recipe = run.recipe
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    if surrogate is not None and surrogate.recipe.data.name != recipe.data.name:
        raise EngineError(
            f"{surrogate.path} is of {surrogate.recipe.data.name}: transfer needs one dataset"
        )
    x, y = (t[:_MASKING_EXAMPLES] for t in test_set(recipe))
    other = None if surrogate is None else load_model(surrogate)
    model = load_model(run, checkpoint)
    with bar() as progress, evaluation.evaluation_mode(model):
        found = masking.checks(
            model,
            x,
            y,
            recipe.threat,
            surrogate=other,
            seed=recipe.seed,
            progress=EvaluationBar(progress),
        )
    report = {**masking.report(found, len(x)), "checkpoint": checkpoint}
    if surrogate is not None:
        report["surrogate"] = surrogate.recipe.name
    run.write_json("masking.json", report)
    return report


def summary(run: Run, result: Result, report: evaluation.Report | None) -> dict[str, Any]:
    """The closing table of a run, as written to summary.json."""
    recipe = run.recipe
    row: dict[str, Any] = {"recipe": recipe.name}
    if report is not None:
        row |= {
            "clean": report.clean,
            "pgd": report.pgd,
            "autoattack": report.autoattack,
            "examples": report.examples,
            "eval_seconds": round(report.seconds, 2),
        }
    row |= {
        "train_seconds": round(result.train_seconds, 2),
        "passes_per_step": recipe.objective.passes(recipe.attack).total,
        "steps": result.steps,
        "best_epoch": result.best_epoch,
        "rolled_back": result.rolled_back,
        "peak_memory_mb": peak_memory_mb(),
        "run_dir": str(run.path),
    }
    run.write_json("summary.json", row)
    return row


def as_floats(images: Tensor, labels: Tensor, where: torch.device) -> tuple[Tensor, Tensor]:
    """uint8 images as float32 in [0, 1], both on the device."""
    return images.to(where).float() / 255.0, labels.to(where)


def peak_memory_mb() -> int | None:
    """The device's peak where it is a GPU, the process's own on the CPU; None where the system does not say."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() >> 20
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak >> (20 if sys.platform == "darwin" else 10)


def _tensorboard(path: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # After a resume TensorBoard hides what an earlier process wrote from this step on.
    return SummaryWriter(str(path), purge_step=step + 1 if step else None)
