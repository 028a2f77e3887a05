"""Feature maps as rows of positions, and distances per position as heat maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

Maps = Callable[[Any], dict[str, Tensor]]
"""maps(i: slice or int array) -> float16 (B, C, h, w) per layer of the gallery images at these indices."""

BATCH = 8
"""Gallery images read at a time while building."""


def positions(layer: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h * w, C): one row per position."""
    return layer.flatten(2).transpose(1, 2)


def upsample(distances: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """(h * w,) on a grid (h, w) -> (H, W), bilinear."""
    return F.interpolate(distances.view(1, 1, *grid), size=size, mode="bilinear", align_corners=False)[0, 0]


def smooth(heatmap: Tensor, sigma: float) -> np.ndarray:
    """Gaussian filter; sigma in pixels of the map. float32 (H, W)."""
    return ndimage.gaussian_filter(heatmap.numpy(), sigma) if sigma else heatmap.numpy()
