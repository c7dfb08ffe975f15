"""The networks by name, from images in [0, 1] to logits, with the normalisation inside.

The keys of a state dict are RobustBench's. A network that RobustBench lacks has the keys of its
source.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import nn

from ..errors import EngineError
from .foreign import one_line, wrap
from .narrow import avoid_strides
from .network import Network, Stem, stem_of
from .resnet import PreActResNet18, ResNet18
from .small import Chain, FastAtMnist, SmallCnn, TinyCnn
from .sources import DROP_PATH, SOURCES
from .wide_resnet import WideResNet28x10, WideResNet34x10

__all__ = [
    "MODELS",
    "Chain",
    "Network",
    "Stem",
    "build",
    "is_known",
    "names",
    "register",
    "stem_of",
]

# Each is called with (in_channels, (height, width), classes); those of `_WIDE` take `width` too.
MODELS: dict[str, Callable[..., Network]] = {
    "tiny-cnn": TinyCnn,
    "fast-at-mnist": FastAtMnist,
    "small-cnn": SmallCnn,
    "resnet18": ResNet18,
    "preact-resnet18": PreActResNet18,
    "wide-resnet28-10": WideResNet28x10,
    "wide-resnet34-10": WideResNet34x10,
}
_WIDE = ("resnet18", "preact-resnet18")
_registered: dict[str, Callable[..., nn.Module]] = {}
Maker = TypeVar("Maker", bound=Callable[..., nn.Module])


def register(name: str) -> Callable[[Maker], Maker]:
    """Return a decorator that gives recipes a network: `model.name = NAME`.

    It decorates a function or a class that is called with (in_channels, (height, width), classes)
    and returns any module from images [B, C, H, W] to logits [B, K]. The normalisation is not its
    affair.

        @engine.models.register("my-net")
        def my_net(in_channels, size, classes): ...

    Raises:
        EngineError: for a name that another network has, or that is no plain name.
    """
    if not isinstance(name, str) or not name or name != name.strip() or "/" in name:
        raise EngineError(f"a network's name is a plain word, got {name!r}")

    def keep(make: Maker) -> Maker:
        if name in MODELS or name in _registered:
            raise EngineError(f"there is a network {name!r} already: register another name")
        _registered[name] = make
        return make

    return keep


def names() -> list[str]:
    """Return the names of the engine's own networks, then of those that were registered."""
    return [*MODELS, *_registered]


def is_known(name: str) -> bool:
    """Tell whether `build` knows the name, or the package that it comes from."""
    return name in MODELS or name in _registered or name.partition("/")[0] in SOURCES


def build(
    name: str,
    *,
    in_channels: int,
    image_size: int | Sequence[int],
    classes: int,
    width: int | None = None,
    drop_path: float | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Network:
    """Initialise a network with random weights from torch's global generator.

    Args:
        name: a key of `MODELS`, a registered name, "timm/NAME" or "torchvision/NAME".
        in_channels: channels of the images, >= 1.
        image_size: height and width in pixels, one number if they are equal, >= 1; some networks
            need more.
        classes: number of logits, >= 2.
        width: channels of the first stage, >= 1, for the ResNet-18s; left out: 64, as in the
            literature.
        drop_path: for networks of timm and torchvision, 0 <= p < 1: the probability that the
            deepest residual branch is left out for an image; left out: the network's own.
        mean, std: for normalisation inside the model, one number a channel; both or neither.
            Without them the state dict has no `mu` and `sigma`.
    Raises:
        EngineError: for an unknown name, an image size that does not fit, numbers out of range, a
            width for a network that has only one, a package that is not installed, or a network
            that does not return logits.
    """
    _check_name(name)
    sides = [image_size] * 2 if isinstance(image_size, int) else list(image_size)
    if len(sides) != 2:
        raise EngineError(f"image_size of model {name} is a height and a width, got {sides}")
    size = (sides[0], sides[1])
    for what, value, least in (
        ("in_channels", in_channels, 1),
        ("image_size", min(size), 1),
        ("classes", classes, 2),
        ("width", 1 if width is None else width, 1),
    ):
        if value < least:
            raise EngineError(f"{what} of model {name} must be at least {least}, got {value}")
    if (mean is None) != (std is None):
        raise EngineError(f"model {name} needs both mean and std to normalise, or neither")
    if width is not None and name not in _WIDE:
        raise EngineError(
            f"model {name} has one width only: model.width is for {' and '.join(_WIDE)}"
        )
    if drop_path is not None and name.partition("/")[0] not in SOURCES:
        raise EngineError(
            f"model {name} has no drop-path: model.drop_path is for networks of timm, torchvision"
        )
    if name in MODELS:
        options = {} if width is None else {"width": width}
        model = MODELS[name](in_channels, size, classes, **options)
    else:
        net = _made(name, in_channels, size, classes, drop_path)
        model = wrap(net, name, in_channels=in_channels, size=size, classes=classes)
    avoid_strides(model, model.stem_conv)
    if mean is not None and std is not None:
        try:
            model.normalise(mean, std)
        except ValueError as error:
            raise EngineError(f"model {name}: {error}") from error
    return model


def _check_name(name: str) -> None:
    if is_known(name):
        return
    known = names()
    near = difflib.get_close_matches(name[:100].lower(), known, n=1, cutoff=0.0)[0]
    raise EngineError(
        f"unknown model {name!r}: did you mean {near!r}? There are {', '.join(known)}, timm/NAME "
        "and torchvision/NAME; --import MODULE brings your own"
    )


def _made(
    name: str, in_channels: int, size: tuple[int, int], classes: int, drop_path: float | None
) -> nn.Module:
    """Make a network that is not the engine's own."""
    source, _, rest = name.partition("/")
    try:
        if name in _registered:
            net = _registered[name](in_channels, size, classes)
        else:
            net = SOURCES[source](rest, in_channels, size, classes, drop_path)
    except EngineError:
        raise
    except Exception as error:
        if drop_path is not None and DROP_PATH in str(error):
            raise EngineError(f"network {name} has no drop-path: drop model.drop_path") from error
        shape = "x".join(map(str, (in_channels, *size)))
        raise EngineError(
            f"network {name} cannot be made for images of {shape} and {classes} classes: "
            f"{one_line(error)}"
        ) from error
    if not isinstance(net, nn.Module):
        raise EngineError(f"network {name}: its maker returned no module, but {net!r:.60}")
    return net
