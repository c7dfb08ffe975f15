"""Other people's networks as a `Network`: normalisation inside, the stem found, the logits checked.

A stem is found by observation: one pass over random images tells which convolution reads the images
themselves. Numbers then prove it: the rest of the network gives the same logits from the
convolution's output alone, and the input gradient through the stem is autograd's.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..errors import EngineError
from ..progress import announce_once
from ..rng import state as rng_state
from .dropout import adopt, follow
from .network import Network, Opening, is_plain

log = logging.getLogger(__name__)

# Images of the probing passes; BatchNorm over images of one pixel needs two.
_PROBED = 2
# How far two orders of summing the same float32 numbers may lie apart, against the largest.
_TOLERANCE = 1e-3
# What was found before in this process, by network, images and classes: the first convolution's
# name and whether its output is written to; None without a stem.
_known: dict[tuple[object, ...], tuple[str, bool] | None] = {}


class Foreign(Network):
    """Hold a module that maps images to logits as `net`; the state dict has the module's own names.

    The body calls the module on a stand-in for the images, and the module's first convolution then
    returns the stem's output. Without a stem, the body calls the module on the normalised images.
    """

    stem_name = None

    def __init__(self, net: nn.Module, in_channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.net = net
        self._channels, self._size = in_channels, size
        self._writes = False
        self.register_state_dict_post_hook(_shorten)
        self.register_load_state_dict_pre_hook(_lengthen)

    @property
    def in_channels(self) -> int:
        return self._channels

    def open_at(self, name: str, *, writes: bool) -> None:
        """Make the convolution `name` of the module the stem.

        Args:
            writes: whether the module changes the convolution's output in place. The body then
                copies its argument.
        """
        self.net.get_submodule(name).__class__ = Opening
        self.stem_name, self._writes = f"net.{name}", writes

    def close(self) -> None:
        """Do without a stem."""
        if self.stem_conv is not None:
            self.stem_conv.__class__ = nn.Conv2d
        self.stem_name = None

    def body(self, h: Tensor) -> Tensor:
        opening = self.stem_conv
        if not isinstance(opening, Opening):
            return self.net(h)
        # A view of one number of `h` has the images' shape and takes no memory. Nothing reads it.
        images = h.detach()[:, :1, :1, :1].expand(-1, self._channels, *self._images_of(h, opening))
        return self.rest(images, h.clone() if self._writes else h)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            # The same in one piece, for graphs that others run.
            return self.net(self.scaled(x))
        return super().forward(x)

    def rest(self, images: Tensor, h: Tensor) -> Tensor:
        """Run the module on `images`, with `h` as the output of its first convolution."""
        opening = self.stem_conv
        assert isinstance(opening, Opening)
        opening.given = h
        try:
            return self.net(images)
        finally:
            opening.given = None

    def _images_of(self, h: Tensor, opening: nn.Conv2d) -> tuple[int, int]:
        """Return a size of images, [H, W], of which the convolution makes one of `h`'s size."""
        found = (h.shape[2], h.shape[3])
        if _outputs(self._size, opening) == found:
            return self._size
        height, width = (
            (n - 1) * opening.stride[i] + opening.kernel_size[i] - 2 * int(opening.padding[i])
            for i, n in enumerate(found)
        )
        return height, width


def _outputs(size: tuple[int, int], conv: nn.Conv2d) -> tuple[int, ...]:
    return tuple(
        (n + 2 * int(conv.padding[i]) - conv.kernel_size[i]) // conv.stride[i] + 1
        for i, n in enumerate(size)
    )


def _shorten(module: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
    for key in [key for key in state if key.startswith(f"{prefix}net.")]:
        state[prefix + key.removeprefix(f"{prefix}net.")] = state.pop(key)


def _lengthen(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        short = key.removeprefix(prefix)
        if short not in ("mu", "sigma"):
            state[f"{prefix}net.{short}"] = state.pop(key)


def wrap(
    net: nn.Module, name: str, *, in_channels: int, size: tuple[int, int], classes: int
) -> Network:
    """Return `net` as a `Network`, with its stem if one is found, after a look at its logits.

    A `Network` is returned as it is, after the same look. On the meta device there are no numbers
    to look at: the stem is then the convolution that reads the images.

    Args:
        name: of the network, for messages.
        in_channels, size: of the images, C and [H, W]; classes: the number of logits.
    Raises:
        EngineError: if the network does not take such images, or returns anything but finite
            logits [B, K] of this number of classes.
    """
    first = next(net.parameters(), None)
    if first is None:
        raise EngineError(f"network {name} has no parameters to train")
    adopt(net)
    model = net if isinstance(net, Network) else Foreign(net, in_channels, size)
    key = (name, in_channels, size, classes, first.is_meta)
    if key not in _known:
        with torch.device(first.device), _restored(model):
            _known[key] = _probed(model, name, _random(in_channels, size, first.device), classes)
    elif isinstance(model, Foreign) and (stem := _known[key]):
        model.open_at(stem[0], writes=stem[1])
    return model


def _random(in_channels: int, size: tuple[int, int], device: torch.device) -> Tensor:
    draw = torch.Generator("cpu").manual_seed(0)
    return torch.rand((_PROBED, in_channels, *size), generator=draw, device="cpu").to(device)


def _probed(model: Network, name: str, x: Tensor, classes: int) -> tuple[str, bool] | None:
    """Check the logits in both modes; find and open the stem, and return it."""
    _check_training(model, x, name, classes)
    model.eval()
    check_logits(_called(model, x, name), name, len(x), classes)
    if not isinstance(model, Foreign):
        return None
    with _stirred(model):
        return _find_stem(model, x, name)


def check_logits(logits: object, name: str, images: int, classes: int) -> None:
    """Raise an EngineError for anything but finite logits [images, classes]."""
    if not isinstance(logits, Tensor):
        raise EngineError(
            f"network {name} returns a {type(logits).__name__}: it must return the logits alone, "
            "one tensor [B, K]"
        )
    if logits.shape != (images, classes):
        raise EngineError(
            f"network {name} returns {list(logits.shape)} for {images} images of {classes} "
            f"classes: it must return logits [{images}, {classes}]"
        )
    if not logits.is_floating_point():
        raise EngineError(f"network {name} returns {logits.dtype}: logits are float numbers")
    if logits.is_meta:
        return
    if not bool(logits.isfinite().all()):
        raise EngineError(f"network {name} returns NaN or infinity on random images in [0, 1]")
    sums = logits.detach().float().sum(1)
    if bool((logits >= 0).all()) and bool((sums - 1).abs().max() < 1e-4):
        raise EngineError(
            f"network {name} returns probabilities: it must return logits, without the softmax"
        )


def _check_training(model: nn.Module, x: Tensor, name: str, classes: int) -> None:
    """Look at the logits of a training pass, and say if the network draws numbers of its own."""
    model.train()
    follow(model, rng_state(0, x.device))
    with torch.random.fork_rng(devices=[]):
        before = torch.get_rng_state()
        logits = _called(model, x, name, " while training")
        drew = not torch.equal(before, torch.get_rng_state())
    follow(model, None)
    check_logits(logits, name, len(x), classes)
    if drew:
        announce_once(
            log,
            f"network {name} draws random numbers outside the run's own random state: a resumed "
            "run draws others, and its step cannot be captured in a CUDA graph",
        )


def _called(model: nn.Module, x: Tensor, name: str, when: str = "") -> object:
    try:
        with torch.no_grad():
            return model(x)
    except EngineError:
        raise
    except Exception as error:
        raise EngineError(
            f"network {name} does not take images of {'x'.join(map(str, x.shape[1:]))}{when}: "
            f"{one_line(error)}"
        ) from error


def one_line(error: BaseException) -> str:
    """Return the kind and the text of an exception in one line of at most 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(": ")


def _find_stem(model: Foreign, x: Tensor, name: str) -> tuple[str, bool] | None:
    """Give `model`, in evaluation mode, its stem if it has one; else say that it has none."""
    found = _first_convolution(model.net, x)
    if found is not None:
        with torch.no_grad():
            h = model.net.get_submodule(found)(x)
            version = h._version
            model.open_at(found, writes=False)
            model.rest(x, h)
        writes = h._version != version
        model.open_at(found, writes=writes)
        if x.is_meta or _proven(model, x):
            return found, writes
        model.close()
    announce_once(
        log,
        f"network {name} does not begin with a plain convolution: attacks differentiate it down to "
        "the pixels",
    )
    return None


def _first_convolution(net: nn.Module, x: Tensor) -> str | None:
    """Return the name of the plain convolution that reads `x` itself, once; else None."""
    calls: list[tuple[str, bool]] = []

    def watch(name: str) -> Callable[..., None]:
        def before(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            calls.append((name, bool(inputs) and inputs[0] is x))

        return before

    convolutions = {name: m for name, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    plain = {name: m for name, m in convolutions.items() if type(m) is nn.Conv2d and is_plain(m)}
    handles = [m.register_forward_pre_hook(watch(name)) for name, m in plain.items()]
    try:
        with torch.no_grad():
            net(x)
    finally:
        for handle in handles:
            handle.remove()
    readers = [name for name, reads in calls if reads]
    used = [name for name, _ in calls]
    return readers[0] if len(readers) == 1 and used.count(readers[0]) == 1 else None


def _proven(model: Foreign, x: Tensor) -> bool:
    """Tell whether the stem carries all that the network makes of `x`: values and gradient."""
    conv = model.stem_conv
    assert conv is not None
    with torch.enable_grad():
        pixels = x.clone().requires_grad_()
        # Nothing but the convolution may read the images.
        whole, part = model.net(pixels), model.rest(torch.full_like(x, torch.nan), conv(x))
        if not _near(part, whole):
            return False
        draw = torch.Generator("cpu").manual_seed(1)
        towards = torch.randn(whole.shape, generator=draw, device="cpu").to(x.device)
        h = conv(x).detach().requires_grad_()
        (wanted,) = torch.autograd.grad(whole, pixels, towards)
        (at_stem,) = torch.autograd.grad(model.body(h), h, towards)
    found = kernels.stem_input_grad(
        at_stem,
        conv.weight.detach(),
        size=(x.shape[2], x.shape[3]),
        stride=conv.stride[0],
        padding=int(conv.padding[0]),
    )
    return _near(found, wanted)


def _near(a: Tensor, b: Tensor) -> bool:
    """Compare against the largest number; False for NaN, and where all is 0 and proves nothing."""
    largest = b.abs().max()
    return bool(largest > 0) and bool((a - b).abs().max() <= _TOLERANCE * largest)


@contextlib.contextmanager
def _stirred(model: nn.Module) -> Iterator[None]:
    """Fill the parameters that start at zero with random numbers, and set them to zero afterwards.

    A head or a residual branch of zeros would hide what the network does with its images.
    """
    zeros = [p for p in model.parameters() if not p.is_meta and not bool(p.any())]
    draw = torch.Generator("cpu").manual_seed(2)
    with torch.no_grad():
        for p in zeros:
            p.copy_(0.1 * torch.randn(p.shape, generator=draw, device="cpu"))
        try:
            yield
        finally:
            for p in zeros:
                p.zero_()


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Restore the buffers and the modes of all modules afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    buffers = [(t, t.clone()) for t in model.buffers()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for t, before in buffers:
            t.copy_(before)
