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
from .maths import byte_to_unit, clip, divide, into_ball, linf_step, number, round_even

# The first block of the second draw of each sample.
_CHANGES = tl.constexpr(1 << 31)


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
    cutmix: bool,
    erase: int,
    jitter: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, columns = index.shape[0], images[0].numel() if len(images) else 0
    x = images.new_empty((b, *images.shape[1:]), dtype=torch.float32)
    crops = images.new_empty((b, 3), dtype=torch.int32)
    # The L2 projection needs a sample's length before its first pixel: a second launch.
    fused = memory is not None and norm == "Linf"
    start = torch.empty_like(x) if fused else x.new_empty(0)
    share = x.new_empty(b if cutmix else 0)
    tile = row_tile(b, columns, elements=1024, widest=1024)
    with on_device(images):
        augment_kernel[_grid(b, columns, tile)](
            images, index, rng, x, crops, *((memory, start, eps) if fused else (None, None, None)),
            share if cutmix else None, pad, stream, erase, jitter, b,
            FLIP=flip, CUTOUT=cutout, ERASE=erase > 0, JITTER=jitter > 0, **_shape(images), **tile,
            enable_fp_fusion=False,
        )  # fmt: skip
    if memory is not None and eps is not None and not fused:
        start = recall(memory, index, crops, x, eps, norm)
    return x, crops, start, share


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


@triton.jit
def _changed(
    images_ptr, image, element, dy, dx, mirrored, w2, w3, jitter, mask,
    JITTER: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Return the pixels of a sample in [0, 1], cropped, mirrored and with other colours.

    `image` is the offset of each sample's stored image; w2 and w3 are words of its second draw.
    """
    source, inside = _stored_pixel(element, dy, dx, mirrored, C, H, W, False)
    if JITTER:
        pixel = image + source - element // (H * W) * (H * W)
        brightness, contrast = _factor(w2 & 0xFFFF, jitter), _factor(w2 >> 16, jitter)
        red = _brightened(images_ptr, pixel, mask & inside, brightness, contrast)
        green = _brightened(images_ptr, pixel + H * W, mask & inside, brightness, contrast)
        blue = _brightened(images_ptr, pixel + 2 * H * W, mask & inside, brightness, contrast)
        grey = 0.299 * red + 0.587 * green + 0.114 * blue
        channel = element // (H * W)
        x = tl.where(channel == 0, red, tl.where(channel == 1, green, blue))
        x = clip(grey + _factor(w3 & 0xFFFF, jitter) * (x - grey), 0.0, 1.0)
        x = tl.where(inside, x, 0.0)
    else:
        byte = tl.load(images_ptr + image + source, mask=mask & inside, other=0)
        x = byte_to_unit(byte.to(tl.float32))
    return x


@triton.jit
def _factor(half, jitter):
    """Return 1 + jitter u, with u in [-1, 1) of 16 random bits."""
    unit = (half.to(tl.int32) - 0x8000).to(tl.float32) * 3.0517578125e-05
    return 1.0 + number(jitter, tl.float32) * unit


@triton.jit
def _brightened(images_ptr, at, mask, brightness, contrast):
    byte = tl.load(images_ptr + at, mask=mask, other=0)
    return 0.5 + contrast * (brightness * byte_to_unit(byte.to(tl.float32)) - 0.5)


@triton.jit
def _corner(word, tall, wide, H: tl.constexpr, W: tl.constexpr):
    """Return the top left pixel of a box around the pixel that `word` chooses."""
    top = (((word & 0xFFFF) * H) >> 16).to(tl.int32) - tall // 2
    left = (((word >> 16) * W) >> 16).to(tl.int32) - wide // 2
    return top, left


@triton.jit
def _in_box(element, top, left, tall, wide, H: tl.constexpr, W: tl.constexpr):
    y, column = element // W % H - top, element % W - left
    return (y >= 0) & (y < tall) & (column >= 0) & (column < wide)


@triton.jit
def _mixed_box(w0, w1, H: tl.constexpr, W: tl.constexpr):
    """Return top, left, height and width of the box that comes from the next sample."""
    part = tl.maximum(w0 & 0xFFFF, w0 >> 16)
    tall, wide = ((part * H + 0x8000) >> 16).to(tl.int32), ((part * W + 0x8000) >> 16).to(tl.int32)
    top, left = _corner(w1, tall, wide, H, W)
    return top, left, tall, wide


@triton.jit
def _own_share(top, left, tall, wide, H: tl.constexpr, W: tl.constexpr):
    """Return the share of an image's pixels that a box leaves."""
    height = tl.maximum(tl.minimum(top + tall, H) - tl.maximum(top, 0), 0)
    width = tl.maximum(tl.minimum(left + wide, W) - tl.maximum(left, 0), 0)
    return divide((H * W - height * width).to(tl.float32), tl.full((), H * W, tl.float32))


@triton.jit(do_not_specialize=["pad", "stream", "erase"])
def augment_kernel(
    images_ptr, index_ptr, rng_ptr, x_ptr, crops_ptr, memory_ptr, start_ptr, eps_ptr, share_ptr,
    pad, stream, erase, jitter: tl.float64, rows,
    FLIP: tl.constexpr, CUTOUT: tl.constexpr, ERASE: tl.constexpr, JITTER: tl.constexpr,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Make a batch. Grid: (ceil(rows / ROWS), ceil(D / BLOCK)).

    Every program draws the crops of its samples, one Philox block a sample; boxes to mix, colours
    and erased rectangles take a second block.

    Args:
        images_ptr: uint8 [N, C, H, W], contiguous; index_ptr: int64 [rows]; rng_ptr: int64 [2].
        x_ptr: float32 [rows, C, H, W], contiguous; crops_ptr: int32 [rows, 3].
        memory_ptr, start_ptr, eps_ptr: int8 [N, C, H, W]; like x; one float: for the attack's start
            in the Linf ball. All None: no start.
        share_ptr: float32 [rows], to mix every image with a box of the next one; else None.
        CUTOUT: side of the square that is set to 0.
        ERASE: whether `erase` of 2^16 samples have a rectangle set to 0.
        JITTER: whether colours change by up to the part `jitter`.
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
    image = tl.load(index_ptr + row, mask=live, other=0) * (C * H * W)
    at = row.to(tl.int64) * (C * H * W) + element
    # Without a use for them, the compiler drops these words.
    v0, v1, v2, v3 = philox.words(rng_ptr, stream, row.to(tl.int64) + _CHANGES)
    if share_ptr is not None:
        top, left, tall, wide = _mixed_box(v0, v1, H, W)
        if tl.program_id(1) == 0:
            tl.store(share_ptr + row, _own_share(top, left, tall, wide, H, W), mask=live)
        other = tl.where(row + 1 < rows, row + 1, 0)
        o0, o1, o2, _ = philox.words(rng_ptr, stream, other)
        _, _, u2, u3 = philox.words(rng_ptr, stream, other.to(tl.int64) + _CHANGES)
        boxed = _in_box(element, top, left, tall, wide, H, W)
        dy = tl.where(boxed, _offset(o0, pad), dy)
        dx = tl.where(boxed, _offset(o1, pad), dx)
        if FLIP:
            mirrored = tl.where(boxed, (o2 >> 31).to(tl.int32), mirrored)
        others = tl.load(index_ptr + other, mask=live, other=0) * (C * H * W)
        image = tl.where(boxed, others, image)
        v2, v3_colour = tl.where(boxed, u2, v2), tl.where(boxed, u3, v3)
    else:
        v3_colour = v3
    x = _changed(
        images_ptr, image, element, dy, dx, mirrored, v2, v3_colour, jitter, mask, JITTER, C, H, W
    )
    if CUTOUT > 0:
        top, left = _corner(w3, CUTOUT, CUTOUT, H, W)
        x = tl.where(_in_box(element, top, left, CUTOUT, CUTOUT, H, W), 0.0, x)
    if ERASE:
        tall = 1 + (((w2 & 0xFF) * (H // 2)) >> 8).to(tl.int32)
        wide = 1 + ((((w2 >> 8) & 0xFF) * (W // 2)) >> 8).to(tl.int32)
        top, left = _corner(w3, tall, wide, H, W)
        chosen = (v3 >> 16).to(tl.int32) < erase
        x = tl.where(chosen & _in_box(element, top, left, tall, wide, H, W), 0.0, x)
    tl.store(x_ptr + at, x, mask=mask)
    if memory_ptr is not None:
        source, inside = _stored_pixel(element, dy, dx, mirrored, C, H, W, False)
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
