"""Pictures of any usual file as arrays of 8 bits, and nothing that is not a picture."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

from ntk_prefix.checks import UsageError, expected

__all__ = ["LARGEST_FILE", "decoded"]

LARGEST_FILE = 2**28
"""Bytes of a picture's own file."""

LARGEST_PICTURE = 2**26
"""Pixels; a file of a few kilobytes can claim more than memory holds."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What is read: Pillow also knows formats that it hands to other programs."""


def decoded(content: bytes, name: str) -> np.ndarray:
    """Return a picture, upright: uint8 [h, w] if it is gray, else [h, w, 3]; transparency is left out.

    Sixteen bits of gray are scaled to eight, ``v // 257``, so that white stays 255 and nothing else becomes it.

    Args:
        content: of the file.
        name: for errors: file, row, or both.

    Raises:
        UsageError: it is no picture of :data:`FORMATS`, damaged, too large, or of numbers without a known range.
    """
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > LARGEST_PICTURE:
                raise expected(name, f"at most {LARGEST_PICTURE:,} pixels", f"{width} x {height}")
            return _eight_bits(ImageOps.exif_transpose(picture), name)
    except UsageError:
        raise
    except Exception as error:  # Pillow's readers raise nearly everything
        said = " ".join(str(error).split())[:200]
        raise expected(name, "a picture", f"what cannot be read as one: {type(error).__name__}: {said}") from None


def _eight_bits(picture: Image.Image, name: str) -> np.ndarray:
    mode = picture.mode
    if mode.startswith("I"):  # I;16 and its orders of bytes; I, which is how Pillow opens some gray files of 16 bits
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise expected(name, "gray values of 8 or 16 bits", f"{values.min()} to {values.max()}")
        return (values // 257).astype(np.uint8)
    if mode == "F":
        raise expected(name, "gray values or colors of 8 or 16 bits", "floating point numbers", "Save it as PNG")
    if mode in ("L", "1"):
        return np.asarray(picture.convert("L"))
    if mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    return np.asarray(picture.convert("RGB"))
