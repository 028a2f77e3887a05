# SPDX-License-Identifier: Apache-2.0
"""What scoring answers: scores of many images with their evidence, and the verdict on one."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from panda_ad.scoring.localize.maps import resize


@dataclass(frozen=True)
class Verdict:
    """What a user gets for one image.

    Attributes
    ----------
    score : anomaly score, higher is more anomalous, unclamped.
    p_value : share of good parts expected to score at least as high, in (0, 1] (conformal).
    anomalous : whether the score is above the threshold for the false-alarm budget.
    heatmap : float32 (H, W) at the image's size, higher is more anomalous; None if not asked for or not built.
    region : the part of the heat map that stands out most, (x0, y0, x1, y1) in pixels, end exclusive.
        None without a heat map.
    features : float32 (D,), pooled, under the last snapshot.
    components : (feature score, map score) in robust standard deviations above the normal median, whose sum is the
        score; None unless the score is 'both'.
    """

    score: float
    p_value: float
    anomalous: bool
    heatmap: np.ndarray | None = None
    region: tuple[int, int, int, int] | None = None
    features: np.ndarray | None = field(default=None, compare=False, repr=False)
    components: tuple[float, float] | None = None


@dataclass(frozen=True)
class Scores:
    """Scores of N images with their evidence.

    Attributes
    ----------
    score : (N,) float64.
    snapshot : (N,) int64, the one that decided (SES: the one with the largest normalized score).
    neighbors, distances : (N, k) int64 and float64 (squared), gallery images nearest under the deciding snapshot.
    features : (N, D) float32, under the last snapshot.
    heatmaps : float32 (N, h, w) at network input size, of joined tiles larger (`tiling.grid`), or None.
    feature_score : (N,) float64, of the pooled features.
    map_score : (N,) float64, largest value of the heat maps; None without maps.
    """

    score: np.ndarray
    snapshot: np.ndarray
    neighbors: np.ndarray
    distances: np.ndarray
    features: np.ndarray
    heatmaps: np.ndarray | None
    feature_score: np.ndarray
    map_score: np.ndarray | None


def resize_map(heatmap: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Bring a heat map (h, w) to (H, W) pixels, bilinear, float32."""
    if heatmap.shape == tuple(size):
        return heatmap
    return resize(heatmap, (size[0], size[1]))


def region(heatmap: np.ndarray) -> tuple[int, int, int, int]:
    """Return the box (x0, y0, x1, y1) around the connected part of a heat map that holds the peak.

    The part lies above the middle between median and peak. The box's end is exclusive, in pixels.
    """
    from scipy import ndimage

    peak = np.unravel_index(int(heatmap.argmax()), heatmap.shape)
    labels, _ = ndimage.label(heatmap >= (heatmap[peak] + np.median(heatmap)) / 2)
    rows, columns = ndimage.find_objects((labels == labels[peak]).astype(np.int8))[0]
    return (columns.start, rows.start, columns.stop, rows.stop)
