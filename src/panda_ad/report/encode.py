# SPDX-License-Identifier: Apache-2.0
"""Pictures of the report as text: JPEG, 8-bit heat maps, outlines as SVG paths."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from contourpy import contour_generator
from PIL import Image

from panda_ad.report.content import ReportImage

THUMB, HEAT, NEIGHBOR, OUTLINE = 256, 96, 64, 96
"""Longer sides in pixels of an image, its heat map, a neighbor, and the grid that an outline is traced on."""

NEIGHBORS_SHOWN = 5
QUALITY = 78


def encode_images(images: Sequence[ReportImage]) -> dict[str, Any]:
    """Encode all pictures.

    Returns
    -------
    images : per image thumb (base64 JPEG), width and height (pixels of the thumbnail), heat (base64 gray JPEG) or None,
        outline (SVG path on a grid of `outlineSize`) or None, spot (as `thumb`, and its place in shares of the image)
        or None, neighbors [index into normals], components (as in `ReportImage`).
    normals : each neighbor once: path and thumb.
    heat : (low, high) of the heat maps' color scale, or None without heat maps.
    """
    scale = heat_scale(images)
    normals: dict[str, dict[str, Any]] = {}
    items = []
    for image in images:
        near = image.neighbors[:NEIGHBORS_SHOWN]
        for thumb, path in near:
            if path not in normals:
                normals[path] = {"path": path, "thumb": jpeg(thumb, NEIGHBOR), "index": len(normals)}
        small = _shrunk(image.rgb, THUMB)
        traced = None if image.mask is None else outline(image.mask)
        items.append(
            {
                "thumb": _encoded(small),
                "width": small.width,
                "height": small.height,
                "heat": None if image.heatmap is None or scale is None else _heat(image.heatmap, scale),
                "outline": traced and traced[0],
                "outlineSize": traced and list(traced[1:]),
                "spot": image.spot and {"thumb": jpeg(image.spot.rgb), "box": np.round(image.spot.box, 4).tolist()},
                "neighbors": [normals[path]["index"] for _, path in near],
                "components": image.components,
            }
        )
    return {"images": items, "normals": list(normals.values()), "heat": scale}


def heat_scale(images: Sequence[ReportImage]) -> tuple[float, float] | None:
    """Return (low, high) of the colors, one scale for all images so that they compare; None without heat maps.

    Low is what 95 % of the good images' area stays below (of all images where none is good).
    High is the 90th percentile of the images' maxima.
    """
    maps = [(image.label, np.nan_to_num(image.heatmap)) for image in images if image.heatmap is not None]
    if not maps:
        return None
    normal = [heat for label, heat in maps if label == 0] or [heat for _, heat in maps]
    low = float(np.median([np.quantile(heat, 0.95) for heat in normal]))
    high = float(np.quantile([heat.max() for _, heat in maps], 0.9))
    return (low, high) if high > low else (low, low + 1.0)


def outline(mask: np.ndarray) -> tuple[str, int, int] | None:
    """Return the boundary of a bool (h, w) mask as an SVG path, and the (width, height) of its box; None if empty.

    The path consists of closed loops.
    The mask is reduced to a grid of `OUTLINE` pixels, each marked that a defect touches.
    Numbers are whole: half pixels of that grid.
    """
    if not mask.any():
        return None
    scale = min(1.0, OUTLINE / max(mask.shape))
    height, width = (max(1, round(side * scale)) for side in mask.shape)
    rows, columns = np.nonzero(mask)
    grid = np.zeros((height + 2, width + 2))  # a border of nothing closes the loops at the image's edge
    grid[rows * height // mask.shape[0] + 1, columns * width // mask.shape[1] + 1] = 1
    loops = []
    for line in contour_generator(z=grid).lines(0.5):
        points = np.round(2 * np.asarray(line)[:-1] - 1).astype(
            int
        )  # pixel (1, 1) of the grid has its middle at half pixel 1
        straight = points - np.roll(points, 1, axis=0) == np.roll(points, -1, axis=0) - points
        loops.append("M" + "L".join(f"{x} {y}" for x, y in points[~straight.all(axis=1)]) + "Z")
    return "".join(loops), 2 * width, 2 * height


def jpeg(rgb: np.ndarray, side: int | None = None) -> str:
    """Return uint8 (h, w, 3), reduced to at most `side` pixels a side, as base64 JPEG.

    WebP takes 30 times as long to write for a fifth of the bytes.
    """
    return _encoded(_shrunk(rgb, side))


def _shrunk(rgb: np.ndarray, side: int | None) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(rgb))
    if side is not None:
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def _heat(heatmap: np.ndarray, scale: tuple[float, float]) -> str:
    low, high = scale
    share = np.clip((np.nan_to_num(heatmap) - low) / (high - low), 0, 1)
    picture = Image.fromarray(np.round(share * 255).astype(np.uint8))
    picture.thumbnail((HEAT, HEAT), Image.Resampling.BILINEAR)
    return _encoded(picture)


def _encoded(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=QUALITY, optimize=True)
    return base64.b64encode(stream.getvalue()).decode()
