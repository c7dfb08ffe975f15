"""Authors' own code as rivals: from a clone of the user's, where it lies, through its own functions.

Loading a file executes it. The scripts are written for CUDA, and import packages that the functions
called here do not use. So `Tensor.cuda` is the identity while a file loads and while its function
runs, where there is no GPU and the benchmark's tensors lie on the CPU; and while it loads, torchvision
and apex are empty stand-ins: what does use them fails. Afterwards the process is as it was.
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
    """A training loop around a function of a clone.

    `loop(model, eps, alpha, k)` returns `step(x, y, start=None)`, as in `rivals`; `label` is what tables call
    it, `note` says what ran and how.
    """

    label: str
    note: str
    loop: Loop


def parse(words: Iterable[str]) -> dict[str, Path]:
    """`["trades=PATH"]` as {"trades": PATH}.

    Raises:
        EngineError: for a word of another form, a name that is not in `HOMES`, or one given twice.
    """
    found: dict[str, Path] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if name not in HOMES or not equals or not path:
            expected = " or ".join(f"{known}=PATH" for known in HOMES)
            raise EngineError(f"--clone takes {expected}, got {word!r}")
        if name in found:
            raise EngineError(f"--clone {name} is given twice")
        found[name] = Path(path).expanduser()
    return found


def load(name: str, root: Path, channels: int) -> Clone:
    """The clone's loop for images of so many channels. Executes the file it is in.

    Args:
        name: one of `HOMES`.
        channels: fast_adversarial has an attack for MNIST, and one for CIFAR-10.
    Raises:
        EngineError: when `root` is no such clone, or its file cannot be loaded or lacks the function.
    """
    if not root.is_dir():
        raise EngineError(f"--clone {name}: there is no folder {root}")
    how = "on the GPU with" if _on_a_gpu() else "on the CPU with Tensor.cuda as the identity and"
    how += " empty stand-ins for torchvision and apex"
    if name == "trades":
        trades_loss = _function(name, root, "trades.py", "trades_loss")
        note = f"TRADES (clone) is its own trades_loss, {how}"
        return Clone("TRADES (clone)", note, _around_trades_loss(trades_loss))
    file = "MNIST/evaluate_mnist.py" if channels == 1 else "CIFAR10/utils.py"
    attack_pgd = _function(name, root, file, "attack_pgd")
    attack = (lambda *values: attack_pgd(*values, 1)) if channels == 1 else _by_channel(attack_pgd)
    note = (
        f"fast_adversarial (clone) is its own attack_pgd of {file}, {how}; that makes one forward pass "
        "more than the attack in its training scripts"
    )
    return Clone("fast_adversarial (clone)", note, _around_attack(attack))


# ---- the loops -------------------------------------------------------------------------------


def _around_trades_loss(trades_loss: _Function) -> Loop:
    def loop(model: nn.Module, eps: float, alpha: float, k: int) -> rivals.Step:
        opt = rivals.sgd(model)

        def step(x: Tensor, y: Tensor, start: Tensor | None = None) -> None:
            def drawn(*_: object, **__: object) -> Tensor:
                # It starts at x + 0.001 randn.
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
    """A plain training loop: the authors' own lies within a function that fetches the data."""

    def loop(model: nn.Module, eps: float, alpha: float, k: int) -> rivals.Step:
        opt = rivals.sgd(model)

        def step(x: Tensor, y: Tensor, start: Tensor | None = None) -> None:
            def drawn(delta: Tensor, *_: object) -> Tensor:
                # Of a batch at once, or channel by channel: a start is handed in for one channel.
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
    # It works on normalised images, within limits that are its file's; ours are in [0, 1].
    low, high = torch.tensor([0.0, 1.0], device=machine.device())
    vars(attack_pgd.module).update(lower_limit=low, upper_limit=high)

    def attack(net: nn.Module, x: Tensor, y: Tensor, eps: float, alpha: float, k: int) -> Tensor:
        ones = torch.ones(x.shape[1], 1, 1, device=x.device)
        return attack_pgd(net, x, y, eps * ones, alpha * ones, k, 1)

    return attack


# ---- foreign code ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Function:
    """A function of a clone, called where the benchmark's tensors lie."""

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
def _errors(clone: str, what: str) -> Iterator[None]:
    try:
        yield
    # A script that parses its arguments exits.
    except (Exception, SystemExit) as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise EngineError(f"--clone {clone}: {what}: {type(error).__name__}: {first}") from error


def _on_a_gpu() -> bool:
    return machine.device().type == "cuda"


def _here() -> contextlib.AbstractContextManager[Any]:
    """`Tensor.cuda` goes to the benchmark's device, as it does by itself where that is a GPU."""
    where = machine.device()
    return _replaced(Tensor, "cuda", lambda tensor, *_, **__: tensor.to(where), not _on_a_gpu())


def _replaced(
    owner: Any, name: str, value: Any, wanted: bool = True
) -> contextlib.AbstractContextManager[Any]:
    return mock.patch.object(owner, name, value) if wanted else contextlib.nullcontext()


@contextlib.contextmanager
def _imports(folder: Path) -> Iterator[None]:
    """Imports find stand-ins and what lies in `folder`; afterwards the process has neither, nor their logging."""
    known, root = dict(sys.modules), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    path, no_bytecode = sys.path[:], sys.dont_write_bytecode
    for name in _UNUSED:
        stand_in = sys.modules[name] = ModuleType(name, "empty: what uses it fails")
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, stand_in)
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True  # not into the user's clone
    try:
        yield
    finally:
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            own = name not in known and file and Path(file).is_relative_to(folder)
            if name in _UNUSED or own:
                del sys.modules[name]
        sys.modules.update({name: known[name] for name in _UNUSED if name in known})
        sys.path[:], sys.dont_write_bytecode = path, no_bytecode
        root.handlers[:] = handlers
        root.setLevel(level)
