"""One score per image: how far its pooled features lie from normal (PANDA, section 3.3), how unusual its worst spot is, or both.

Pooled features see what the whole image shows and lose a defect of a few pixels in the mean; the peak of the heat map is made by just
that defect (Roth et al. 2022, https://arxiv.org/abs/2106.08265, section 3.3), and does not see that a part is missing or of another kind.
What is usual is learned from training images alone: calibration images must not shape the score that they calibrate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

IQR = 1.3489795003921634
"""Interquartile range of a normal distribution in standard deviations."""
FOLDS = 5
"""Parts of the training images that are scored by models of the others."""


@dataclass(frozen=True)
class RobustScale:
    """What is usual for a score among normal images: median, and interquartile range / `IQR` (1 where all are equal)."""

    center: float
    spread: float

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Scores (N,) in robust standard deviations above the usual, float64."""
        return (scores - self.center) / self.spread


def fit_robust_scale(scores: np.ndarray) -> RobustScale:
    """RobustScale of the scores (M,) of normal images by a model that has not seen them.

    Quantiles, since a defect among them would widen a standard deviation and thereby hide its like.
    """
    low, center, high = np.quantile(np.asarray(scores, dtype=np.float64), [0.25, 0.5, 0.75])
    return RobustScale(float(center), float((high - low) / IQR) or 1.0)


@dataclass(frozen=True)
class PixelStatistics:
    """What heat maps of normal images show at each place: borders, edges and prints differ more from image to image than plain parts.

    Attributes
    ----------
    mean, spread : float32 (H, W), of the heat maps' shape; the spread is positive.
    """

    mean: np.ndarray
    spread: np.ndarray

    def peaks(self, heatmaps: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """max over places of (map - mean) / spread: (N, H, W) float32 -> (N,) float64."""
        return np.array([((heatmap - self.mean) / self.spread).max() for heatmap in heatmaps], dtype=np.float64)


def fit_pixel_statistics(heatmaps: Sequence[np.ndarray] | np.ndarray) -> PixelStatistics:
    """Mean and standard deviation per place of maps (N, H, W) of normal images by a localizer that has not seen them.

    A place never counts as steadier than the median place does: of a few maps some places agree by chance.
    """
    total, squares = np.zeros(heatmaps[0].shape), np.zeros(heatmaps[0].shape)
    for heatmap in heatmaps:  # one at a time: joined maps of tiles are large
        total += heatmap
    mean = total / len(heatmaps)
    for heatmap in heatmaps:
        squares += np.square(heatmap - mean)
    spread = np.sqrt(squares / len(heatmaps))
    return PixelStatistics(
        mean.astype(np.float32), np.maximum(spread, float(np.median(spread)) or 1.0).astype(np.float32)
    )


def out_of_fold_peaks(heatmaps: np.ndarray) -> np.ndarray:
    """Peaks (N,) of maps (N, H, W), those of each of `FOLDS` parts over what is usual in the others."""
    peaks = np.empty(len(heatmaps))
    for fold in np.array_split(np.arange(len(heatmaps)), min(FOLDS, len(heatmaps))):
        rest = np.setdiff1d(np.arange(len(heatmaps)), fold)
        peaks[fold] = fit_pixel_statistics([heatmaps[i] for i in rest]).peaks([heatmaps[i] for i in fold])
    return peaks


def image_scores(
    method: str, features: np.ndarray, peaks: np.ndarray | None, scales: tuple[RobustScale, RobustScale] | None
) -> np.ndarray:
    """The score by `verdict.score`.

    Parameters
    ----------
    method : `features`: as the paper; `heatmap`: the heat map's peak; `both`: the sum of the two in units of their `scales`.
    features : (N,) scores of the pooled features (kNN, SES or outlier exposure).
    peaks : (N,), `PixelStatistics.peaks` of the heat maps; None only for `features`.
    scales : of features and peaks; None only for the single ones.

    Returns
    -------
    (N,) float64, higher is more anomalous.
    """
    if method == "features":
        return features
    assert peaks is not None
    if method == "heatmap":
        return peaks
    assert method == "both" and scales is not None
    return scales[0](features) + scales[1](peaks)
