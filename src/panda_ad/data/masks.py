# SPDX-License-Identifier: Apache-2.0
"""Decode masks: which pixels of an image are marked as defective. Of one file, or of several to join."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from panda_ad.data.images import DEFAULT, Decoding, picture, read_bytes, require_digest
from panda_ad.data.mask_files import mask_parts
from panda_ad.errors import UserError

BLACK = (0, 0, 0)
"""What lies behind a mask's transparency: not marked."""


def mask_levels(parts: Sequence[bytes], name: str, decoding: Decoding = DEFAULT) -> np.ndarray:
    """Decode a mask, of one file or several to join, before it is binarized: uint8 (H, W), the largest channel.

    A mask of 16 bits is scaled from its full range, whatever the images' range is.

    Raises UserError as `decode` does, and where there is no file, or they differ in size.
    """
    full = replace(decoding, gray_range=DEFAULT.gray_range)
    levels = [picture(data, name, BLACK, full).rgb.max(axis=2) for data in parts]
    if len({part.shape for part in levels}) != 1:
        raise UserError(f"{name}: {'masks of different sizes' if levels else 'holds no masks'}")
    return np.maximum.reduce(levels)


def decode_mask(data: bytes, name: str) -> np.ndarray:
    """Decode a mask: bool (H, W), true where the largest channel reaches half of its range.

    Raises UserError as `decode` does.
    """
    return mask_levels([data], name) >= 128


def mask_bytes(path: Path, name: str | None = None, decoding: Decoding = DEFAULT) -> list[bytes]:
    """Read the files of a mask (see `mask_parts`). Raises UserError."""
    return [read_bytes(part, name if part == path else None, decoding) for part in mask_parts(path)]


def read_mask(path: Path | str, sha256: str | None = None, decoding: Decoding = DEFAULT) -> np.ndarray:
    """Read a mask, a file or a folder of files: bool (H, W), true where marked.

    Raises UserError as `read_image` does.
    """
    parts = mask_bytes(Path(path), decoding=decoding)
    require_digest(parts, sha256, path)
    return mask_levels(parts, str(path), decoding) >= 128
