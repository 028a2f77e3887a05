# SPDX-License-Identifier: Apache-2.0
"""Feature maps as rows of positions, and distances per position as heat maps."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

Maps = Callable[[slice | np.ndarray], Mapping[str, np.ndarray]]
"""maps(i: slice or int array) -> float16 (B, C, h, w) per level of the gallery images at these indices."""

BATCH = 8
"""Gallery images read at a time while building."""


def tensors(maps: Mapping[str, np.ndarray], levels: tuple[str, ...]) -> dict[str, Tensor]:
    """Return some levels as tensors that share the arrays' memory."""
    return {level: torch.from_numpy(maps[level]) for level in levels}


def positions(layer: Tensor) -> Tensor:
    """Reshape (B, C, h, w) to (B, h * w, C): one row per position."""
    return layer.flatten(2).transpose(1, 2)


def upsample(distances: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Resize values (h * w,) on a grid (h, w) to (H, W), bilinear."""
    return nn.functional.interpolate(distances.view(1, 1, *grid), size=size, mode="bilinear", align_corners=False)[0, 0]


def smooth(heatmap: Tensor, sigma: float) -> np.ndarray:
    """Smooth a map by a Gaussian filter, sigma in pixels of the map: float32 (H, W)."""
    values: np.ndarray = heatmap.numpy()
    return ndimage.gaussian_filter(values, sigma) if sigma else values
