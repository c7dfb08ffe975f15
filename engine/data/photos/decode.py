"""Pictures from files by Pillow: sizes from the header, and the pixels of a window.

A picture is upright (its EXIF orientation is applied) and RGB: grey is repeated, alpha is dropped,
CMYK and palettes are converted, as torchvision's ImageFolder does. 16 bits a channel become 8.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ...errors import EngineError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM")
# One picture, in pixels: the size at which Pillow itself warns of a decompression bomb.
PIXELS_LIMIT = 89_478_485
_ORIENTATION = 0x0112
_END_OF_JPEG, _TAIL = b"\xff\xd9", 1024

# Sizes are checked here, and a fault is reported once. `catch_warnings` does not suit threads.
warnings.filterwarnings("ignore", module=r"PIL\.")

_ANY_FAULT = (
    *(OSError, EOFError, ValueError, KeyError, IndexError, OverflowError, TypeError),
    *(NotImplementedError, RuntimeError, MemoryError, SyntaxError, Image.DecompressionBombError),
)


class Header(NamedTuple):
    """Hold the facts of one picture.

    Attributes:
        height, width: upright [pixels].
        plain: NVIDIA DALI decodes it to the same pixels as Pillow.
        grey: it has one channel.
    """

    height: int
    width: int
    plain: bool
    grey: bool


def header(data: bytes, *, thorough: bool = False) -> Header:
    """Return the facts of a picture, and check that its file is whole.

    A JPEG is whole if its end marker is there; every other file is decoded.

    Args:
        thorough: decode JPEGs too.
    Raises:
        EngineError: the reason for which the file is no whole picture, without its name.
    """
    with _opened(data) as image:
        width, height = image.size
        if width * height > PIXELS_LIMIT:
            raise EngineError(
                f"{width}x{height} pixels: too large, at most {PIXELS_LIMIT:,} pixels"
            )
        jpeg = image.format in ("JPEG", "MPO")
        turned = _orientation(image) >= 5
        plain = image.mode in ("L", "RGB") and (jpeg or _simple(data))
        grey = image.mode in ("1", "L")
        if thorough or not (jpeg and _END_OF_JPEG in data[-_TAIL:]):
            _load(image)
    return Header(*((width, height) if turned else (height, width)), plain, grey)


def pixels(data: bytes, window: Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """Return a window of a picture, scaled with antialiasing (bilinear): uint8 [H, W, 3].

    Args:
        window: (top, left, height, width) in the upright picture [pixels].
        size: (H, W) of the result.
    Raises:
        EngineError: the reason for which the file cannot be decoded, without its name.
    """
    top, left, height, width = window
    with _opened(data) as image:
        if image.width * image.height > PIXELS_LIMIT:
            raise EngineError(f"{image.width}x{image.height} pixels: too large")
        upright = _rgb(image)
        if top + height > upright.height or left + width > upright.width:
            raise EngineError("its size is not what it was when it was indexed")
        cut = upright.crop((left, top, left + width, top + height))
        return np.asarray(cut.resize((size[1], size[0]), Image.Resampling.BILINEAR))


def _rgb(image: Image.Image) -> Image.Image:
    _load(image)
    try:
        upright = ImageOps.exif_transpose(image) if _orientation(image) > 1 else image
        if upright.mode.startswith("I"):
            upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
        return upright if upright.mode == "RGB" else upright.convert("RGB")
    except _ANY_FAULT as error:
        raise EngineError(f"damaged picture ({_line(error)})") from None


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1..8; 1 where there is none, or no valid one."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except _ANY_FAULT:
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def _simple(data: bytes) -> bool:
    """Return whether a PNG or WebP file is of the kind that DALI reads: 8 bits, no extension."""
    if data[8:12] == b"WEBP":
        return data[12:16] in (b"VP8 ", b"VP8L")
    return data[1:4] == b"PNG" and b"tRNS" not in data[:_TAIL]


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except _ANY_FAULT as error:
        raise EngineError(f"damaged picture ({_line(error)})") from None


def _opened(data: bytes) -> Image.Image:
    if not data:
        raise EngineError("an empty file")
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise EngineError(f"no picture in it ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise EngineError(f"too large, at most {PIXELS_LIMIT:,} pixels") from None
    except _ANY_FAULT as error:
        raise EngineError(f"damaged picture ({_line(error)})") from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:120]
