"""The arithmetic of the network's passes, and the loss scale that float16 needs.

Weights, momentum, moving average and the attack's iterates are float32 throughout. bf16 and fp16
run the network under autocast; tf32 lets convolutions and matrix products round their float32
inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import EngineError

Precision = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve(name: str, device: torch.device) -> str:
    """Return the precision for `device`; "auto" is bf16 on GPUs that have it, fp32 elsewhere.

    Raises:
        EngineError: for a precision that the device does not have.
    """
    cuda = device.type == "cuda"
    if name == "auto":
        return (
            "bf16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        )
    if name == "tf32" and not (cuda and torch.cuda.get_device_capability(device) >= (8, 0)):
        raise EngineError("step.precision = tf32 needs an NVIDIA GPU, Ampere or newer: take fp32")
    return name


@contextlib.contextmanager
def passes(precision: str, device: torch.device) -> Iterator[None]:
    """Run network passes in the block in `precision`, as `resolve` gave it.

    A weight is cast once a block: autocast's cache holds the casts, and the block's end empties it.
    So a captured graph holds its own casts, never an earlier one.
    """
    with arithmetic(precision, device):
        if precision in AUTOCAST:
            with torch.autocast(device.type, AUTOCAST[precision]):
                yield
        else:
            yield


@contextlib.contextmanager
def arithmetic(precision: str, device: torch.device) -> Iterator[None]:
    """Compute float32 products in the block exactly (fp32) or rounded (tf32), backward passes too.

    By default PyTorch rounds in convolutions and not in matrix products. Autocast does not reach
    backward passes, which take the types of their forward passes; these settings hold for all
    operators.
    """
    if device.type != "cuda" or precision in AUTOCAST:
        yield
        return
    rounded = precision == "tf32"
    cudnn: Any = torch.backends.cudnn  # its attributes are made at run time
    knobs: tuple[Any, ...] = (cudnn.conv, cudnn.rnn, torch.backends.cuda.matmul)
    before, older = [knob.fp32_precision for knob in knobs], _older_flags()
    # Older flags first, for readers in the block: PyTorch raises where old and new ones disagree.
    _set_older_flags((rounded, "high" if rounded else "highest"))
    for knob in knobs:
        knob.fp32_precision = "tf32" if rounded else "ieee"
    try:
        yield
    finally:
        if older is not None:
            _set_older_flags(older)
        for knob, was in zip(knobs, before, strict=True):
            knob.fp32_precision = was


def _older_flags() -> tuple[bool, str] | None:
    """Return PyTorch's flags from before 2.9, or None where the newer ones disagree with them."""
    try:
        return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _set_older_flags(flags: tuple[bool, str]) -> None:
    torch.backends.cudnn.allow_tf32, products = flags
    torch.set_float32_matmul_precision(products)


@contextlib.contextmanager
def repeatable(wanted: bool) -> Iterator[None]:
    """Make cuDNN take algorithms in the block that give the same bits each time, if `wanted`."""
    if not wanted:
        yield
        return
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


class LossScale:
    """Hold the loss scale on the device: a constant 1, or float16's dynamic scale.

    Gradients are unscaled and searched for inf and NaN in one pass. A step with one of them leaves
    weights, momentum and moving average alone; BatchNorm's statistics stay changed. A dynamic scale
    is halved by such a step, and doubled after `interval` steps without (Micikevicius et al., arXiv
    1710.03740).

    Attributes:
        scale: float32 0-d, the factor of the loss: the seed of the backward pass.
        found_inf: float32 0-d, 1 where the last gradients held an inf or a NaN.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        dynamic: bool,
        initial: float = 2.0**16,
        interval: int = 2000,
    ) -> None:
        self.dynamic, self.interval = dynamic, interval
        self.scale = torch.full((), initial if dynamic else 1.0, device=device)
        self.found_inf = torch.zeros((), device=device)
        self._tracker = torch.zeros((), dtype=torch.int32, device=device)

    def unscale_(self, grads: list[Tensor]) -> None:
        """Divide by the scale, in place, and set `found_inf`."""
        self.found_inf.zero_()
        torch._amp_foreach_non_finite_check_and_unscale_(
            grads, self.found_inf, self.scale.reciprocal() if self.dynamic else self.scale
        )

    def update(self) -> None:
        """Adapt the scale, after the optimiser's step."""
        if self.dynamic:
            torch._amp_update_scale_(
                self.scale, self._tracker, self.found_inf, 2.0, 0.5, self.interval
            )

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that a step changes."""
        return {"scale": self.scale, "found_inf": self.found_inf, "tracker": self._tracker}
