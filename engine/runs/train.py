"""Train a recipe into its run folder, from its newest checkpoint where there is one."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..adversary.host_memory import HostMemory
from ..data.loaders import Loader
from ..device import distributed, phases
from ..device.distributed import World
from ..device.precision import repeatable
from ..errors import EngineError
from ..progress import TrainingBar, bar
from ..recipes import Recipe
from ..training.checkpoint import Checkpoints, most_bytes
from ..training.signals import Stopped, Watch
from ..training.step import Step
from ..training.trainer import Hooks, Result, Trainer
from . import tuning
from .build import ALONE, prepare, step_of
from .folder import Run
from .images import Images, extra_sum, parts, split
from .loggers import Loggers

log = logging.getLogger(__name__)


def build_trainer(
    recipe: Recipe,
    step: Step,
    loader: Loader,
    hooks: Hooks | None = None,
    world: World = ALONE,
) -> Trainer:
    """Return the recipe's trainer for the outcome of `prepare`, validated on held-out images."""
    return Trainer(
        step,
        loader,
        epochs=recipe.optim.epochs,
        validation=parts(
            *_part(split(recipe).validation, world), step.device, recipe.evaluation.batch_size
        ),
        validation_steps=recipe.validation.steps,
        validation_loss=recipe.validation.loss,
        validation_step=recipe.validation.step,
        validate_every=recipe.validation.every,
        seed=recipe.seed,
        hooks=hooks,
    )


def train(run: Run, world: World = ALONE) -> Result:
    """Train by the run's recipe, from the newest checkpoint if there is one, into the run's folder.

    Args:
        world: the processes that train together; the first alone writes.
    Raises:
        EngineError: for any fault; the folder keeps its files.
        Stopped: on SIGINT, SIGTERM or SIGHUP, after a checkpoint.
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
                f"process {world.rank} has lost another process of this run: "
                f"{str(error).splitlines()[0]}"
            ) from None
        if not _is_out_of_memory(error) or world.size > 1:
            raise
    # Outside the handler: there the exception keeps every tensor of the step alive.
    raise EngineError(_what_fits(recipe))


def _train(run: Run, world: World) -> Result:
    recipe = run.recipe
    form = tuning.choose(recipe, world)
    recipe = replace(recipe, step=replace(recipe.step, compile="on" if form.compile else "off"))
    step, loader = prepare(recipe, recipe.optim.epochs, world, run.path / "memory")
    with (
        form.applied(),
        contextlib.closing(loader),
        contextlib.closing(step),
        # Validation too: it chooses the best epoch, to which training may go back.
        repeatable(recipe.step.deterministic),
        phases.nvtx(),
        Watch() as watch,
        bar() as progress,
    ):
        trainer = build_trainer(recipe, step, loader, world=world)
        steps = recipe.optim.epochs * len(loader)
        shown = TrainingBar(progress, recipe.name, recipe.optim.epochs, steps)
        with contextlib.closing(_Session(run, trainer, world, watch, shown)) as session:
            trainer.hooks = session.hooks()
            session.resume()
            result = session.train()
            session.finish()
    return result


class _Session:
    """Connect a trainer with its run folder: rows, weights, checkpoints, signals.

    Of several processes the first alone writes.

    Args:
        shown: the progress bar.
    """

    def __init__(
        self, run: Run, trainer: Trainer, world: World, watch: Watch, shown: TrainingBar
    ) -> None:
        self.run, self.trainer, self.world = run, trainer, world
        self.watch, self.shown = watch, shown
        options = run.recipe.checkpoint
        self.checkpoints = Checkpoints(
            run.place("checkpoints"), keep=options.keep, seconds=options.seconds
        )
        self._loggers: Loggers | None = None
        # The step of the newest checkpoint; None: there is none.
        self._saved: int | None = None

    def hooks(self) -> Hooks:
        """Return the trainer's hooks; processes other than the first have none."""
        if not self.world.first:
            # The first process stops on a signal, and the others then lose it. If each stopped at a
            # step of its own, one would wait for ever for the gradients of another.
            return Hooks()
        return Hooks(self.shown.step, self.log, self.keep, self.safe_point)

    def resume(self) -> None:
        """Resume from the newest checkpoint, if there is one; drop the rows after it."""
        first = self.world.first
        networks = self.trainer.step.networks()
        limit = most_bytes(
            [
                *self.trainer.step.tensors().values(),
                # The best epoch's weights.
                *networks[-1].state_dict().values(),
            ]
        )
        # The first process sets damaged checkpoints aside before the others look.
        found = self.checkpoints.latest(limit) if first else None
        distributed.wait()
        found = found if first else self.checkpoints.latest(limit)
        if found is not None:
            self._check_extra(found[1].get("extra"))
            self.trainer.load(*found)
            self._saved = self.trainer.step.done
        if self._memory is not None:
            self._resume_memory(self._saved)
        if first:
            self.run.cut_log(_logged(found[1]) if found else 0)
            if found is not None:
                self._note_processes(found[1].get("processes"))
            self.trainer.result.rows = self.run.metrics()
            self._loggers = Loggers(self.run, self.trainer.step.done)

    @property
    def _memory(self) -> HostMemory | None:
        memory = self.trainer.step.memory
        return memory if isinstance(memory, HostMemory) else None

    def _resume_memory(self, saved: int | None) -> None:
        """Return to the memory of the checkpoint of step `saved`; None: make the memory."""
        assert self._memory is not None
        if saved is None:
            self._memory.begin()
        elif saved < len(self.trainer.step.optimiser.rates):
            self._memory.restore(saved)

    def _check_extra(self, before: object) -> None:
        """Refuse extra images that are not those that the run began with."""
        if before != extra_sum(self.run.recipe):
            raise EngineError(
                f"{self.run.recipe.data.extra}: the extra images have changed since this run "
                "began: restore the file, or begin another run"
            )

    def _note_processes(self, before: object) -> None:
        """Say, and record, that another number of processes goes on with the run."""
        now = self.world.size
        if not isinstance(before, int) or before == now:
            return
        done = self.trainer.step.done
        log.warning(
            "%s was trained by %d process(es) up to step %d and goes on with %d: other random "
            "numbers and other BatchNorm statistics, so not the same bits",
            self.run.path,
            before,
            done,
            now,
        )
        environment = self.run.read_json("environment.json")
        change = {"step": done, "before": before, "after": now}
        earlier = environment.get("processes_changed")
        changes = [*(earlier if isinstance(earlier, list) else []), change]
        self.run.write_json("environment.json", {**environment, "processes_changed": changes})

    def train(self) -> Result:
        """Train to the end.

        Raises:
            Stopped: on a signal, and where the first process has stopped on one.
        """
        try:
            return self.trainer.run()
        except RuntimeError as error:
            if self.watch.stop is None or not distributed.is_broken(error):
                raise
            raise Stopped(self.watch.stop) from None

    def finish(self) -> None:
        """Save the end: a run that is resumed after it goes on with its evaluation."""
        if self.world.first and self.trainer.step.done != self._saved:
            self.save(self.checkpoints.save)
        if self._memory is not None:
            self._memory.remove()

    def close(self) -> None:
        """Close the loggers."""
        if self._loggers is not None:
            self._loggers.close()

    def log(self, row: dict[str, Any]) -> None:
        """Log an epoch's row: to metrics.jsonl, to the screen, to the recipe's loggers."""
        self.run.log(row)
        self.shown.epoch(row)
        if self._loggers is not None:
            self._loggers.log(row)

    def keep(self, name: str, model: torch.nn.Module, row: dict[str, Any]) -> None:
        """Write the weights called `name`: "best" or "last"."""
        recipe = self.run.recipe
        # The shape and the classes let `engine.load` build the network without the data set.
        parts = split(recipe)
        shape, count = "x".join(map(str, parts.train[0].shape[1:])), len(parts.classes)
        self.run.save(
            name, model, epoch=row["epoch"], recipe=recipe.name, shape=shape, classes=count
        )

    def save(self, write: Callable[..., None]) -> None:
        """Save all that `resume` needs, by `write`, a method of `Checkpoints`."""
        if self._memory is not None:
            self._memory.mark(self.trainer.step.done)
        tensors, about = self.trainer.state()
        about |= {
            "logged": self.run.logged(),
            "processes": self.world.size,
            "extra": extra_sum(self.run.recipe),
        }
        write(self.trainer.step.done, tensors, about)
        if self._memory is not None:
            self._memory.drop_before(min(self.checkpoints.steps(), default=0))

    def safe_point(self) -> None:
        """Stop, or save a checkpoint, where a signal or the clock asks for it."""
        if self.watch.stop is not None:
            self.save(self.checkpoints.save)
            raise Stopped(self.watch.stop)
        # Within an epoch the processes' means and BatchNorm statistics differ: a checkpoint is
        # exact for one process; for several it holds the first one's, so there only a signal asks
        # for it.
        exact = self.world.size == 1 or self.trainer.step.batches == 0
        if exact and (self.watch.save or self.checkpoints.due()):
            self.watch.save = False
            self.save(self.checkpoints.try_save)


def _part(pair: tuple[Images, Tensor], world: World) -> tuple[Images, Tensor]:
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
    """Return the line for exhausted memory: the largest part (half, a quarter, ...) of the batch
    with which a step ran."""
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
