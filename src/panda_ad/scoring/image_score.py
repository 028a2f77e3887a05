# SPDX-License-Identifier: Apache-2.0
"""One score per image: the feature score (PANDA, section 3.3), the map score, or the sum of both.

Pooled features see what the whole image shows, and lose a defect of a few pixels in the mean. The peak of the heat map
is made by just that defect (Roth et al. 2022, https://arxiv.org/abs/2106.08265, section 3.3), and does not see that a
part is missing or of another kind. Scales are learned from training images, out-of-fold: calibration images must not
shape the score that they calibrate.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IQR = 1.3489795003921634
"""Interquartile range of a normal distribution in standard deviations."""


@dataclass(frozen=True)
class RobustScale:
    """Median of a score among normal images, and its interquartile range / `IQR` (1 where all are equal)."""

    center: float
    spread: float

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Return scores (N,) in robust standard deviations above the median, float64."""
        return np.asarray((scores - self.center) / self.spread)


def fit_robust_scale(scores: np.ndarray) -> RobustScale:
    """Fit a scale to the scores (M,) of normal images by a model that has not seen them.

    Quantiles, since a defect among them would widen a standard deviation and thereby hide its like.
    """
    low, center, high = np.quantile(np.asarray(scores, dtype=np.float64), [0.25, 0.5, 0.75])
    return RobustScale(float(center), float((high - low) / IQR) or 1.0)


def map_scores(heatmaps: np.ndarray) -> np.ndarray:
    """Return the largest value of each heat map: (N, H, W) float32 -> (N,) float64."""
    return np.asarray(heatmaps.max(axis=(1, 2)), dtype=np.float64)


def image_scores(
    method: str,
    feature_score: np.ndarray,
    map_score: np.ndarray | None,
    scales: tuple[RobustScale, RobustScale] | None,
) -> np.ndarray:
    """Return the score that `verdict.score` names.

    Parameters
    ----------
    method : `features`: as the paper; `heatmap`: the map score; `both`: the sum of the two in units of their `scales`.
    feature_score : (N,), of the pooled features (kNN, SES or outlier exposure).
    map_score : (N,), `map_scores`; None only for `features`.
    scales : of the two; None only for a single one.

    Returns
    -------
    (N,) float64, higher is more anomalous.
    """
    if method == "features":
        return feature_score
    assert map_score is not None
    if method == "heatmap":
        return map_score
    assert method == "both" and scales is not None
    return np.asarray(scales[0](feature_score) + scales[1](map_score))
