# SPDX-License-Identifier: Apache-2.0
"""An image with its heat map over it and its worst region in a box: what `panda-ad score --heatmaps` writes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from panda_ad.scoring.detector import Detector
from panda_ad.scoring.verdict import Verdict
from panda_ad.system.files import atomic_file


def save_overlay(path: Path, rgb: np.ndarray, verdict: Verdict, detector: Detector) -> None:
    """Write an image with its heat map laid over it, as JPEG.

    Colored is what exceeds what normal images show. A defect's region, the columns x0 to y1 of the CSV, is in a box.

    Parameters
    ----------
    rgb : uint8 (H, W, 3).  verdict : of this image, with its heat map, float (H, W).

    Raises
    ------
    OSError, ValueError
        It cannot be written: a full disk, or more than a JPEG's 65,500 pixels a side.
    """
    heatmap = verdict.heatmap
    assert heatmap is not None and detector.config.heatmap_range is not None, "only a localizer makes heat maps"
    picture = blend(rgb, heatmap, detector.config.heatmap_range)
    if verdict.anomalous and verdict.region is not None:
        _draw_box(picture, verdict.region)
    save_picture(path, picture)


def blend(rgb: np.ndarray, heatmap: np.ndarray, limits: tuple[float, float]) -> Image.Image:
    """Lay a heat map, float (H, W), over an image, uint8 (H, W, 3); color starts and is full at the limits."""
    start, full = limits
    out = np.empty_like(rgb)
    for pixels, heat, row in zip(
        rgb, heatmap, out, strict=True
    ):  # row by row: in floating point a large image takes gigabytes
        strength = np.clip((heat - start) / max(full - start, 1e-12), 0, 1)[:, None]
        color = np.concatenate([np.full_like(strength, 255), 220 * (1 - strength), np.zeros_like(strength)], axis=1)
        row[:] = pixels * (1 - 0.65 * strength) + color * 0.65 * strength
    return Image.fromarray(out)


def save_picture(path: Path, picture: Image.Image) -> None:
    """Write a picture as JPEG, whole or not at all. OSError or ValueError where it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as temporary:
        picture.save(temporary, "JPEG", quality=90, subsampling=0)  # a thin line keeps its color


def _draw_box(picture: Image.Image, region: tuple[int, int, int, int]) -> None:
    """Frame a region, (x0, y0, x1, y1) with its end exclusive: cyan on black.

    The frame is thicker in larger images, and drawn outside if there is room.
    """
    pen, thin = ImageDraw.Draw(picture), max(2, round(max(picture.size) / 400))
    x0, y0, x1, y1 = region
    for color, far, width in (("black", 2 * thin, 3 * thin), ("#4fe3d2", thin, thin)):
        corners = (
            max(0, x0 - far),
            max(0, y0 - far),
            min(picture.width, x1 + far) - 1,
            min(picture.height, y1 + far) - 1,
        )
        pen.rectangle(corners, outline=color, width=width)
