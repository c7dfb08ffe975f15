"""Checks of the arguments of ops; every error names the argument."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..layout import same_order

Scalar = float | Tensor
NORMS = ("Linf", "L2")
FLOATS = (torch.float32, torch.float64)
_LOGITS = (*FLOATS, torch.float16, torch.bfloat16)


def check_like(name: str, t: Tensor, like: Tensor, like_name: str) -> Tensor:
    """Return `t` in the layout of `like`, after a check that both have one shape and device."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.shape != like.shape:
        raise ValueError(f"{name} has shape {tuple(t.shape)}, {like_name} has {tuple(like.shape)}")
    if t.device != like.device:
        raise ValueError(f"{name} is on {t.device}, {like_name} on {like.device}")
    if t.stride() == like.stride():
        return t
    if same_order(t, like):
        # With one channel, contiguous and channels_last are the same layout with other strides.
        return t.as_strided(like.shape, like.stride())
    return torch.empty_like(like, dtype=t.dtype).copy_(t)


def check_images(name: str, x: Tensor) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be float32 (or float64), got {x.dtype}")
    if not (x.dim() >= 2):
        raise ValueError(f"{name} must be [B, ...], got shape {tuple(x.shape)}")
    return x if same_order(x, x) else x.contiguous()


def check_logits(name: str, t: Tensor) -> Tensor:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in _LOGITS:
        raise TypeError(f"{name} must be a float tensor, got {t.dtype}")
    if not (t.dim() == 2 and t.shape[1] >= 1):
        raise ValueError(f"{name} must be [B, K], got {tuple(t.shape)}")
    return t.contiguous()


def check_target(target: Tensor, logits: Tensor) -> Tensor:
    if target.dtype != torch.int64:
        raise TypeError(f"target must be int64, got {target.dtype}")
    if target.shape != logits.shape[:1]:
        raise ValueError(f"target must have shape ({logits.shape[0]},), got {tuple(target.shape)}")
    if target.device != logits.device:
        raise ValueError(f"target is on {target.device}, not {logits.device}")
    return target.contiguous()


@lru_cache(maxsize=1024)
def _cached(value: float, device: torch.device) -> Tensor:
    # Not an inference tensor, whoever asks first: autograd will have to save it.
    with torch.inference_mode(False):
        made = torch.tensor(value, dtype=torch.float32, device=device)
    made.is_constant = True  # type: ignore[attr-defined]
    return made


# A captured graph reads its constants at every replay, long after the cache has forgotten them.
_pinned: dict[int, Tensor] = {}


def constant(value: float, device: torch.device) -> Tensor:
    """Return a read-only float32 0-d tensor, the same tensor for the same number.

    The tensor has the attribute `is_constant`.

    A new constant needs a copy from the host, which a graph capture does not allow. Ask for each
    constant once before a capture begins.
    """
    if torch.compiler.is_compiling() or isinstance(_get_current_dispatch_mode(), FakeTensorMode):
        # Filled by the device: torch.tensor would put a copy from the host into the compiled graph.
        return torch.full((), value, dtype=torch.float32, device=device)
    made = _cached(value, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _pinned[id(made)] = made
    return made


def check_scalar(name: str, value: Scalar, like: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        return constant(float(value), like.device)
    if value.numel() != 1:
        raise ValueError(f"{name} must be one number, got shape {tuple(value.shape)}")
    if not value.is_floating_point():
        raise TypeError(f"{name} must be a float tensor, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, not {like.device}")
    return value if value.dim() == 0 else value.reshape(())


def check_norm(norm: str) -> None:
    if norm not in NORMS:
        raise ValueError(f"norm must be 'Linf' or 'L2', got {norm!r}")


def check_rng(rng: Tensor, like: Tensor) -> None:
    if not (isinstance(rng, Tensor) and rng.dtype == torch.int64 and rng.shape == (2,)):
        raise TypeError("rng must be an int64 tensor (seed, step)")
    if rng.device != like.device:
        raise ValueError(f"rng is on {rng.device}, not {like.device}")


def check_index(index: Tensor, images: Tensor, name: str) -> Tensor:
    if index.dtype != torch.int64:
        raise TypeError(f"index must be int64, got {index.dtype}")
    if index.dim() != 1:
        raise ValueError(f"index must be [B], got {tuple(index.shape)}")
    if index.device != images.device:
        raise ValueError(f"index is on {index.device}, {name} on {images.device}")
    return index.contiguous()
