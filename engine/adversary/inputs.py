"""What users hand over from Python: a network, images and labels, and the checks of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import EngineError
from ..kernels.layout import same_order


def device_of(model: nn.Module) -> torch.device | None:
    """Return the device of a float32 module; None where it has no parameters.

    Raises:
        EngineError: for anything but a module, or for parameters in another precision.
    """
    if not isinstance(model, nn.Module):
        raise EngineError(f"the model must be a torch.nn.Module, not {type(model).__name__}")
    parameter = next(model.parameters(), None)
    if parameter is None:
        return None
    if parameter.dtype != torch.float32:
        raise EngineError(
            f"the model's parameters are {_name(parameter.dtype)}: pass model.float(); train and "
            "evaluate have an argument precision for the passes"
        )
    return parameter.device


def check_pair(x: object, y: object) -> None:
    """Raise an EngineError for anything but tensors: images, and a whole number for each."""
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)):
        given = f"{type(x).__name__} and {type(y).__name__}"
        raise EngineError(f"images and labels must be tensors or NumPy arrays, got {given}")
    if x.dim() == 0 or y.dim() == 0 or len(x) == 0 or len(x) != len(y):
        counts = [len(t) if t.dim() else 0 for t in (x, y)]
        raise EngineError(f"each image needs a label: got {counts[0]} images, {counts[1]} labels")
    if y.dim() != 1 or y.is_floating_point() or y.dtype == torch.bool:
        raise EngineError(
            f"labels must be whole numbers [N], one an image: got {_name(y.dtype)} {list(y.shape)}"
        )


def check_device(x: Tensor, y: Tensor, device: torch.device | None) -> None:
    """Raise an EngineError for images and labels that are not where the model is, if it is."""
    if x.device != y.device or device not in (None, x.device):
        raise EngineError(
            f"images on {x.device}, labels on {y.device}, the model on {device or x.device}: move "
            "them to one device"
        )


def ready(
    x: Tensor, y: Tensor, device: torch.device | None, *, pictures: bool
) -> tuple[Tensor, Tensor]:
    """Return images and labels in the form that the attacks take.

    The images share the caller's memory where they are dense, contiguous or channels_last.

    Args:
        device: of the model, if it has one.
        pictures: whether the images must be [N, C, H, W], as for AutoAttack.
    Returns:
        Images without a graph, and labels int64 [N].
    Raises:
        EngineError: as `check_pair` does, for images that are not float32 in [0, 1], and for
            tensors on another device.
    """
    check_pair(x, y)
    if pictures and x.dim() != 4:
        raise EngineError(f"AutoAttack takes images [N, C, H, W], got {list(x.shape)}")
    check_device(x, y, device)
    x = x.clone() if x.is_inference() else x.detach()
    # NaN compares as false.
    if x.dtype != torch.float32 or not (float(x.min()) >= 0 and float(x.max()) <= 1):
        raise EngineError(
            "images must be float32 in [0, 1]: put the normalisation inside the model, not in the "
            "data"
        )
    return x if same_order(x, x) else x.contiguous(), y.long()


def check_network(model: nn.Module, x: Tensor, y: Tensor) -> int:
    """Return the number of classes of a network that can be attacked on these images.

    Args:
        model: in evaluation mode; x: float32 [N, ...]; y: whole numbers [N], or some of all labels.
    Raises:
        EngineError: in inference mode; for a network that returns no logits [N, K] of two classes
            or more, passes no gradient to its images, or writes into them; for a label that it has
            no logit for.
    """
    if torch.is_inference_mode_enabled():
        raise EngineError("an attack needs gradients: call it outside torch.inference_mode()")
    first = x[:1].clone()
    version = first._version
    with torch.no_grad():
        model(first)
    if first._version != version:
        raise EngineError(
            "the model writes into the images that it is given: let it work on a copy (x = x - "
            "mean, not x -= mean)"
        )
    with torch.enable_grad():
        logits = model(x[:1].clone().requires_grad_())
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise EngineError(f"the model must return logits [N, K], got {found}")
    classes = logits.shape[1]
    if classes < 2:
        raise EngineError(f"an attack needs at least 2 classes, the model has {classes}")
    if not logits.requires_grad:
        raise EngineError(
            "the model passes no gradient to its images, so attacks by gradients say nothing about "
            "it: remove torch.no_grad() and detach() from its forward pass"
        )
    low, high = (int(t) for t in y.aminmax())
    if low < 0 or high >= classes:
        raise EngineError(f"labels from {low} to {high}, but the model has {classes} classes")
    return classes


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
