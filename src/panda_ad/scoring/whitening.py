# SPDX-License-Identifier: Apache-2.0
"""Whitening of features before the search for neighbors: distances count in units of what normal images vary by.

Not in the paper; its authors name it a strong method for small sets (github.com/talreiss/PANDA, issue 7).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FLOOR = 1e-6
"""Least variance that counts along an axis, as a share of the largest; float32 keeps three digits at that ratio."""


@dataclass(frozen=True)
class Whitening:
    """z = (x - mean) matrix.

    Attributes
    ----------
    mean : (D,) float32.
    matrix : (D, D) float32, symmetric (ZCA): the inverse square root of the covariance.
    """

    mean: np.ndarray
    matrix: np.ndarray

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Whiten features (N, D) float32 -> (N, D) float32.

        It is done row by row, so that the sums' order does not depend on the batch.
        """
        out = np.empty(features.shape, np.float32)
        for i, row in enumerate(features):
            np.dot(row.astype(np.float32) - self.mean, self.matrix, out=out[i])
        return out


def fit_whitening(features: np.ndarray, shrinkage: float | None = None) -> Whitening:
    """Fit whitening to the covariance of normal training features, in float64.

    Squared distances between whitened features are Mahalanobis distances. The covariance C is shrunk towards a multiple
    of the identity, (1 - s) C + s (trace C / D) I, as Ledoit and Wolf (2004) propose.
    Without that, fewer images than dimensions could not be whitened.
    Directions with less variance than `FLOOR` times the largest, or than float32 resolves, count as having that much.
    So a feature that normal images never change does not decide by its rounding errors.

    Parameters
    ----------
    features : (M, D) float32, finite, M >= 1.
    shrinkage : s in [0, 1]; None: Ledoit and Wolf's estimate.
    """
    x = features.astype(np.float64)
    mean = x.mean(axis=0)
    centered = x - mean
    covariance = centered.T @ centered / len(x)
    s = ledoit_wolf_shrinkage(centered, covariance) if shrinkage is None else shrinkage
    rest = s * np.trace(covariance) / len(covariance)  # variance along directions that no image varies in
    if len(x) < len(covariance):  # fewer images than dimensions: their own axes are found far sooner
        _, sizes, rows = np.linalg.svd(centered, full_matrices=False)
        axes, variances = rows.T, np.square(sizes) / len(x)
    else:
        variances, axes = np.linalg.eigh(covariance)
    variances = (1 - s) * variances + rest
    resolved = float(np.abs(x).max() * np.finfo(np.float32).eps) ** 2
    floor = max(FLOOR * float(variances.max()), resolved) or 1.0  # 1: all features are zero
    base = 1 / np.sqrt(max(rest, floor))
    matrix = (axes * (1 / np.sqrt(np.maximum(variances, floor)) - base)) @ axes.T
    matrix.flat[:: len(matrix) + 1] += base
    return Whitening(mean.astype(np.float32), matrix.astype(np.float32))


def ledoit_wolf_shrinkage(centered: np.ndarray, covariance: np.ndarray) -> float:
    """Return the shrinkage in [0, 1] of least expected squared error.

    Source: Ledoit and Wolf 2004, https://doi.org/10.1016/S0047-259X(03)00096-4, section 3.3.

    Parameters
    ----------
    centered : float64 (M, D), rows of mean zero.
    covariance : (D, D), centered' centered / M.
    """
    count, dimension = centered.shape
    squares = float(np.square(covariance).sum())
    mean_variance = float(np.trace(covariance)) / dimension
    away = squares - dimension * mean_variance**2  # ||C - m I||^2, the paper's d^2 times D
    noise = (
        float(np.square(np.square(centered).sum(axis=1)).sum()) / count - squares
    ) / count  # the paper's b^2 times D
    return min(max(noise, 0.0), away) / away if away > 0 else 0.0
