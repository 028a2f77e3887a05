# SPDX-License-Identifier: Apache-2.0
"""Calibrate a detector on its own training images, each scored by a model that has not seen it.

So no image has to be held out, and all of them serve as gallery and maps. The final model knows more images than the
models of the folds do and scores new ones a little lower, so that the promise errs on the safe side: the jackknife of
Barber et al. 2021 (https://arxiv.org/abs/1905.02928) and cross-conformal prediction (Vovk 2015) with a single model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from panda_ad.features.image_statistics import Reference, as_float16, image_statistics, statistics_matrix
from panda_ad.features.images import Images
from panda_ad.scoring.detector import Detector
from panda_ad.scoring.fit_localizer import out_of_fold_maps
from panda_ad.scoring.folds import Folds, draw
from panda_ad.scoring.image_score import image_scores, map_scores

CALIBRATED = 1000
"""Most images whose scores calibrate: a rate of 5 % is then known to 1.4 points."""
WITHIN = 300
"""Most images whose scores say how often parts of known sessions alarm."""
_COLORED = 256  # most images whose heat maps set the overlays' colors


@dataclass(frozen=True)
class OutOfFold:
    """Training images as models of the other folds see them.

    Attributes
    ----------
    folds : the division.
    scores : float64 (S, M), kNN scores per snapshot.
    features : float32 (M, D), transformed, under the last snapshot.
    """

    folds: Folds
    scores: np.ndarray
    features: np.ndarray


def calibrated(detector: Detector, train: Images, known: OutOfFold, chosen: np.ndarray) -> Detector:
    """Add calibration scores, what monitoring compares with, and the range of the overlays' colors.

    Parameters
    ----------
    detector : fitted but for this.
    chosen : ascending indices (N,) of the images to calibrate on.
    """
    scores, colors = out_of_fold_image_scores(detector, train, known, chosen)
    statistics = statistics_matrix([image_statistics(train.read(int(i))) for i in chosen])
    reference = Reference(statistics.astype(np.float32), as_float16(known.features[chosen]))
    config = detector.config
    if colors is not None:
        config = config.model_copy(update={"heatmap_range": colors})
    return replace(detector, config=config, calibration=scores, reference=reference)


def out_of_fold_image_scores(
    detector: Detector, train: Images, known: OutOfFold, chosen: np.ndarray
) -> tuple[np.ndarray, tuple[float, float] | None]:
    """Return the chosen images' scores, float64 (N,), and `heatmap_range` of their maps, None without a localizer."""
    feature_scores, _ = detector.aggregate(known.scores, known.features)
    values, peaks, room = [], np.empty(len(chosen)), _COLORED
    if detector.localizer is not None:
        tiles = detector.localizer.tiles
        wanted = chosen if detector.config.score != "features" else draw(known.folds, _COLORED, 0, chosen)
        for at, maps in out_of_fold_maps(detector, train, known.features, known.folds, wanted):
            peaks[at] = map_scores(maps)
            values.append(maps[:room, ::tiles, ::tiles].copy())  # of joined maps as many pixels as of an untiled one
            room -= len(values[-1])
        colors = heatmap_range(np.concatenate(values), peaks[: len(wanted)])
    scores = image_scores(detector.config.score, feature_scores[chosen], peaks, detector.scales)
    return scores, colors if values else None


def heatmap_range(maps: np.ndarray, peaks: np.ndarray) -> tuple[float, float]:
    """Return where an overlay's color starts and where it is full, so that a good part stays nearly clear.

    Parameters
    ----------
    maps : float32 (M, h, w), of normal images that the maps have not seen.
    peaks : float32 (M,), their maxima.
    """
    median, peak = float(np.median(maps)), float(np.median(peaks))
    return (median + 0.8 * (peak - median), median + 2.0 * (peak - median))
