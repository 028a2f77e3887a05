"""Pictures of the report as text: JPEG thumbnails, 8-bit heat maps, outlines as SVG paths, within a size budget."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from panda_ad.report.content import ReportImage

BUDGET = 8_500_000
"""Bytes of encoded pictures in one report; the rest of the page stays well under 1.5 MB for 500 images."""

OUTLINE_SIDES, OUTLINE_BYTES = (128, 64, 32, 16), 4000
NEIGHBOURS_SHOWN = 5


class Rung(NamedTuple):
    """Longer sides in pixels of thumbnail, heat map and neighbor, and the JPEG quality."""

    thumb: int
    heat: int
    neighbor: int
    quality: int


LADDER = (
    Rung(256, 96, 96, 80),
    Rung(224, 80, 80, 78),
    Rung(192, 64, 72, 74),
    Rung(160, 56, 64, 70),
    Rung(128, 48, 56, 65),
    Rung(96, 40, 48, 55),
    Rung(64, 32, 40, 45),
    Rung(48, 24, 24, 40),
)


def encode_images(images: Sequence[ReportImage]) -> dict[str, Any]:
    """Encode all pictures at the best rung of the ladder that keeps them within the budget.

    Returns
    -------
    images : per image snapshot, thumb (base64 JPEG), width and height (pixels of the thumbnail), heat (base64 gray JPEG) or None,
        outline (SVG path on a grid of `outlineSize`) or None, neighbors [(index into normals, distance)], parts (as in `ReportImage`).
    normals : each neighbor once: path and thumb.
    heat : (low, high) of the heat maps' color scale, or None without heat maps.
    """
    scale = heat_scale(images)
    for rung in LADDER:
        sample = images[:: max(1, len(images) // 16)]  # spread over the list: neighbors in it look alike
        distinct = {path for image in images for _, _, path in image.neighbors[:NEIGHBOURS_SHOWN]}
        own, others = _sizes(_encode(sample, rung, scale))
        estimate = own / max(1, len(sample)) * len(images) + others * len(distinct)
        if estimate > 1.2 * BUDGET and rung is not LADDER[-1]:
            continue
        encoded = _encode(images, rung, scale)
        own, others = _sizes(encoded)
        if own + others * len(encoded["normals"]) <= BUDGET or rung is LADDER[-1]:
            return encoded
    raise AssertionError("the last rung always returns")


def heat_scale(images: Sequence[ReportImage]) -> tuple[float, float] | None:
    """(low, high) of the colors, one scale for all images so that they compare.

    Low is what 95 % of the good images' area stays below (of all images where none is good), high the 90th percentile of the
    images' maxima.
    """
    maps = [(image.label, np.nan_to_num(image.heatmap)) for image in images if image.heatmap is not None]
    if not maps:
        return None
    normal = [heat for label, heat in maps if label == 0] or [heat for _, heat in maps]
    low = float(np.median([np.quantile(heat, 0.95) for heat in normal]))
    high = float(np.quantile([heat.max() for _, heat in maps], 0.9))
    return (low, high) if high > low else (low, low + 1.0)


def outline(mask: np.ndarray) -> tuple[str, int, int] | None:
    """Boundary of a bool (h, w) mask as an SVG path of closed loops in a box of the returned (width, height); None if empty.

    The loops join the middles of the boundary's pixel edges (marching squares), in half pixels so that all numbers are whole.
    A mask of many specks is traced more coarsely, so that no path takes much more than `OUTLINE_BYTES`.
    """
    if not mask.any():
        return None
    for side in OUTLINE_SIDES:
        traced = _traced(mask, side)
        if len(traced[0]) <= OUTLINE_BYTES:
            break
    return traced


def _traced(mask: np.ndarray, side: int) -> tuple[str, int, int]:
    picture = Image.fromarray(np.asarray(mask, np.uint8) * 255)
    if max(picture.size) > side:
        picture.thumbnail((side, side), Image.Resampling.BOX, reducing_gap=None)
    cover = np.asarray(picture)
    small = cover >= 64
    if not small.any():
        small = cover > 0
    if not small.any():  # a speck that even the mean of its box rounds away: mark the box
        y, x = np.argwhere(mask)[0]
        small = np.zeros_like(small)
        small[y * small.shape[0] // mask.shape[0], x * small.shape[1] // mask.shape[1]] = True
    loops = [_straighten(loop) for loop in _loops(small)]
    path = "".join("M" + "L".join(f"{x} {y}" for x, y in loop) + "Z" for loop in loops)
    return path, 2 * small.shape[1], 2 * small.shape[0]


def _loops(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """Closed loops of edge middles, in half pixels; every boundary edge is walked once with the inside on its right."""
    padded = np.pad(mask, 1)
    inner = padded[1:-1, 1:-1]
    following: dict[tuple[int, int], list[tuple[int, int]]] = {}
    sides = (  # edge of pixel (y, x) shared with an outside pixel, from corner to corner, clockwise in image coordinates
        (padded[:-2, 1:-1], (0, 0), (1, 0)),
        (padded[1:-1, 2:], (1, 0), (1, 1)),
        (padded[2:, 1:-1], (1, 1), (0, 1)),
        (padded[1:-1, :-2], (0, 1), (0, 0)),
    )
    for outside, start, end in sides:
        for y, x in np.argwhere(inner & ~outside).tolist():
            following.setdefault((x + start[0], y + start[1]), []).append((x + end[0], y + end[1]))
    loops = []
    while following:
        first = here = next(iter(following))
        middles = []
        while True:
            ends = following[here]
            there = ends.pop()
            if not ends:
                del following[here]
            middles.append((here[0] + there[0], here[1] + there[1]))
            here = there
            if here == first:
                break
        loops.append(middles)
    return loops


def _straighten(loop: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Drop the points that lie straight between their neighbors."""
    kept = []
    for i, (x, y) in enumerate(loop):
        (px, py), (nx, ny) = loop[i - 1], loop[(i + 1) % len(loop)]
        if (x - px, y - py) != (nx - x, ny - y):
            kept.append((x, y))
    return kept


def _encode(images: Sequence[ReportImage], rung: Rung, scale: tuple[float, float] | None) -> dict[str, Any]:
    index: dict[str, int] = {}
    normals: list[dict[str, str]] = []
    items = []
    for image in images:
        neighbors = []
        for thumb, distance, path in image.neighbors[:NEIGHBOURS_SHOWN]:
            if path not in index:
                index[path] = len(normals)
                normals.append({"path": path, "thumb": _jpeg(_shrink(thumb, rung.neighbor), rung.quality)})
            neighbors.append([index[path], float(distance)])
        small = _shrink(image.rgb, rung.thumb)
        traced = None if image.mask is None else outline(image.mask)
        items.append(
            {
                "snapshot": int(image.snapshot),
                "thumb": _jpeg(small, rung.quality),
                "width": small.width,
                "height": small.height,
                "heat": None if image.heatmap is None or scale is None else _heat(image.heatmap, rung.heat, scale),
                "outline": traced and traced[0],
                "outlineSize": traced and list(traced[1:]),
                "neighbors": neighbors,
                "parts": image.parts,
            }
        )
    return {"images": items, "normals": normals, "heat": scale}


def _sizes(encoded: dict[str, Any]) -> tuple[float, float]:
    """Bytes of the images' own pictures, and of a neighbor's on average."""
    own = sum(len(i["thumb"]) + len(i["heat"] or "") + len(i["outline"] or "") for i in encoded["images"])
    normals = encoded["normals"]
    return own, sum(len(n["thumb"]) for n in normals) / max(1, len(normals))


def _shrink(rgb: np.ndarray, side: int) -> Image.Image:
    picture = Image.fromarray(np.ascontiguousarray(rgb))
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def _heat(heatmap: np.ndarray, side: int, scale: tuple[float, float]) -> str:
    low, high = scale
    share = np.clip((np.nan_to_num(heatmap) - low) / (high - low), 0, 1)
    picture = Image.fromarray(np.round(share * 255).astype(np.uint8))
    picture.thumbnail((side, side), Image.Resampling.BILINEAR)
    return _jpeg(picture, 82)


def _jpeg(picture: Image.Image, quality: int) -> str:
    """Base64; JPEG because WebP takes 30 times as long to write for a fifth of the bytes."""
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=quality, optimize=True)
    return base64.b64encode(stream.getvalue()).decode()
