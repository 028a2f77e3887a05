"""Large images in overlapping tiles, and tile results blended so that no seam shows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from panda_ad.errors import UserError

Box = tuple[int, int, int, int]
"""(y0, x0, y1, x1) in pixels, end exclusive."""


def boxes(shape: tuple[int, ...], size: int, overlap: int) -> list[Box]:
    """Boxes of side `size` that cover an image (H, W, ...), evenly spread, neighbours overlapping by at least `overlap` pixels.

    A side shorter than `size` is covered whole, by one box.
    """
    if not 0 <= overlap < size:
        raise UserError(f"tiling: the overlap must lie in [0, {size}) pixels, the tile's size, not {overlap}")
    return [(y0, x0, y1, x1) for y0, y1 in _spans(shape[0], size, overlap) for x0, x1 in _spans(shape[1], size, overlap)]


def tiles(image: np.ndarray, size: int, overlap: int) -> list[np.ndarray]:
    """Views (h, w, ...) of an image (H, W, ...), in the order of `boxes`."""
    return [image[y0:y1, x0:x1] for y0, x0, y1, x1 in boxes(image.shape, size, overlap)]


def blend(tile_maps: Sequence[np.ndarray], shape: tuple[int, ...], size: int, overlap: int) -> np.ndarray:
    """Join maps (h, w) of the tiles of an image (H, W, ...) to one float32 (H, W).

    In an overlap the weights of two tiles cross over by raised cosines, with no jump at either end; elsewhere a map stands as it is.
    """
    total, weights = np.zeros(shape[:2]), np.zeros(shape[:2])
    places = boxes(shape, size, overlap)
    if len(tile_maps) != len(places):
        raise UserError(f"tiling: {len(tile_maps)} maps for {len(places)} tiles")
    across = {axis: dict(zip(spans, _windows(spans), strict=True)) for axis, spans in enumerate(_spans(n, size, overlap) for n in shape[:2])}
    for (y0, x0, y1, x1), tile in zip(places, tile_maps, strict=True):
        weight = np.outer(across[0][y0, y1], across[1][x0, x1])
        total[y0:y1, x0:x1] += weight * tile
        weights[y0:y1, x0:x1] += weight
    return (total / weights).astype(np.float32)


def _spans(length: int, size: int, overlap: int) -> list[tuple[int, int]]:
    if length <= size:
        return [(0, length)]
    count = -(-(length - overlap) // (size - overlap))
    starts = [i * (length - size) // (count - 1) for i in range(count)]  # rounded down: no gap exceeds size - overlap
    return [(a, a + size) for a in starts]


def _windows(spans: list[tuple[int, int]]) -> list[np.ndarray]:
    """A weight per pixel of each span: 1, falling over the overlap with a neighbour."""
    windows = [np.ones(b - a) for a, b in spans]
    for left, right, (_, end), (start, _) in zip(windows, windows[1:], spans, spans[1:], strict=False):
        shared = end - start
        if shared > 0:
            rise = (1 - np.cos(np.pi * (np.arange(shared) + 0.5) / shared)) / 2
            right[:shared] *= rise
            left[-shared:] *= rise[::-1]
    return windows
