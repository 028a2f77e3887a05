# SPDX-License-Identifier: Apache-2.0
"""Signs that a picture which decodes is only part of one.

Decoders fill what is missing in silence: a JPEG whose data ends early becomes gray below, a copy that broke off black.
A picture may look like that by nature. So these are doubts, to be shown beside what is made of the image, and no reason
to refuse it.
"""

from __future__ import annotations

import io
import math
import zlib
from collections.abc import Iterator

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
        if _scans_missing(data):
            return "it is a progressive JPEG whose last scans are missing: coarser than it was taken"
    if data.startswith(b"\x89PNG") and (rgb[-1] == rgb[-1, 0]).all() and _rows_missing(data):
        return "its PNG data ends before its last row"
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


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield marker and content of a JPEG's segments, up to its end marker; the codes between them are passed over."""
    at = 2
    while 0 <= (at := data.find(b"\xff", at)) < len(data) - 3 and (marker := data[at + 1]) != 0xD9:
        if marker in (0x00, 0xFF) or 0xD0 <= marker <= 0xD7:  # a stuffed byte, a fill byte, a restart
            at += 1
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        yield marker, data[at + 4 : at + 2 + length]
        at += 2 + length


def _scans_missing(data: bytes) -> bool:
    """Return whether a progressive JPEG (ITU T.81, G.1.1) lacks scans that refine its first component, the luma."""
    missing = np.zeros(64, np.uint8)  # low bits not yet sent, of each coefficient
    luma = -1
    for marker, body in _segments(data):
        if marker in (0xC0, 0xC1) or len(body) < 6:
            return False  # sequential: its one scan has everything
        if marker == 0xC2:
            luma = body[6]
            missing[:] = 16
        elif marker == 0xDA and luma in tuple(body[1 : 1 + 2 * body[0] : 2]):
            first, last, bits = body[-3:]
            missing[first : last + 1] = bits & 15
    return bool(missing.any())


def _rows_missing(data: bytes) -> bool:
    """Return whether a PNG that is not interlaced holds fewer rows than its header says; Pillow leaves them empty."""
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    depth, color, interlaced = data[24], data[25], data[28]
    row = 1 + math.ceil(width * depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(color, 1) / 8)
    at, found, inflate = 8, 0, zlib.decompressobj()
    while at + 8 <= len(data) and (kind := data[at + 4 : at + 8]) != b"IEND":
        length = int.from_bytes(data[at : at + 4], "big")
        if kind == b"IDAT":
            try:
                found += len(inflate.decompress(data[at + 8 : at + 8 + length]))
            except zlib.error:  # Pillow, which is what decodes, has taken it
                return False
        at += 12 + length
    return not interlaced and found < row * height
