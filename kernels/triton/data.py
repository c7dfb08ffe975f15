"""Batches of a resident dataset, and the adversary memory.

A sample is D = C * H * W elements. `crops` holds (dy, dx, mirrored) for each sample: output pixel
(y, x) shows stored pixel (y + dy, x' + dx) with x' = W - 1 - x if mirrored, else x.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import philox
from .launch import on_device, row_tile
from .maths import byte_to_unit, clip, divide, into_ball, linf_step, round_even


def _grid(rows: int, columns: int, tile: dict[str, int]) -> tuple[int, int]:
    return triton.cdiv(rows, tile["ROWS"]), triton.cdiv(columns, tile["BLOCK"])


def _shape(images: Tensor) -> dict[str, int]:
    """Return the image size as constants: divisions by constants become products."""
    _, c, h, w = images.shape
    return {"C": c, "H": h, "W": w}


def augment(
    images: Tensor,
    index: Tensor,
    rng: Tensor,
    pad: int,
    flip: bool,
    cutout: int,
    stream: int,
    memory: Tensor | None,
    eps: Tensor | None,
    norm: str,
) -> tuple[Tensor, Tensor, Tensor]:
    b, columns = index.shape[0], images[0].numel() if len(images) else 0
    x = images.new_empty((b, *images.shape[1:]), dtype=torch.float32)
    crops = images.new_empty((b, 3), dtype=torch.int32)
    # The L2 projection needs a sample's length before its first pixel: a second launch.
    fused = memory is not None and norm == "Linf"
    start = torch.empty_like(x) if fused else x.new_empty(0)
    tile = row_tile(b, columns, elements=1024, widest=1024)
    with on_device(images):
        augment_kernel[_grid(b, columns, tile)](
            images, index, rng, x, crops, *((memory, start, eps) if fused else (None, None, None)),
            pad, stream, b, FLIP=flip, CUTOUT=cutout, **_shape(images), **tile,
            enable_fp_fusion=False,
        )  # fmt: skip
    if memory is not None and eps is not None and not fused:
        start = recall(memory, index, crops, x, eps, norm)
    return x, crops, start


def recall(
    memory: Tensor, index: Tensor, crops: Tensor, x: Tensor, eps: Tensor, norm: str
) -> Tensor:
    out, rows, columns = torch.empty_like(x), x.shape[0], x.numel() // max(x.shape[0], 1)
    last = not x.is_contiguous()
    with on_device(x):
        if norm == "Linf":
            tile = row_tile(rows, columns, elements=1024, widest=1024)
            recall_linf_kernel[_grid(rows, columns, tile)](
                memory, index, crops, x, out, eps, rows,
                **_shape(memory), CHANNELS_LAST=last, **tile, enable_fp_fusion=False,
            )  # fmt: skip
        else:
            tile = row_tile(rows, columns, elements=1024, widest=4096, a_thread=16)
            recall_l2_kernel[(triton.cdiv(rows, tile["ROWS"]),)](
                memory, index, crops, x, out, eps, rows,
                **_shape(memory), CHANNELS_LAST=last, **tile,
            )  # fmt: skip
    return out


def remember(
    memory: Tensor, index: Tensor, crops: Tensor, x: Tensor, z: Tensor, eps: Tensor
) -> None:
    rows, columns = x.shape[0], x.numel() // max(x.shape[0], 1)
    tile = row_tile(rows, columns, elements=1024, widest=1024)
    with on_device(x):
        remember_kernel[_grid(rows, columns, tile)](
            memory, index, crops, x, z, eps, rows,
            **_shape(memory), CHANNELS_LAST=not x.is_contiguous(), **tile, enable_fp_fusion=False,
        )  # fmt: skip


@triton.jit
def _stored_pixel(
    element, dy, dx, mirrored,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Return the index in the stored [C, H, W] of an element, and a mask of those inside the image.

    `element` counts the elements of a sample in memory order.
    """
    if CHANNELS_LAST:
        channel, pixel = element % C, element // C
    else:
        channel, pixel = element // (H * W), element % (H * W)
    column = pixel % W
    y = pixel // W + dy
    x = tl.where(mirrored > 0, W - 1 - column, column) + dx
    inside = (y >= 0) & (y < H) & (x >= 0) & (x < W)
    return (channel * H + y) * W + x, inside


@triton.jit
def _crop_of(crops_ptr, row, live):
    """Load (dy, dx, mirrored) of each sample."""
    dy = tl.load(crops_ptr + row * 3, mask=live, other=0)
    dx = tl.load(crops_ptr + row * 3 + 1, mask=live, other=0)
    return dy, dx, tl.load(crops_ptr + row * 3 + 2, mask=live, other=0)


@triton.jit
def _offset(word, pad):
    """Return a whole number in [-pad, pad]: word * (2 pad + 1) / 2^32 by a product and a shift."""
    return ((word.to(tl.int64) * (2 * pad + 1)) >> 32).to(tl.int32) - pad


@triton.jit
def _linf_start(x, steps, eps_ptr):
    """Return x plus its stored steps of eps / 127, in the ball and in [0, 1]."""
    eps = tl.load(eps_ptr).to(x.dtype)
    z = x + steps.to(x.dtype) * divide(eps, 127.0)
    return linf_step(x, z, tl.zeros_like(x), eps, eps)


@triton.jit(do_not_specialize=["pad", "stream"])
def augment_kernel(
    images_ptr, index_ptr, rng_ptr, x_ptr, crops_ptr, memory_ptr, start_ptr, eps_ptr,
    pad, stream, rows, FLIP: tl.constexpr, CUTOUT: tl.constexpr,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Make a batch. Grid: (ceil(rows / ROWS), ceil(D / BLOCK)).

    Every program draws the crops of its samples, one Philox block a sample.

    Args:
        images_ptr: uint8 [N, C, H, W], contiguous; index_ptr: int64 [rows]; rng_ptr: int64 [2].
        x_ptr: float32 [rows, C, H, W], contiguous; crops_ptr: int32 [rows, 3].
        memory_ptr, start_ptr, eps_ptr: int8 [N, C, H, W]; like x; one float: for the attack's start
            in the Linf ball. All None: no start.
        CUTOUT: side of the square that is set to 0.
        pad: largest shift of a crop; stream: second counter word.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    live = row < rows
    w0, w1, w2, w3 = philox.words(rng_ptr, stream, row)
    dy, dx = _offset(w0, pad), _offset(w1, pad)
    mirrored = (w2 >> 31).to(tl.int32) if FLIP else tl.zeros_like(dy)
    if tl.program_id(1) == 0:
        tl.store(crops_ptr + row * 3, dy, mask=live)
        tl.store(crops_ptr + row * 3 + 1, dx, mask=live)
        tl.store(crops_ptr + row * 3 + 2, mirrored, mask=live)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = live & (element < C * H * W)
    source, inside = _stored_pixel(element, dy, dx, mirrored, C, H, W, False)
    image = tl.load(index_ptr + row, mask=live, other=0) * (C * H * W)
    byte = tl.load(images_ptr + image + source, mask=mask & inside, other=0)
    at = row.to(tl.int64) * (C * H * W) + element
    x = byte_to_unit(byte.to(tl.float32))
    if CUTOUT > 0:
        top = (((w3 & 0xFFFF) * H) >> 16).to(tl.int32) - CUTOUT // 2
        left = (((w3 >> 16) * W) >> 16).to(tl.int32) - CUTOUT // 2
        y, column = element // W % H - top, element % W - left
        x = tl.where((y >= 0) & (y < CUTOUT) & (column >= 0) & (column < CUTOUT), 0.0, x)
    tl.store(x_ptr + at, x, mask=mask)
    if memory_ptr is not None:
        steps = tl.load(memory_ptr + image + source, mask=mask & inside, other=0)
        tl.store(start_ptr + at, _linf_start(x, steps, eps_ptr), mask=mask)


@triton.jit
def recall_linf_kernel(
    memory_ptr, index_ptr, crops_ptr, x_ptr, out_ptr, eps_ptr, rows,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return x plus the stored perturbation, in the Linf ball and in [0, 1].

    Grid: (ceil(rows / ROWS), ceil(D / BLOCK)).

    Args:
        memory_ptr: int8 [N, C, H, W], contiguous, steps of eps / 127.
        index_ptr: int64 [rows]; crops_ptr: int32 [rows, 3].
        x_ptr, out_ptr: float32 or float64 [rows, D], NCHW or (CHANNELS_LAST) NHWC inside a row.
        eps_ptr: one float.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    live = row < rows
    dy, dx, mirrored = _crop_of(crops_ptr, row, live)
    image = tl.load(index_ptr + row, mask=live, other=0) * (C * H * W)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = live & (element < C * H * W)
    source, inside = _stored_pixel(element, dy, dx, mirrored, C, H, W, CHANNELS_LAST)
    at = row.to(tl.int64) * (C * H * W) + element
    x = tl.load(x_ptr + at, mask=mask)
    steps = tl.load(memory_ptr + image + source, mask=mask & inside, other=0)
    tl.store(out_ptr + at, _linf_start(x, steps, eps_ptr), mask=mask)


@triton.jit
def recall_l2_kernel(
    memory_ptr, index_ptr, crops_ptr, x_ptr, out_ptr, eps_ptr, rows,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return x plus the stored perturbation, in the L2 ball and in [0, 1].

    Grid: (ceil(rows / ROWS),). A program holds whole samples. The arguments are those of
    `recall_linf_kernel`. Rounding to int8 steps can leave the ball, so the projection uses the
    length of the stored steps.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    live = row < rows
    dy, dx, mirrored = _crop_of(crops_ptr, row, live)
    image = tl.load(index_ptr + row, mask=live, other=0) * (C * H * W)
    base = row.to(tl.int64) * (C * H * W)
    lane = tl.arange(0, BLOCK)[None, :]
    dtype = x_ptr.dtype.element_ty
    eps = tl.load(eps_ptr).to(dtype)
    quantum = divide(eps, 127.0)
    squares = tl.zeros((ROWS, BLOCK), dtype)
    for start in range(0, C * H * W, BLOCK):
        mask = live & (start + lane < C * H * W)
        source, inside = _stored_pixel(start + lane, dy, dx, mirrored, C, H, W, CHANNELS_LAST)
        steps = tl.load(memory_ptr + image + source, mask=mask & inside, other=0)
        delta = steps.to(dtype) * quantum
        squares += delta * delta
    factor = into_ball(tl.sum(squares, axis=1, keep_dims=True), eps)
    for start in range(0, C * H * W, BLOCK):
        mask = live & (start + lane < C * H * W)
        source, inside = _stored_pixel(start + lane, dy, dx, mirrored, C, H, W, CHANNELS_LAST)
        steps = tl.load(memory_ptr + image + source, mask=mask & inside, other=0)
        x = tl.load(x_ptr + base + start + lane, mask=mask, other=0.0)
        z = x + steps.to(dtype) * quantum * factor
        tl.store(out_ptr + base + start + lane, clip(z, 0.0, 1.0), mask=mask)


@triton.jit
def remember_kernel(
    memory_ptr, index_ptr, crops_ptr, x_ptr, z_ptr, eps_ptr, rows,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store every pixel of z - x at its source pixel. Grid: (ceil(rows / ROWS), ceil(D / BLOCK)).

    Walks the batch, so that the wide operands are read in order; only the bytes are scattered, and
    pixels that the crop cut away are not touched.

    Args:
        As for `recall_linf_kernel`; z_ptr: like x.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    live = row < rows
    dy, dx, mirrored = _crop_of(crops_ptr, row, live)
    image = tl.load(index_ptr + row, mask=live, other=0) * (C * H * W)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = live & (element < C * H * W)
    source, inside = _stored_pixel(element, dy, dx, mirrored, C, H, W, CHANNELS_LAST)
    at = row.to(tl.int64) * (C * H * W) + element
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    z = tl.load(z_ptr + at, mask=mask, other=0.0)
    per_eps = divide(tl.full((), 127.0, x.dtype), tl.maximum(tl.load(eps_ptr).to(x.dtype), 1e-12))
    steps = (z - x) * per_eps
    # The conversion of NaN to an integer is undefined.
    steps = tl.where(steps != steps, 0.0, tl.minimum(tl.maximum(steps, -127.0), 127.0))
    tl.store(memory_ptr + image + source, round_even(steps).to(tl.int8), mask=mask & inside)
