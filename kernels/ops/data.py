"""Batches of a resident dataset, and the adversary memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import (
    Scalar,
    check_images,
    check_index,
    check_like,
    check_norm,
    check_rng,
    check_scalar,
)
from .define import define

# The op compares 16 random bits with this part of `erase`.
ERASE_UNIT = 1 << 16

_augment = define(
    "augment",
    "(Tensor images, Tensor index, Tensor rng, int pad, bool flip, int cutout, int stream, "
    "Tensor? memory, Tensor? eps, str norm, bool cutmix, int erase, float jitter) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.register_fake("engine::augment")
def _(images, index, rng, pad, flip, cutout, stream, memory, eps, norm, cutmix, erase, jitter):
    b = index.shape[0]
    x = images.new_empty((b, *images.shape[1:]), dtype=torch.float32)
    crops = images.new_empty((b, 3), dtype=torch.int32)
    start = x.new_empty(0) if memory is None else torch.empty_like(x)
    return x, crops, start, x.new_empty(b if cutmix else 0)


class Augmented(NamedTuple):
    """Hold a batch that `augment` made.

    Attributes:
        x: float32 [B, C, H, W] in [0, 1].
        crops: int32 [B, 3], (dy, dx, mirrored) of every sample, for `recall` and `remember`.
        start: float32 [B, C, H, W], `recall(memory, index, crops, x, eps, norm=norm)` bit for bit;
            None without a memory.
        share: float32 [B], the share of each image's pixels that are its own; the others come from
            the next sample, the last sample's from the first. None without CutMix.
    """

    x: Tensor
    crops: Tensor
    start: Tensor | None
    share: Tensor | None


def augment(
    images: Tensor,
    index: Tensor,
    rng: Tensor,
    *,
    pad: int = 0,
    flip: bool = False,
    cutout: int = 0,
    stream: int = 2,
    memory: Tensor | None = None,
    eps: Scalar | None = None,
    norm: str = "Linf",
    cutmix: bool = False,
    erase: float = 0.0,
    jitter: float = 0.0,
) -> Augmented:
    """Make a training batch of a resident uint8 dataset: gather, crop, mirror, scale to [0, 1].

    With an adversary memory, also return the attack's start (Linf: in the same pass over memory).

    Args:
        images: uint8 [N, C, H, W], contiguous.
        index: int64 [B], in [0, N).
        rng: int64 [2], (seed, step).
        pad: largest shift of a crop in pixels, in [0, min(H, W)); pixels outside the image are 0.
        flip: mirror half of the samples left to right.
        cutout: side in pixels of a square that is set to 0, in [0, 2 min(H, W)]; its centre is
            uniform in the image (DeVries & Taylor, arXiv 1708.04552). 0: no square.
        memory: int8 [N, C, H, W], contiguous, as for `recall`.
        eps: radius in pixel units, >= 0; needed with a memory.
        norm: "Linf" or "L2", the norm of the start's ball.
        cutmix: replace a box of every image by the same box of the next sample's (Yun et al., arXiv
            1905.04899). The box's share of the area is uniform in [0, 1) and its centre uniform in
            the image, which cuts it off. Not with a memory, which holds no mixed images.
        erase: share of the samples, in [0, 1], of which a rectangle is set to 0, after Zhong et al.
            (arXiv 1708.04896). Its sides are uniform up to half the image's, and its centre is as
            cutout's; not with cutout.
        jitter: largest relative change, in [0, 1), of brightness, contrast (around 0.5) and
            saturation, in this order; three channels.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images must be uint8, got {images.dtype}")
    if images.dim() != 4:
        raise ValueError(f"images must be [N, C, H, W], got {tuple(images.shape)}")
    if not images.is_contiguous():
        raise ValueError("images must be contiguous")
    if not (0 <= pad < min(images.shape[2:])):
        raise ValueError(f"pad must be in [0, {min(images.shape[2:])}): {pad}")
    if not (0 <= cutout <= 2 * min(images.shape[2:])):
        raise ValueError(f"cutout must be in [0, {2 * min(images.shape[2:])}]: {cutout}")
    _check_changes(images, cutout, cutmix, erase, jitter, memory)
    check_rng(rng, images)
    check_norm(norm)
    index = check_index(index, images, "images")
    radius = None
    if memory is not None:
        _check_memory_tensor(memory)
        if memory.shape != images.shape:
            raise ValueError(f"memory is {tuple(memory.shape)}, images {tuple(images.shape)}")
        if memory.device != images.device:
            raise ValueError(f"memory is on {memory.device}, images on {images.device}")
        if eps is None:
            raise ValueError("eps is missing: memory holds steps of eps / 127")
        radius = check_scalar("eps", eps, images)
    x, crops, start, share = _augment(
        images, index, rng, int(pad), bool(flip), int(cutout), stream, memory, radius, norm,
        bool(cutmix), round(erase * ERASE_UNIT), float(jitter),
    )  # fmt: skip
    return Augmented(x, crops, None if memory is None else start, share if cutmix else None)


def _check_changes(
    images: Tensor, cutout: int, cutmix: bool, erase: float, jitter: float, memory: Tensor | None
) -> None:
    if cutmix and memory is not None:
        raise ValueError("cutmix: a memory holds no mixed images")
    if not (0.0 <= erase <= 1.0):
        raise ValueError(f"erase must be in [0, 1]: {erase}")
    if erase and cutout:
        raise ValueError("erase and cutout both set a part of the image to 0: take one")
    if not (0.0 <= jitter < 1.0):
        raise ValueError(f"jitter must be in [0, 1): {jitter}")
    if jitter and images.shape[1] != 3:
        raise ValueError(f"jitter needs images of 3 channels, got {images.shape[1]}")


_recall = define(
    "recall",
    "(Tensor memory, Tensor index, Tensor crops, Tensor x, Tensor eps, str norm) -> Tensor",
)


@torch.library.register_fake("engine::recall")
def _(memory, index, crops, x, eps, norm):
    return torch.empty_like(x)


def _check_memory_tensor(memory: Tensor) -> None:
    if memory.dtype != torch.int8:
        raise TypeError(f"memory must be int8, got {memory.dtype}")
    if not (memory.dim() == 4 and memory.is_contiguous()):
        raise ValueError("memory must be a contiguous [N, C, H, W]")


def _check_memory(memory: Tensor, index: Tensor, crops: Tensor, x: Tensor) -> Tensor:
    _check_memory_tensor(memory)
    if x.shape[1:] != memory.shape[1:]:
        raise ValueError(f"x {tuple(x.shape)} does not fit the memory's images")
    index = check_index(index, memory, "memory")
    if len(index) != len(x):
        raise ValueError(f"index has {len(index)} entries for {len(x)} images")
    if not (crops.dtype == torch.int32 and crops.shape == (len(x), 3)):
        raise TypeError(f"crops must be int32 [{len(x)}, 3]")
    for name, t in (("crops", crops), ("x", x)):
        if t.device != memory.device:
            raise ValueError(f"{name} is on {t.device}, memory on {memory.device}")
    return index


def recall(
    memory: Tensor,
    index: Tensor,
    crops: Tensor,
    x: Tensor,
    eps: Scalar,
    *,
    norm: str = "Linf",
) -> Tensor:
    """Return the attack's start: `x` plus each sample's perturbation from the adversary memory.

    The op serves batches that `augment` did not make. It crops and mirrors the perturbation like
    the image, sets it to zero in the padding, and projects the start into the ball and [0, 1].
    ATTA (Zheng et al., arXiv 1912.11969) and FGSM-EP (Jia et al., arXiv 2207.08859) start so.

    Args:
        memory: int8 [N, C, H, W], in steps of eps / 127.
        index: int64 [B]; crops: int32 [B, 3] as from `augment`.
        x: float32 [B, C, H, W], the augmented batch.
    Returns:
        Like `x`.
    """
    x = check_images("x", x)
    check_norm(norm)
    index = _check_memory(memory, index, crops, x)
    return _recall(memory, index, crops.contiguous(), x, check_scalar("eps", eps, x), norm)


_remember = define(
    "remember",
    "(Tensor(a!) memory, Tensor index, Tensor crops, Tensor x, Tensor z, Tensor eps) -> ()",
)


@torch.library.register_fake("engine::remember")
def _(memory, index, crops, x, z, eps):
    return None


def remember(
    memory: Tensor, index: Tensor, crops: Tensor, x: Tensor, z: Tensor, eps: Scalar
) -> None:
    """Write the perturbation z - x into `memory`, in place, through the inverse crop and mirror.

    Pixels outside the crop keep their stored values. The arguments are those of `recall`, and the
    adversaries z, like `x`. If an index occurs twice, every pixel keeps one of its two values.
    Which one is undefined, and on CUDA it may differ from pixel to pixel.
    """
    x = check_images("x", x)
    z = check_like("z", z, x, "x")
    index = _check_memory(memory, index, crops, x)
    _remember(memory, index, crops.contiguous(), x, z, check_scalar("eps", eps, x))
