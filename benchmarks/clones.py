"""Run the authors' own training code as rivals, from the user's clone of their repository.

Loading a file executes it. The scripts are written for CUDA, and import packages that the functions
called here do not use. So `Tensor.cuda` is the identity while a file loads and while its function
runs, on a machine without a GPU whose tensors lie on the CPU. While a file loads, torchvision and
apex are empty stand-ins: code that uses them fails. Afterwards the process is as before.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.device import machine
from engine.errors import EngineError

from . import rivals

Loop = Callable[[nn.Module, float, float, int], rivals.Step]

HOMES = {
    "fast_adversarial": "https://github.com/locuslab/fast_adversarial",
    "trades": "https://github.com/yaodongyu/TRADES",
}
_UNUSED = ("torchvision", "torchvision.datasets", "torchvision.transforms", "apex", "apex.amp")


@dataclass(frozen=True)
class Clone:
    """Hold a training loop around a function of a clone.

    Attributes:
        loop: `loop(model, eps, alpha, k)` returns `step(x, y, start=None)`, as in `rivals`.
        label: the name in tables; note: which function ran, and how.
    """

    label: str
    note: str
    loop: Loop


def parse(words: Iterable[str]) -> dict[str, Path]:
    """Turn `["trades=PATH"]` into {"trades": PATH}.

    Raises:
        EngineError: for a word of another form, a name that is not in `HOMES`, or a repeated name.
    """
    folders: dict[str, Path] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if name not in HOMES or not equals or not path:
            expected = " or ".join(f"{known}=PATH" for known in HOMES)
            raise EngineError(f"--clone takes {expected}, got {word!r}")
        if name in folders:
            raise EngineError(f"--clone {name} is given twice")
        folders[name] = Path(path).expanduser()
    return folders


def load(name: str, root: Path, channels: int) -> Clone:
    """Return the clone's loop for images of so many channels. This executes a file of the clone.

    Args:
        name: one of `HOMES`.
        channels: fast_adversarial has one attack for MNIST and another for CIFAR-10.
    Raises:
        EngineError: if `root` is no such clone, or its file cannot be loaded or lacks the function.
    """
    if not root.is_dir():
        raise EngineError(f"--clone {name}: there is no folder {root}")
    manner = "on the GPU with" if _on_a_gpu() else "on the CPU with Tensor.cuda as the identity and"
    manner += " empty stand-ins for torchvision and apex"
    if name == "trades":
        trades_loss = _function(name, root, "trades.py", "trades_loss")
        note = f"TRADES (clone) is its own trades_loss, {manner}"
        return Clone("TRADES (clone)", note, _around_trades_loss(trades_loss))
    file = "MNIST/evaluate_mnist.py" if channels == 1 else "CIFAR10/utils.py"
    attack_pgd = _function(name, root, file, "attack_pgd")
    attack = (lambda *values: attack_pgd(*values, 1)) if channels == 1 else _by_channel(attack_pgd)
    note = (
        f"fast_adversarial (clone) is its own attack_pgd of {file}, {manner}; "
        "that makes one forward pass more than the attack in its training scripts"
    )
    return Clone("fast_adversarial (clone)", note, _around_attack(attack))


def _around_trades_loss(trades_loss: _Function) -> Loop:
    def loop(model: nn.Module, eps: float, alpha: float, k: int) -> rivals.Step:
        opt = rivals.sgd(model)

        def step(x: Tensor, y: Tensor, start: Tensor | None = None) -> None:
            def drawn(*_: object, **__: object) -> Tensor:
                # The attack starts at x + 0.001 randn.
                return (start - x) / 0.001  # type: ignore[operator]

            model.train()
            with _replaced(torch, "randn", drawn, start is not None):
                loss = trades_loss(
                    model, x, y, opt, step_size=alpha, epsilon=eps, perturb_steps=k, beta=6.0
                )
            loss.backward()
            opt.step()

        return step

    return loop


def _around_attack(attack: Callable[..., Tensor]) -> Loop:
    """Return a plain training loop; the authors' loop is inside a function that fetches data."""

    def loop(model: nn.Module, eps: float, alpha: float, k: int) -> rivals.Step:
        opt = rivals.sgd(model)

        def step(x: Tensor, y: Tensor, start: Tensor | None = None) -> None:
            def drawn(delta: Tensor, *_: object) -> Tensor:
                # A given start replaces the attack's draw: of the whole batch, or of one channel.
                return delta.copy_((start - x).reshape(delta.shape))  # type: ignore[operator]

            model.train()
            with _replaced(Tensor, "uniform_", drawn, start is not None):
                delta = attack(model, x, y, eps, alpha, k)
            opt.zero_grad()
            F.cross_entropy(model((x + delta).clamp(0.0, 1.0)), y).backward()
            opt.step()

        return step

    return loop


def _by_channel(attack_pgd: _Function) -> Callable[..., Tensor]:
    # The attack works on normalised images, within limits set in its file. The benchmark's images
    # lie in [0, 1].
    low, high = torch.tensor([0.0, 1.0], device=machine.device())
    vars(attack_pgd.module).update(lower_limit=low, upper_limit=high)

    def attack(net: nn.Module, x: Tensor, y: Tensor, eps: float, alpha: float, k: int) -> Tensor:
        ones = torch.ones(x.shape[1], 1, 1, device=x.device)
        return attack_pgd(net, x, y, eps * ones, alpha * ones, k, 1)

    return attack


@dataclass(frozen=True)
class _Function:
    """Hold a function of a clone, called on the device of the benchmark's tensors."""

    clone: str
    path: Path
    module: ModuleType
    name: str

    def __call__(self, *values: Any, **named: Any) -> Any:
        with _errors(self.clone, f"{self.name} of {self.path} failed"), _here():
            return getattr(self.module, self.name)(*values, **named)


def _function(clone: str, root: Path, file: str, name: str) -> _Function:
    path = root.resolve() / file
    if not path.is_file():
        raise EngineError(
            f"--clone {clone}: {root} has no {file}; is it a clone of {HOMES[clone]}?"
        )
    spec = importlib.util.spec_from_file_location(f"clone_of_{clone}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _errors(clone, f"{path} cannot be loaded"), _here(), _imports(path.parent):
        spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise EngineError(f"--clone {clone}: {path} has no function {name}")
    return _Function(clone, path, module, name)


@contextlib.contextmanager
def _errors(clone: str, problem: str) -> Iterator[None]:
    try:
        yield
    # A script that parses its arguments exits.
    except (Exception, SystemExit) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise EngineError(f"--clone {clone}: {problem}: {type(error).__name__}: {first}") from error


def _on_a_gpu() -> bool:
    return machine.device().type == "cuda"


def _here() -> contextlib.AbstractContextManager[Any]:
    """Make `Tensor.cuda` move to the benchmark's device in the block, on the CPU too."""
    device = machine.device()
    return _replaced(Tensor, "cuda", lambda tensor, *_, **__: tensor.to(device), not _on_a_gpu())


def _replaced(
    owner: Any, name: str, value: Any, needed: bool = True
) -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(owner, name, value) if needed else contextlib.nullcontext()


@contextlib.contextmanager
def _imports(folder: Path) -> Iterator[None]:
    """Let imports find stand-ins and the modules in `folder`, in the block only.

    Afterwards the modules and their logging handlers are removed from the process.
    """
    before, root = dict(sys.modules), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    path, no_bytecode = sys.path[:], sys.dont_write_bytecode
    for name in _UNUSED:
        stand_in = sys.modules[name] = ModuleType(name, "empty: what uses it fails")
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, stand_in)
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True  # keep bytecode out of the user's clone
    try:
        yield
    finally:
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            own = name not in before and file and Path(file).is_relative_to(folder)
            if name in _UNUSED or own:
                del sys.modules[name]
        sys.modules.update({name: before[name] for name in _UNUSED if name in before})
        sys.path[:], sys.dont_write_bytecode = path, no_bytecode
        root.handlers[:] = handlers
        root.setLevel(level)
