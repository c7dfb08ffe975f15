"""Train a recipe into its run folder, from its newest checkpoint where there is one."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.loaders import Loader
from ..device import distributed, phases
from ..device.distributed import World
from ..device.precision import repeatable
from ..errors import EngineError
from ..progress import TrainingBar, bar
from ..recipes import Recipe
from ..training.checkpoint import Checkpoints
from ..training.signals import Stopped, Watch
from ..training.step import Step
from ..training.trainer import Hooks, Result, Trainer
from .build import ALONE, prepare, step_of
from .folder import Run
from .images import as_floats, split


def build_trainer(
    recipe: Recipe, step: Step, loader: Loader, hooks: Hooks, world: World = ALONE
) -> Trainer:
    """The recipe's epochs of what `prepare` gave, validated on its held-out images."""
    return Trainer(
        step,
        loader,
        epochs=recipe.optim.epochs,
        validation=as_floats(*_part(split(recipe).validation, world), step.device),
        validation_steps=recipe.validation.steps,
        validate_every=recipe.validation.every,
        seed=recipe.seed,
        hooks=hooks,
    )


def train(run: Run, world: World = ALONE) -> Result:
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
    # Validation too: it chooses the best epoch, and what to go back to.
    exactly = repeatable(recipe.step.deterministic)
    with bar() as progress, Watch() as watch, phases.nvtx(), exactly:
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


def _tensorboard(path: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    # After a resume TensorBoard hides what an earlier process wrote from this step on.
    return SummaryWriter(str(path), purge_step=step + 1 if step else None)
