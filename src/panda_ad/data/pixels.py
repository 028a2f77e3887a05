# SPDX-License-Identifier: Apache-2.0
"""From Pillow's pixel modes to uint8 RGB, upright; what is decided is written in `data.images`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from panda_ad.errors import UserError

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what turns the stored picture upright (EXIF 2.3, tag 274)."""


def upright(image: Image.Image) -> Image.Image:
    """Turn by EXIF orientation. Pillow's own way writes all of EXIF anew, and fails on a field that it cannot write."""
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # as many kinds as decoding damaged files raises
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def tiff_tags(image: Image.Image) -> Mapping[int, Any]:
    """Return the tags of a TIFF file; none of other files."""
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    return tags


def gray_levels(image: Image.Image, gray_range: tuple[int, int]) -> np.ndarray:
    """Return the gray that each value of a 16-bit image stands for, uint8 (65536,)."""
    tags = tiff_tags(image)
    low, high = (0, 4095) if tags.get(258, (16,)) == (12,) else gray_range  # 258: BitsPerSample
    levels = np.rint((np.arange(65536).clip(low, high) - low) * (255 / (high - low))).astype(np.uint8)
    # PhotometricInterpretation: white is zero, which Pillow sees to up to 8 bits only
    return 255 - levels if tags.get(262) == 0 else levels


def to_rgb(image: Image.Image, levels: np.ndarray | None, background: tuple[int, int, int]) -> np.ndarray:
    """Convert an image of any of MODES to uint8 (H, W, 3)."""
    if levels is not None:
        values = np.asarray(image)
        rgb = np.empty((*values.shape, 3), np.uint8)
        for row, out in zip(values, rgb, strict=True):  # row by row: an index takes eight bytes a pixel
            out[:] = levels[row.clip(0, 65535)][:, None]
        clear = image.info.get("transparency")
        marked = np.zeros(values.shape, bool) if clear is None else values == clear
        if not marked.all():  # as below
            rgb[marked] = background
        return rgb
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema() != (0, 0):  # an alpha channel of zeros is one that nobody filled in
            image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
    return np.array(image.convert("RGB"))


def set_clear_color(image: Image.Image, depth: bytes, name: str) -> None:
    """Correct what Pillow makes of the one color of a PNG (tRNS) that is transparent.

    Pillow leaves its number as in the file, while it stretches 2 and 4 bits of gray to 8 and keeps of 16-bit color the
    high bytes only.

    Parameters
    ----------
    depth : the file's bits per channel, a byte (PNG's 25th).
    name : what to call the file in an error.

    Raises
    ------
    UserError
        The color has 16 bits per channel: which pixels have it is no longer known.
    """
    clear = image.info.get("transparency")
    if image.format != "PNG" or clear is None:
        return
    if image.mode == "L" and depth in (b"\2", b"\4"):
        image.info["transparency"] = clear * (255 // (2 ** depth[0] - 1))
    elif image.mode == "RGB" and depth == b"\x10":
        raise UserError(f"{name}: one of its colors of 16 bits is transparent, which is not read; save it without that")
