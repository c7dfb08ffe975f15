"""The networks by name, from images in [0, 1] to logits, with the normalisation inside.

The keys of a state dict are RobustBench's. A network that RobustBench lacks has the keys of its
source.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence

from ..errors import EngineError
from .network import Network, Stem, stem_of
from .resnet import PreActResNet18, ResNet18
from .small import FastAtMnist, SmallCnn, TinyCnn
from .wide_resnet import WideResNet34x10

__all__ = ["MODELS", "Network", "Stem", "build", "stem_of"]

# Each is called with (in_channels, image_size, classes); those of `_WIDE` take `width` too.
MODELS: dict[str, Callable[..., Network]] = {
    "tiny-cnn": TinyCnn,
    "fast-at-mnist": FastAtMnist,
    "small-cnn": SmallCnn,
    "resnet18": ResNet18,
    "preact-resnet18": PreActResNet18,
    "wide-resnet34-10": WideResNet34x10,
}
_WIDE = ("resnet18", "preact-resnet18")


def build(
    name: str,
    *,
    in_channels: int,
    image_size: int,
    classes: int,
    width: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Network:
    """Initialise a network with random weights from torch's global generator.

    Args:
        name: a key of `MODELS`.
        in_channels: channels of the images, >= 1.
        image_size: height and width in pixels, >= 1; some networks need more.
        classes: number of logits, >= 2.
        width: channels of the first stage, >= 1, for the ResNet-18s; left out: 64, as in the
            literature.
        mean, std: for normalisation inside the model, one number a channel; both or neither.
            Without them the state dict has no `mu` and `sigma`.
    Raises:
        EngineError: for an unknown name, an image size that does not fit, numbers out of range, or
            a width for a network that has only one.
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name.lower(), MODELS, n=1, cutoff=0.0)[0]
        raise EngineError(
            f"unknown model {name!r}: did you mean {near!r}? There are {', '.join(MODELS)}"
        )
    for what, value, least in (
        ("in_channels", in_channels, 1),
        ("image_size", image_size, 1),
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
    options = {} if width is None else {"width": width}
    model = MODELS[name](in_channels, image_size, classes, **options)
    if mean is not None and std is not None:
        try:
            model.normalise(mean, std)
        except ValueError as error:
            raise EngineError(f"model {name}: {error}") from error
    return model
