"""Networks of timm and torchvision by name, with random weights."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import nn

from ..errors import EngineError

# Each is called with (name, in_channels, (height, width), classes, drop_path).
Source = Callable[[str, int, tuple[int, int], int, float | None], nn.Module]


# timm's keyword for it.
DROP_PATH = "drop_path_rate"


def _timm(
    name: str, in_channels: int, size: tuple[int, int], classes: int, drop_path: float | None
) -> nn.Module:
    timm = _package("timm")
    _known(name, name.partition(".")[0], timm.list_models(), "timm")
    options: dict[str, Any] = {"pretrained": False, "num_classes": classes}
    options["in_chans"] = in_channels
    if drop_path is not None:
        options[DROP_PATH] = drop_path
    return _sized(lambda **size: timm.create_model(name, **options, **size), img_size=size)


def _torchvision(
    name: str, in_channels: int, size: tuple[int, int], classes: int, drop_path: float | None
) -> nn.Module:
    models = _package("torchvision").models
    _known(name, name, models.list_models(module=models), "torchvision")
    if in_channels != 3:
        raise EngineError(
            f"network torchvision/{name} takes images of 3 channels, these have {in_channels}: "
            "timm's networks take any number"
        )

    def make(**image_size: int) -> nn.Module:
        return models.get_model(name, weights=None, num_classes=classes, **image_size)

    net = _sized(make, image_size=size[0]) if size[0] == size[1] else make()
    return net if drop_path is None else _with_drop_path(name, net, drop_path)


def _with_drop_path(name: str, net: nn.Module, drop_path: float) -> nn.Module:
    """Scale the probabilities of torchvision's drop-path, so that the largest is `drop_path`.

    Not every network of torchvision takes the probability: its Swin networks set their own.
    """
    dropped: list[Any] = [m for m in net.modules() if type(m).__name__ == "StochasticDepth"]
    largest = max((m.p for m in dropped), default=0.0)
    if not largest:
        raise EngineError(f"network torchvision/{name} has no drop-path: drop model.drop_path")
    for m in dropped:
        m.p *= drop_path / largest
    return net


SOURCES: dict[str, Source] = {"timm": _timm, "torchvision": _torchvision}


def unavailable(name: str) -> str | None:
    """Return why the package of the network `name` cannot be used here, in a sentence, or None.

    A name without a package gives None.
    """
    source, slash, _ = name.partition("/")
    if not slash or source not in SOURCES:
        return None
    try:
        _package(source)
    except EngineError as error:
        return str(error)
    return None


def _package(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in ("timm", "torchvision"):
            raise
        raise EngineError(
            f"{error.name} is not installed: pip install 'robust-engine[models]'"
        ) from None
    except Exception as error:
        # torchvision's operators do not load beside another build of PyTorch than their own.
        raise EngineError(
            f"{name} does not import here: {' '.join(str(error).split())[:160]}: install the "
            "torchvision that belongs to this PyTorch"
        ) from error


def _known(name: str, base: str, known: list[str], source: str) -> None:
    if base not in known:
        near = difflib.get_close_matches(base[:100].lower(), known, n=1, cutoff=0.5)
        hint = f": did you mean {source}/{near[0]}?" if near else ""
        raise EngineError(f"{source} has no network {name!r}{hint}")


def _sized(make: Callable[..., nn.Module], **size: object) -> nn.Module:
    """Call `make` with the images' size, which only networks of one size take."""
    try:
        return make(**size)
    except TypeError as error:
        if not any(keyword in str(error) for keyword in size):
            raise
        return make()
