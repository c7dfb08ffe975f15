"""One training step, a function from (batch, state) to new state: eager, or captured and replayed.

The step owns every tensor that it changes and exchanges nothing with the host. All that varies from
step to step (learning rate, decay of the average, random numbers, loss scale, metrics) is read from
the device, at a counter that the step advances. So the same function runs eagerly, or is recorded
once in a CUDA graph and launched with one call a step.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .. import rng
from ..adversary.ascent import random_point
from ..adversary.attack import Attack
from ..adversary.held import Points
from ..adversary.host_memory import HostMemory
from ..adversary.memory import AdversaryMemory
from ..data.loaders import Batch
from ..device import apex, distributed
from ..device.capture import WARM_UP, Recorder
from ..device.phases import BOOKKEEPING, DATA, OPTIMISER, TRAIN_BACKWARD, phase
from ..device.precision import LossScale, arithmetic, passes, repeatable, resolve
from ..errors import EngineError
from ..kernels import Labels
from ..models import dropout
from ..models.compiled import compiled
from ..objectives import Objective, Outcome
from ..threat import ThreatModel
from .optimiser import Optimiser
from .perturbation import Perturbation

log = logging.getLogger(__name__)

# Loss, accuracy, and an objective's own terms.
_MOST_TERMS = 15


class Step:
    """Do training steps.

    Args:
        model: images [0, 1] to logits; trained in place.
        optimiser: made for `model`, with the learning rates of all steps.
        memory: the adversary memory, if attacks start from it.
        radii: eps of every step of the run, where it differs from the threat's (`Schedule.radii`);
            the memory then stores in units of the step's eps.
        perturbation: of the weights of `model`; each step from its first on computes its gradient
            at perturbed weights.
        take: makes a batch on the device from the random state, without the host (a resident
            loader's); the step then needs no batch, and a captured step makes its own.
        precision: the precision of the network's passes, see `engine.device.precision`.
        seed, rank: seeds of all random numbers; each process of a run draws its own.
        compile: the network's passes go through torch.compile.
        deterministic: cuDNN takes algorithms that give the same bits each time.
        recorder: captures the step at its first call; None: run it eagerly.
    Attributes:
        state: int64 [2] (seed, step) on the device; `done`: the same number of steps, on the host.
        threat: the threat that the network shall withstand; `threat_now`: the threat of the step at
            hand, smaller while eps grows.
        images: the number of images in the means, in `batches` batches.
        why_eager: why the step runs eagerly although it has a recorder, else None.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        objective: Objective,
        threat: ThreatModel,
        attack: Attack,
        optimiser: Optimiser,
        memory: AdversaryMemory | None = None,
        radii: list[float] | None = None,
        perturbation: Perturbation | None = None,
        take: Callable[[Tensor], Batch] | None = None,
        precision: str = "fp32",
        seed: int = 0,
        rank: int = 0,
        device: torch.device | str = "cpu",
        compile: bool = False,
        deterministic: bool = False,
        recorder: Recorder | None = None,
    ) -> None:
        objective.check(attack)
        self.why_eager: str | None = None
        self._recorder = recorder
        self._replay: Callable[[], None] | None = None
        self._static: Batch | None = None
        # Whether the recorded step perturbs the weights.
        self._recorded_perturbed = False
        if recorder is not None and optimiser.uncapturable:
            self._stay_eager(optimiser.uncapturable)
        self.network = compiled(model) if compile else model
        # Several processes average the gradients of the loss.
        with self._recorder.context() if self._recorder else contextlib.nullcontext():
            self._compute = distributed.averaged(self.network, objective)
        self.model, self.objective, self.threat, self.attack = model, objective, threat, attack
        self.optimiser, self.memory, self.take = optimiser, memory, take
        self.perturbation = perturbation
        self.device = torch.device(device)
        self.precision = resolve(precision, self.device)
        self.deterministic = deterministic
        apex.check_precision(optimiser.name, self.precision)
        self.scale = LossScale(self.device, dynamic=self.precision == "fp16")
        self.state = rng.state(rng.of_rank(seed, rank), device)
        dropout.follow(model, self.state)
        self.threat_now, self.radii = threat, radii
        if radii is not None:
            if len(radii) != len(optimiser.rates):
                raise EngineError(
                    f"{len(radii)} radii for a schedule of {len(optimiser.rates)} steps"
                )
            # The last step writes its successor's radius, and warm-up for a capture runs further.
            self._radii = torch.tensor([*radii, *radii[-1:] * WARM_UP], device=device)
            self._radius = self._radii[0].clone()
            self.threat_now = threat.growing(self._radius)
            if memory is not None:
                memory.threat = self.threat_now
        self.done = 0
        # The number of steps that were skipped, then a sum for each of `_terms`.
        self._terms: tuple[str, ...] = ()
        self._sums = torch.zeros(_MOST_TERMS + 1, device=device)
        self.images = self.batches = 0

    def run(self, batch: Batch) -> None:
        """Do the whole step on the device."""
        with arithmetic(self.precision, self.device), repeatable(self.deterministic):
            self._run(batch)

    def _run(self, batch: Batch) -> None:
        x, y = batch.x, batch.labels
        start = batch.start
        if start is None and self.memory is not None:
            start = self.memory.recall(_samples(batch), x[: len(_samples(batch))], batch.crops)
        if start is not None and len(start) < len(x):
            # A memory on the device has no place for extra images.
            rest = self.threat_now.around(x[len(start) :])
            start = torch.cat([start, random_point(rest, self.state)])
        if self.perturbs:
            outcome, adversary = self._perturbed_gradients(x, y, start)
        else:
            outcome, adversary = self._gradients(x, y, start)
        with phase(OPTIMISER):
            self.optimiser.step(self.state[1:], self.scale)
        with phase(BOOKKEEPING):
            if self.memory is not None:
                samples = _samples(batch)
                own = len(samples)
                self.memory.remember(samples, x[:own], adversary[:own], batch.crops)
            self._count(outcome)
            self.state[1:].add_(1)
            if self.radii is not None:
                self._radius.copy_(self._radii.index_select(0, self.state[1:]).view(()))

    @property
    def perturbs(self) -> bool:
        """Return whether the next step perturbs the weights."""
        return self.perturbation is not None and self.done >= self.perturbation.first

    def _gradients(self, x: Tensor, y: Labels, start: Tensor | None) -> tuple[Outcome, Tensor]:
        """Compute the loss and its gradients; return its outcome and adversary."""
        with passes(self.precision, self.device):
            outcome: Outcome = self._compute(
                x, y, self.threat_now, self.attack, start=start, state=self.state
            )
        self.optimiser.zero_grad()
        with phase(TRAIN_BACKWARD):
            outcome.loss.backward(self.scale.scale.to(outcome.loss.dtype))
        adversary = outcome.adversary
        return outcome, adversary if isinstance(adversary, Tensor) else adversary()

    def _perturbed_gradients(
        self, x: Tensor, y: Labels, start: Tensor | None
    ) -> tuple[Outcome, Tensor]:
        """Compute the gradients at perturbed weights; the outcome is that of the weights proper.

        Over several processes the first gradients are averaged, so all perturb alike.
        """
        perturbation, points = self.perturbation, Points()
        assert perturbation is not None
        restore = perturbation.keep_statistics()
        with points.record():
            found = self._gradients(x, y, start)
        restore()
        with phase(OPTIMISER):
            perturbation.ascend()
        with points.replay():
            self._gradients(x, y, start)
        with phase(OPTIMISER):
            perturbation.undo()
        return found

    def _count(self, outcome: Outcome) -> None:
        terms = {"loss": outcome.loss.detach(), "adv_accuracy": outcome.correct, **outcome.stats}
        self._terms = tuple(terms)
        skipped = self.scale.found_inf
        values = torch.stack([t.float() for t in (skipped, *terms.values())])
        # A skipped step adds only to the number of skipped steps: its loss may be NaN.
        values[1:].masked_fill_(skipped > 0, 0.0)
        self._sums[: len(values)].add_(values)

    def __call__(self, batch: Batch | None = None) -> None:
        """Do one step. `batch` may be left out where the step takes its own.

        Raises:
            EngineError: after the last step of the schedule, or for a batch without the sample
                indices that the memory needs.
        """
        if self.done >= len(self.optimiser.rates):
            raise EngineError(f"the schedule ends after {len(self.optimiser.rates)} steps")
        if batch is None and self.take is None:
            raise EngineError("this step takes no batches by itself: hand one over")
        if self._replay is not None and self._recorded_perturbed != self.perturbs:
            # Another step begins here: it is recorded anew.
            self._replay = None
        self.capture(batch)
        host = self.memory if isinstance(self.memory, HostMemory) else None
        if host is not None:
            if batch is None:
                raise EngineError("attack.memory = host needs a loader that hands over batches")
            host.fetch(_samples(batch))
        if self._replay is None:
            images = self._eagerly(batch)
        elif self._fill(batch):
            self._replay()
            assert self._static is not None
            images = len(self._static.y)
        else:
            images = self._eagerly(batch)
        if host is not None:
            host.store()
        self.optimiser.steps = self.done = self.done + 1
        self.batches += 1
        self.images += images

    def train(self) -> None:
        """Put the network into training mode."""
        self.model.train()
        self.network.train()

    def means(self, *, everywhere: bool = False) -> dict[str, float]:
        """Return batch means since `clear`, and `adv_accuracy` [0..1]. Wait for the device once.

        The means are over the applied steps; `skipped` is the number of the others. They are over
        this process's part of the batches, or with `everywhere` over all parts: then every process
        must call.
        """
        if not self._terms:
            return {}
        sums = self._sums.clone()
        skipped, *values = (distributed.mean_(sums) if everywhere else sums).tolist()
        applied = self.batches - skipped or math.nan
        found = {name: value / applied for name, value in zip(self._terms, values, strict=False)}
        found["adv_accuracy"] *= self.batches / self.images
        return {**found, "skipped": int(skipped)}

    def clear(self) -> None:
        """Start the means again."""
        self.batches = self.images = 0
        self._sums.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor that a step changes, or reads at a fixed place."""
        found = {"state": self.state}
        found |= {f"scale.{name}": t for name, t in self.scale.tensors().items()}
        found |= {f"model.{name}": t for name, t in self.model.named_parameters()}
        found |= {f"model.{name}": t for name, t in self.model.named_buffers()}
        found |= {f"optimiser.{name}": t for name, t in self.optimiser.tensors().items()}
        found["sums"] = self._sums
        if self.memory is not None:
            found["memory"] = self.memory.deltas
        if self.radii is not None:
            found |= {"eps": self._radius, "radii": self._radii}
        return found

    def networks(self) -> list[nn.Module]:
        """Return the network, and its moving average where there is one."""
        average = self.optimiser.average
        return [self.model] if average is self.model else [self.model, average]

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], *, done: int, batches: int, images: int) -> None:
        """Resume from `tensors` (see `tensors()`) after `done` steps, with this step's seed.

        The tensors are written in place, so before or after a capture.

        Raises:
            EngineError: for tensors of another step.
        """
        own = "optimiser."
        self.optimiser.adopt(
            {name.removeprefix(own): t for name, t in tensors.items() if name.startswith(own)}
        )
        mine = self.tensors()
        different = mine.keys() ^ tensors.keys() or {
            name for name, t in mine.items() if t.shape != tensors[name].shape
        }
        if different:
            raise EngineError(f"the checkpoint is of another recipe: {min(different)} differs")
        seed = self.state[0].clone()
        for name, t in mine.items():
            t.copy_(tensors[name])
        self.state[0] = seed
        self.optimiser.steps = self.done = done
        self.batches, self.images = batches, images

    @torch.no_grad()
    def roll_back(self, weights: dict[str, Tensor]) -> None:
        """Set the network and its average to `weights` (a state dict); clear momentum and memory.

        The schedule and the random numbers go on, so the next steps differ from those that failed.
        """
        for net in self.networks():
            for name, t in net.state_dict().items():
                t.copy_(weights[name])
        self.optimiser.restart()
        if self.memory is not None:
            self.memory.forget(self.done)

    def static(self) -> list[Tensor]:
        """Return the tensors of the batch that a captured step reads; none before the capture."""
        return [t for t in self._static or () if t is not None]

    def _own_batch(self) -> Batch:
        assert self.take is not None
        with phase(DATA):
            return self.take(self.state)

    def _eagerly(self, batch: Batch | None) -> int:
        batch = self._own_batch() if batch is None else batch
        self.run(batch)
        return len(batch.y)

    def capture(self, batch: Batch | None = None) -> None:
        """Record the step now, on a batch of the shapes to come, if it is to be recorded.

        Otherwise the first call records it; but a capture should run without a loader's threads.
        After the last step of the schedule nothing is recorded: warm-up would read past its end.
        """
        waits = self._recorder is not None and self._replay is None
        if waits and self.done < len(self.optimiser.rates):
            self._record(batch)

    def _record(self, batch: Batch | None) -> None:
        """Warm up and capture, then restore all tensors."""
        recorder = self._recorder
        assert recorder is not None
        if batch is None:
            static = self._own_batch()
        else:
            static = Batch(*(None if t is None else t.clone() for t in batch))  # type: ignore[arg-type]

        def step() -> None:
            self.run(self._own_batch() if batch is None else static)

        before = {name: t.detach().clone() for name, t in self.tensors().items()}
        steps = self.optimiser.steps
        self._static = static
        try:
            recorder.warm_up(step)
            self._restore(before)
            self._replay = recorder.record(step)
            self._recorded_perturbed = self.perturbs
        except RuntimeError as error:
            # Report the root cause: ending a broken capture raises a second, vaguer error.
            first: BaseException = error
            while isinstance(first.__context__, RuntimeError):
                first = first.__context__
            self._stay_eager(f"the capture failed: {(str(first).splitlines() or [repr(first)])[0]}")
        self._restore(before)
        self.optimiser.steps = steps

    @torch.no_grad()
    def _restore(self, before: dict[str, Tensor]) -> None:
        """Restore tensors in place: a graph remembers addresses."""
        for name, t in self.tensors().items():
            t.copy_(before[name]) if name in before else t.zero_()

    def _fill(self, batch: Batch | None) -> bool:
        """Copy a batch into the tensors that the graph reads; return False if it does not fit."""
        if batch is None:
            return True
        static = self._static
        assert static is not None
        if [None if t is None else t.shape for t in static] != [
            None if t is None else t.shape for t in batch
        ]:
            if self.why_eager is None:
                self.why_eager = (
                    f"a batch of {len(batch.y)} does not fit the graph of {len(static.y)}"
                )
                log.warning("this step runs without its CUDA graph: %s", self.why_eager)
            return False
        for into, t in zip(static, batch, strict=True):
            if into is not None and t is not None:
                into.copy_(t, non_blocking=True)
        return True

    def _stay_eager(self, why: str) -> None:
        self.why_eager, self._recorder, self._static = why, None, None
        log.warning("running without a CUDA graph: %s", why)

    def close(self) -> None:
        """Free the graph's memory; later steps run eagerly."""
        self._replay = self._static = None
        if self._recorder is not None:
            self._recorder.close()
        self._recorder = None
        if isinstance(self.memory, HostMemory):
            self.memory.close()


def _samples(batch: Batch) -> Tensor:
    if batch.samples is None:
        raise EngineError("attack.start = memory needs a loader that hands over sample indices")
    return batch.samples
