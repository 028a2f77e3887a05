# SPDX-License-Identifier: Apache-2.0
"""The one division of training images that all out-of-fold figures use.

These figures are SES's means, robust scales and calibration scores. A fold is a part of the images
at random or, where there are two or more sessions, whole sessions: a model that has seen other images of a session
says nothing of how it scores one that it has not seen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

FOLDS = 5
FEW = 40
"""Fewer images than this are left out one by one: a model of four fifths of them would be worse than the final one."""
SESSION_FOLDS = 10
"""Most folds of sessions; where there are more sessions, several are left out together."""

Folds = list[tuple[np.ndarray, np.ndarray]]
"""(indices of a fold, indices of all others), int64, both ascending."""


def split_folds(count: int, seed: int, sessions: Sequence[str] = ()) -> Folds:
    """Divide `count` images at random into `FOLDS` parts, single images where they are few, or by session.

    Parameters
    ----------
    sessions : of each image; fewer than two distinct ones, or none: the division is at random.
    """
    random = np.random.default_rng(seed)
    names, members = np.unique(np.array(sessions, dtype=object).astype(str), return_inverse=True)
    if len(names) > 1:
        fold_of = np.empty(len(names), dtype=np.int64)
        fold_of[random.permutation(len(names))] = np.arange(len(names)) % SESSION_FOLDS
        parts = [np.flatnonzero(fold_of[members] == fold) for fold in range(min(len(names), SESSION_FOLDS))]
    else:
        order = random.permutation(count)
        parts = np.array_split(order, count if count < FEW else FOLDS)
    every = np.arange(count)
    return [(np.sort(part), np.setdiff1d(every, part)) for part in parts]


def draw(folds: Folds, most: int, seed: int, among: np.ndarray | None = None) -> np.ndarray:
    """Draw at most `most` images, of all or `among` some, as evenly from the folds as these allow.

    Returns ascending indices (N,).
    """
    random = np.random.default_rng(seed)
    orders = [random.permutation(fold if among is None else np.intersect1d(fold, among)) for fold, _ in folds]
    turns = np.concatenate([np.arange(len(order)) for order in orders])
    return np.sort(np.concatenate(orders)[np.argsort(turns, kind="stable")[:most]])
