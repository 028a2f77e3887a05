# SPDX-License-Identifier: Apache-2.0
"""Images of a gallery that look least like the others, as models that have not seen them score them.

A bad image hides in its own gallery: it finds itself there. Models of partial memories, of which an image's ranks are
averaged (MeDS, 2026), were tried; the folds that calibrate find as many (docs/decisions.md).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from panda_ad.features.images import Images
from panda_ad.scoring.config import FitParams
from panda_ad.scoring.detector import Detector
from panda_ad.scoring.fit import out_of_fold, training_features
from panda_ad.scoring.fit_localizer import fit_localizer, out_of_fold_map_scores
from panda_ad.scoring.folds import split_folds
from panda_ad.scoring.image_score import fit_robust_scale


def suspicion(detector: Detector, images: Images, params: FitParams) -> np.ndarray:
    """Return how little each image looks like the others, float64 (M,), in robust standard deviations of all.

    Parameters
    ----------
    detector : whose network and classifier are used.
    images : of its gallery.
    params : as it was fitted with.
    """
    empty = replace(detector, galleries=(), whitenings=())
    features = training_features(empty, images)
    folds = split_folds(len(images), params.seed)
    known = out_of_fold(features, folds, params.gallery, detector.config.whiten, params.seed)
    means = known.scores.mean(axis=1)
    found, _ = replace(detector, train_means=means).aggregate(known.scores, known.features)
    found = fit_robust_scale(found)(found)
    if params.localize.method != "none":
        last = detector.transformed(features)[-1]
        mapped = replace(detector, localizer=fit_localizer(detector, images, last, params))
        peaks = out_of_fold_map_scores(mapped, images, known.features, folds, np.arange(len(images)))
        found = found + fit_robust_scale(peaks)(peaks)
    return np.asarray(found)
