# SPDX-License-Identifier: Apache-2.0
"""The one division of training images that all out-of-fold figures use.

These figures are SES's means and robust scales.
"""

from __future__ import annotations

import numpy as np

FOLDS = 5

Folds = list[tuple[np.ndarray, np.ndarray]]
"""(indices of a fold, indices of all others), int64, both ascending."""


def split_folds(count: int, seed: int) -> Folds:
    """Divide `count` images at random into `FOLDS` parts, or into single images where there are fewer."""
    order = np.random.default_rng(seed).permutation(count)
    parts = np.array_split(order, min(FOLDS, count))
    return [(np.sort(part), np.setdiff1d(order, part)) for part in parts]
