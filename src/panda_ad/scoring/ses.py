# SPDX-License-Identifier: Apache-2.0
"""Sample-wise early stopping, SES (paper, section 3.2: 'PANDA-SES').

No labeled anomalies exist to stop training by. Adapted layers are kept at fixed intervals, and each image is scored by
the snapshot under which it stands out most from normal images.
"""

from __future__ import annotations

import numpy as np

from panda_ad.errors import UserError


def ses_scores(scores: np.ndarray, train_means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the maximum over snapshots s of score_s(x) / mean_s.

    Scores shrink as features become compact.
    Dividing by the mean score of normal training images under the same snapshot makes them comparable.
    The means must be leave-one-out: a training image that finds itself scores too low.

    Parameters
    ----------
    scores : (S, N) kNN scores of N images under each of S snapshots.
    train_means : (S,) mean leave-one-out score of the normal training images under each snapshot.

    Returns
    -------
    scores (N,) float64, in units of the mean normal score, and the deciding snapshot (N,) int64 (the earliest on ties).

    Raises
    ------
    UserError
        A mean is not positive: all training features are equal.
    """
    scores, means = np.asarray(scores, dtype=np.float64), np.asarray(train_means, dtype=np.float64)
    if scores.ndim != 2 or means.shape != (len(scores),):
        raise ValueError(f"scores (S, N) and train_means (S,) are expected, found {scores.shape} and {means.shape}")
    if not (means > 0).all():
        s = int(np.argmin(means > 0))
        raise UserError(
            f"snapshot {s}: the normal training images score {means[s]:g} on average; are they all copies of one image?"
        )
    ratios = scores / means[:, None]  # (S, N)
    decided = ratios.argmax(axis=0)
    return ratios[decided, np.arange(ratios.shape[1])], decided.astype(np.int64)
