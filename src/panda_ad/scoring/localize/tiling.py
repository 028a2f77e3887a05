# SPDX-License-Identifier: Apache-2.0
"""Large images in overlapping tiles, and tile results blended so that no seam shows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from panda_ad.errors import UserError
from panda_ad.features.network import Network

Pair = tuple[int, int]
"""(vertical, horizontal), pixels."""
Box = tuple[int, int, int, int]
"""(y0, x0, y1, x1) in pixels, end exclusive."""


def grid(size: Pair, count: int) -> tuple[Pair, Pair]:
    """Return the shape (H, W) that `count` x `count` tiles of `size` cover, and their overlap.

    The overlap is a quarter of the tile's side in whole positions of layer3 (16 pixels each), and at least three of
    them, or half of a small side.
    Near a tile's border the network sees zeros, which raises the map of normal images. At 128 px it is by 6 % in the
    middle of two positions' overlap, by 2 % of three's, which is less than the map varies elsewhere.
    """
    overlap = (_overlap(size[0]), _overlap(size[1]))
    return (count * (size[0] - overlap[0]) + overlap[0], count * (size[1] - overlap[1]) + overlap[1]), overlap


def image_tiles(rgb: np.ndarray, network: Network, count: int) -> np.ndarray:
    """Bring an image, uint8 (H, W, 3), to `grid`'s shape, preprocess and cut it.

    The tiles are float32 (count^2, 3, *size), row by row.
    """
    shape, overlap = grid(network.size, count)
    return tiles(network.preprocess([rgb], shape)[0], network.size, overlap)


def boxes(shape: Pair, size: Pair, overlap: Pair) -> list[Box]:
    """Return boxes of `size` that cover an image of `shape`, evenly spread.

    Neighbors overlap by at least `overlap`.

    A side shorter than the box is covered whole, by one box.
    """
    for o, s in zip(overlap, size, strict=True):
        if not 0 <= o < s:
            raise UserError(f"tiling: the overlap must lie in [0, {s}) pixels, the tile's size, not {o}")
    rows, columns = (_spans(*side) for side in zip(shape, size, overlap, strict=True))
    return [(y0, x0, y1, x1) for y0, y1 in rows for x0, x1 in columns]


def tiles(image: np.ndarray, size: Pair, overlap: Pair) -> np.ndarray:
    """Cut an image (..., H, W) into parts, in the order of `boxes`: (T, ..., h, w)."""
    shape = (image.shape[-2], image.shape[-1])
    return np.stack([image[..., y0:y1, x0:x1] for y0, x0, y1, x1 in boxes(shape, size, overlap)])


def blend(tile_maps: Sequence[np.ndarray], shape: Pair, size: Pair, overlap: Pair) -> np.ndarray:
    """Join maps (h, w) of the tiles of an image of `shape` to one float32 (H, W).

    In an overlap the weights of two tiles cross over by raised cosines, with no jump at either end.
    Elsewhere a map stands as it is.
    """
    total, weights = np.zeros(shape), np.zeros(shape)
    places = boxes(shape, size, overlap)
    if len(tile_maps) != len(places):
        raise UserError(f"tiling: {len(tile_maps)} maps for {len(places)} tiles")
    spans = [_spans(*side) for side in zip(shape, size, overlap, strict=True)]
    down, across = (dict(zip(s, _windows(s), strict=True)) for s in spans)
    for (y0, x0, y1, x1), tile in zip(places, tile_maps, strict=True):
        weight = np.outer(down[y0, y1], across[x0, x1])
        total[y0:y1, x0:x1] += weight * tile
        weights[y0:y1, x0:x1] += weight
    return (total / weights).astype(np.float32)


def _overlap(side: int) -> int:
    return min(side // 2, max(48, side // 4 // 16 * 16))


def _spans(length: int, size: int, overlap: int) -> list[tuple[int, int]]:
    if length <= size:
        return [(0, length)]
    count = -(-(length - overlap) // (size - overlap))
    starts = [i * (length - size) // (count - 1) for i in range(count)]  # rounded down: no gap exceeds size - overlap
    return [(a, a + size) for a in starts]


def _windows(spans: list[tuple[int, int]]) -> list[np.ndarray]:
    """Return a weight per pixel of each span: 1, falling over the overlap with a neighbor."""
    windows = [np.ones(b - a) for a, b in spans]
    for left, right, (_, end), (start, _) in zip(windows, windows[1:], spans, spans[1:], strict=False):
        shared = end - start
        if shared > 0:
            rise = (1 - np.cos(np.pi * (np.arange(shared) + 0.5) / shared)) / 2
            right[:shared] *= rise
            left[-shared:] *= rise[::-1]
    return windows
