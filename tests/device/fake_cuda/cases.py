"""Run named cases on fake CUDA tensors; print a line of JSON each, with what a GPU would refuse.

ENGINE_FAKE_CUDA_GUARD=guard.so python -m tests.device.fake_cuda.cases [NAME ...]
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

if __name__ == "__main__":
    from . import guard

    guard.load()

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.cuda.amp import common

from engine import recipes
from engine.adversary.memory import AdversaryMemory
from engine.data.loaders import Batch, ResidentLoader
from engine.device import phases
from engine.evaluation import robust_accuracy
from engine.models import sources
from engine.objectives import OBJECTIVES, LocalBall
from engine.recipes import Recipe
from engine.runs import build
from engine.runs.images import as_floats, facts, in_memory
from engine.training.step import Step
from engine.training.trainer import Trainer

from .spy import Spy

DEVICE = torch.device("cuda", 0)
BATCH, BATCHES, STEPS = 8, 4, 16
# Fake tensors of different modes do not mix, and the ops keep their constants for the process.
MODE = FakeTensorMode()


@dataclass(frozen=True)
class Case:
    """Hold what to run.

    Attributes:
        recipe: its name; changes: its fields, as on the command line.
        run: what is done with the recipe.
    """

    recipe: str
    run: Callable[[Recipe], Spy]
    changes: dict[str, str] = field(default_factory=dict)

    def __call__(self) -> Spy:
        return self.run(recipes.load(self.recipe, {"step.capture": "off", **self.changes}))


def pretend() -> None:
    """Make torch's Python side believe in the device too, for the whole process."""
    torch.cuda.is_bf16_supported = lambda *_, **__: True  # type: ignore[method-assign]
    torch.cuda.get_device_capability = lambda *_, **__: (9, 0)
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.mem_get_info = lambda *_: (1 << 36, 1 << 37)
    common.amp_definitely_not_available = lambda: False
    # Copying a module copies the mode that its fake tensors carry.
    FakeTensorMode.__deepcopy__ = lambda self, memo: self  # type: ignore[attr-defined]
    # No generator of numbers exists for the device, and no numbers either.
    AdversaryMemory.forget = lambda self, seed: None  # type: ignore[method-assign]
    library = torch.library.Library("aten", "IMPL", "Meta")
    for name in ("_fused_sgd_", "_fused_adamw_"):
        for overload in ("", ".tensor_lr"):
            # PyTorch has had one for AdamW in some versions.
            if not torch._C._dispatch_has_kernel_for_dispatch_key(
                f"aten::{name}{overload}", "Meta"
            ):
                library.impl(name + overload, lambda *_, **__: None)
    pretend.library = library  # type: ignore[attr-defined]  # its registrations end with it


def on_device(model: nn.Module) -> nn.Module:
    """Give every parameter and buffer of a module on the meta device its place on the fake one."""
    for module in model.modules():
        for own, wrap in ((module._parameters, nn.Parameter), (module._buffers, lambda t: t)):
            for name, t in own.items():
                if t is not None:
                    made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=DEVICE)
                    own[name] = wrap(made)
    return model


def images_of(recipe: Recipe) -> tuple[Tensor, Tensor]:
    shape = facts(recipe).shape
    count = BATCH * BATCHES
    return torch.empty((count, *shape), dtype=torch.uint8), torch.empty(count, dtype=torch.int64)


def network_of(recipe: Recipe) -> nn.Module:
    about = facts(recipe)
    with unset_fake_temporarily(), torch.device("meta"):
        model = build.build_model(recipe, None, about.classes, torch.Size(about.shape))
    return on_device(model)


def built(recipe: Recipe, *, takes: bool = True) -> tuple[Step, ResidentLoader]:
    images, labels = images_of(recipe)
    network = network_of(recipe)
    recipe = in_memory(recipe)  # no longer knows the size of its pictures
    memory = build.memory_for(recipe, images, DEVICE)
    loader = ResidentLoader(
        images,
        labels,
        BATCH,
        device=DEVICE,
        memory=memory,
        extra=None if recipe.data.extra is None else (images, labels),
        share=recipe.data.extra_share,
        **build.sampling_of(recipe),
    )
    take = loader.take if takes else None
    # torch's optimisers look at the learning rate when they are made: SGD refuses where lr < 0 is
    # true, AdamW where lr >= 0 is not.
    with Spy(host=True, truth=recipe.optim.name != "torch-sgd"):
        step = build.build_step(recipe, network, steps=STEPS, memory=memory, take=take)
    step.train()
    loader.begin(0)
    return step, loader


def watch(run: Callable[[], object], *, host: bool = False) -> Spy:
    """Run twice and tell of the second time: constants and buffers are made in the first."""
    spy = Spy(host=host)
    with phases.listening(spy), spy:
        run()
        spy.ops.clear()
        spy.complaints.clear()
        run()
    return spy


def step(recipe: Recipe) -> Spy:
    """Run a step that makes its own batch."""
    made, _ = built(recipe)
    spy = watch(made)
    elsewhere = {name for name, t in made.tensors().items() if t.device != DEVICE}
    spy.complaints += [f"{name} is not on {DEVICE}" for name in sorted(elsewhere)]
    return spy


def fed(recipe: Recipe) -> Spy:
    """Run a step on a batch of DALI's: contiguous images, where each was cropped, no start."""
    made, _ = built(recipe, takes=False)
    x = torch.empty((BATCH, *facts(recipe).shape), device=DEVICE)
    index = torch.empty(BATCH, dtype=torch.int64, device=DEVICE)
    where = torch.empty((BATCH, 3), dtype=torch.int32, device=DEVICE)
    return watch(lambda: made(Batch(x, index, index, where)))


def training(recipe: Recipe) -> Spy:
    """Train for two epochs with validation, and return to the best epoch."""
    made, loader = built(recipe)
    images, labels = images_of(recipe)
    x, y = as_floats(images, labels, DEVICE)
    trainer = Trainer(made, loader, epochs=2, validation=(x, y), validation_steps=2)

    def run() -> None:
        made.done = 0
        trainer.run()
        made.roll_back(trainer.result.best)

    # The order of an epoch comes from the host.
    loader.begin = lambda epoch: None  # type: ignore[method-assign]
    return watch(run, host=True)


def evaluating(recipe: Recipe) -> Spy:
    """Attack with PGD and restarts, as `engine eval` does."""
    images, labels = images_of(recipe)
    x, y = as_floats(images, labels, DEVICE)
    model = network_of(recipe)
    return watch(
        lambda: robust_accuracy.evaluate(
            model,
            x,
            y,
            recipe.threat,
            pgd_steps=2,
            pgd_restarts=2,
            autoattack_version="none",
            batch_size=BATCH,
        ),
        host=True,
    )


class Faulty(LocalBall):
    """Commit a fault and compute the loss: for the test of the spy."""

    fault: Callable[[Tensor, Tensor], object]

    def compute(self, model: nn.Module, x: Tensor, y: Tensor, *rest: Any) -> Any:
        type(self).fault(x, y)
        return super().compute(model, x, y, *rest)


def _no_kernel(x: Tensor, y: Tensor) -> None:
    rows = x.flatten(1)[None, None]
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(rows, rows, rows)


@dataclass(frozen=True)
class Fault:
    """Hold what is done to a batch (x, y), and what the spy has to say of it."""

    does: Callable[[Tensor, Tensor], object]
    complaint: str


FAULTS: dict[str, Fault] = {
    "a tensor on the CPU": Fault(lambda x, y: torch.zeros(3) + 1, "add.Tensor works on the CPU"),
    "a value read on the host": Fault(lambda x, y: x.sum().item(), "reads a value of the device"),
    "a branch on a value": Fault(
        lambda x, y: 1 if (x > 0).any() else 2, "reads a value of the device"
    ),
    "a shape that depends on values": Fault(
        lambda x, y: x[y > 0], "whose shape depends on its contents"
    ),
    "a draw from a generator": Fault(
        lambda x, y: torch.rand_like(x), "rand_like draws random numbers"
    ),
    "a number of the host's": Fault(
        lambda x, y: torch.tensor(0.5, device=x.device), "lift_fresh works on the CPU"
    ),
    "a number on the CPU": Fault(
        lambda x, y: x + torch.zeros(()), "add.Tensor mixes tensors on cpu and cuda"
    ),
    "two devices in one operator": Fault(
        lambda x, y: x + torch.zeros(x.shape), "found at least two devices"
    ),
    "no CUDA kernel": Fault(_no_kernel, "flash_attention_for_cpu has no CUDA kernel"),
}


def faulty(fault: str, recipe: Recipe) -> Spy:
    """Run a step with one of `FAULTS` in its objective."""
    objective = type("Planted", (Faulty,), {"fault": staticmethod(FAULTS[fault].does)})()
    return step(replace(recipe, objective=objective))


_SMALL = "fashion-mnist"
_L2 = {"threat.norm": "L2", "threat.eps": "1.5"}
_GROWING = {"schedule.eps_warmup": "0.5"}
VARIANTS: dict[str, Case] = {
    "L2": Case(_SMALL, step, _L2),
    "L2, random start": Case(_SMALL, step, {**_L2, "attack.start": "random"}),
    "growing eps": Case(_SMALL, step, _GROWING),
    "growing eps, L2, random start": Case(
        _SMALL, step, {**_L2, **_GROWING, "attack.start": "random"}
    ),
    "cutout": Case(_SMALL, step, {"data.cutout": "8"}),
    "cutout, random start": Case(_SMALL, step, {"data.cutout": "8", "attack.start": "random"}),
    "mixed, erased and recoloured": Case(
        "cifar10",
        step,
        {
            "data.cutmix": "true",
            "data.erase": "0.25",
            "data.jitter": "0.4",
            "attack.start": "random",
        },
    ),
    **{
        f"mixed labels, {name}": Case(
            _SMALL,
            step,
            {"objective.name": name, "data.cutmix": "true", "attack.start": "random"},
        )
        for name, kind in OBJECTIVES.items()
        if kind.mixes
    },
    "batch statistics in attacks": Case("cifar10", step, {"attack.batch_norm": "batch"}),
    "no steps of attack": Case(_SMALL, step, {"attack.steps": "0", "attack.start": "memory"}),
    "adamw": Case(_SMALL, step, {"optim.name": "adamw"}),
    "torch-sgd": Case(_SMALL, step, {"optim.name": "torch-sgd", "step.precision": "fp16"}),
    "torch-adamw": Case(_SMALL, step, {"optim.name": "torch-adamw", "step.precision": "fp16"}),
    "perturbed weights": Case(_SMALL, step, {"weights.perturb": "0.005"}),
    "perturbed weights, fp16": Case(
        "cifar10", step, {"weights.perturb": "0.005", "step.precision": "fp16"}
    ),
    # The files of recipes do not exist here: `built` makes the images.
    "extra images, perturbed weights, mixed labels": Case(
        _SMALL,
        step,
        {
            "data.extra": "extra.npz",
            "weights.perturb": "0.005",
            "data.cutmix": "true",
            "attack.start": "random",
        },
    ),
    "extra images beside a memory": Case(_SMALL, step, {"data.extra": "extra.npz"}),
    "no average": Case(_SMALL, step, {"optim.ema": "0"}),
    "dropout": Case(_SMALL, step, {"model.name": "small-cnn"}),
    "a batch of DALI's": Case(_SMALL, fed),
    "a batch of DALI's, L2, growing eps": Case(_SMALL, fed, {**_L2, **_GROWING}),
    "training with validation": Case(_SMALL, training),
    "evaluation": Case(_SMALL, evaluating),
    "evaluation, L2": Case(_SMALL, evaluating, _L2),
    **{
        f"direction {direction}{', growing eps' * bool(more)}": Case(
            _SMALL, step, {"objective.direction": direction, **more}
        )
        for direction in ("kl", "ce", "gradient-norm")
        for more in ({}, _GROWING)
    },
}


# Large networks and many passes: the small ones take the same branches.
LONG = ("cifar10-", "cifar100", "mnist-", "image", "tiny-imagenet")


def cases() -> dict[str, Case]:
    """Return every case by its name."""
    named = {
        f"{name} {precision}": Case(name, step, {"step.precision": precision})
        for name in recipes.names()
        for precision in ("bf16", "fp16", "tf32")
    }
    named |= VARIANTS
    named |= {f"fault: {name}": Case(_SMALL, partial(faulty, name)) for name in FAULTS}
    return named


def missing(name: str) -> str | None:
    """Return why the network of a case cannot be made here, or None."""
    recipe = cases()[name].recipe
    return sources.unavailable(recipes.load(recipe).model.name)


def _ran(names: list[str]) -> Iterator[dict[str, Any]]:
    known = cases()
    for name in names or known:
        try:
            with MODE, torch.autograd.set_multithreading_enabled(False):
                spy = known[name]()
        except Exception:
            yield {"case": name, "operators": 0, "complaints": [traceback.format_exc()[-3000:]]}
            continue
        yield {"case": name, "operators": spy.ops.total(), "complaints": spy.complaints}


if __name__ == "__main__":
    torch.set_num_threads(1)
    pretend()
    for row in _ran(sys.argv[1:]):
        print(json.dumps(row), flush=True)
