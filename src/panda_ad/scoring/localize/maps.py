# SPDX-License-Identifier: Apache-2.0
"""Feature maps as rows of positions, and distances per position as heat maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

import numpy as np
from scipy.ndimage import gaussian_filter1d

Maps = Callable[[slice | np.ndarray], Mapping[str, np.ndarray]]
"""maps(i: slice or int array) -> float16 (B, C, h, w) per level of the gallery images at these indices."""

BATCH = 8
"""Gallery images read at a time while building."""


def positions(layer: np.ndarray) -> np.ndarray:
    """Reshape (C, h, w) to contiguous (h * w, C): one row per position."""
    return np.ascontiguousarray(layer.reshape(len(layer), -1).T)


def local_means(layer: np.ndarray) -> np.ndarray:
    """Return the mean of each position's 3 x 3 neighborhood, zeros beyond the border counted.

    Source: Roth et al. 2022, https://arxiv.org/abs/2106.08265, section 3.1; the authors' code counts the zeros as well.
    A border that normal images have, too, is then as usual as any other place.

    (C, h, w) float16 -> (C, h, w) float16; sums are float32.
    """
    padded = np.pad(layer.astype(np.float32), ((0, 0), (1, 1), (1, 1)))
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    return np.asarray((rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]) / 9, dtype=np.float16)


@lru_cache(maxsize=64)
def _resizing(length: int, new: int, sigma: float) -> np.ndarray:
    """Return the matrix, float32 (new, length), that resizes a column of a map and smooths it then."""
    at = np.clip((np.arange(new) + 0.5) * length / new - 0.5, 0, length - 1)
    left = np.minimum(at.astype(int), max(length - 2, 0))
    matrix = np.zeros((new, length))
    np.add.at(matrix, (np.arange(new), left), 1 - (at - left))
    np.add.at(matrix, (np.arange(new), np.minimum(left + 1, length - 1)), at - left)
    return (gaussian_filter1d(matrix, sigma, axis=0) if sigma else matrix).astype(np.float32)


def resize(values: np.ndarray, size: tuple[int, int], sigma: float = 0.0) -> np.ndarray:
    """Resize a map (h, w) to `size`, bilinear (pixels' centers aligned), and smooth it by a Gaussian filter.

    Both are linear and act on rows and columns apart: two small matrices do both in a tenth of a filter's time.

    Parameters
    ----------
    values : float32 (h, w).
    sigma : of the filter, in pixels of `size`, mirrored at the border; 0: none.

    Returns
    -------
    float32 (H, W).
    """
    down, across = (_resizing(*lengths, sigma) for lengths in zip(values.shape, size, strict=True))
    return np.asarray(down @ values.astype(np.float32) @ across.T)
