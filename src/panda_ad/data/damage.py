# SPDX-License-Identifier: Apache-2.0
"""Signs that a picture which decodes is only part of one.

Decoders fill what is missing in silence: a JPEG whose data ends early becomes gray below, a copy that broke off black.
A picture may look like that by nature. So these are doubts, to be shown beside what is made of the image, and no reason
to refuse it.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

_ZEROS = 16
"""One part in so many of a file, in zeros at its end, is a sign of a copy that broke off."""
_BLOCK = 8
"""Side of the smallest part of a JPEG that is there or missing, pixels."""
_RUN = 64
"""Equal bytes in a row, found where twice as many are."""
_FLAT = 4
"""Gray levels, of 256, that a picture of anything spans."""
_MARGIN = 4
"""Bytes; the last block of a JPEG needs those before its end marker."""


def doubt(data: bytes, rgb: np.ndarray) -> str:
    """Say why a file that decodes to `rgb`, uint8 (H, W, 3), may be only part of a picture; '' without a sign."""
    zeros = len(data) - len(data.rstrip(b"\0"))
    if zeros >= max(64, len(data) // _ZEROS):
        return f"the last {100 * zeros // len(data)} % of the file are zeros, as of a copy that broke off"
    if int(rgb.max()) - int(rgb.min()) < _FLAT:
        return "it holds next to nothing: a blank frame, or values of a few bits in 16"
    if data.startswith(b"\xff\xd8"):
        if (share := _gray_part(rgb)) >= 0:
            return f"its end is one flat gray ({100 * share:.0f} % of the picture), as of a JPEG whose data ends early"
        if _data_left_over(data):
            return "its JPEG data goes on where the picture ends: damaged in between"
        if _filled(data):
            return "its JPEG data holds one byte many times over: damaged in between"
    return ""


def _gray_part(rgb: np.ndarray) -> float:
    """Return the share of the picture's lines, up from the last stored block, that are the gray of missing blocks.

    That block may be in any corner of the upright picture. The share is -1 where the block is not gray.
    """
    for turned in (rgb, rgb[::-1], rgb[:, ::-1], rgb[::-1, ::-1]):
        if (turned[-_BLOCK:, -_BLOCK:] == 128).all() and not (turned == 128).all():
            gray = (turned == 128).all(axis=2)
            return max(int(np.argmin(full[::-1])) / len(full) for full in (gray.all(axis=1), gray.all(axis=0)))
    return -1.0


def _filled(data: bytes) -> bool:
    """Return whether JPEG data holds a long run of one byte.

    Huffman codes of a flat area repeat too, but make bytes of zero or longer patterns: no code consists of ones alone.
    """
    values = np.frombuffer(data, np.uint8, offset=max(0, data.find(b"\xff\xda")))
    samples = values[::_RUN]
    likely = np.flatnonzero((samples[1:] == samples[:-1]) & (samples[1:] != 0) & (samples[1:] != 255)) * _RUN
    return any((values[i : i + _RUN] == values[i]).all() for i in likely)


def _data_left_over(data: bytes) -> bool:
    """Return whether a JPEG decodes without the bytes before its end marker, reduced eightfold, which is faster."""
    start = data.find(b"\xff\xda")
    end = data.find(b"\xff\xd9", data.rfind(b"\xff\xda", 0, start + 65536))
    if start < 0 or end - start < 4 * _MARGIN or b"MPF\0" in data[:start]:
        return False
    try:
        with Image.open(io.BytesIO(data[: end - _MARGIN]), formats=("JPEG",)) as image:
            image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
    except Exception:  # it needs them, as it should
        return False
    return True
