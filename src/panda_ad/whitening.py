"""Whitening of features before the search for neighbours: distances count in units of what normal images vary by.

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
        """Features (N, D) float32 -> whitened (N, D) float32. Row by row, so that the sums' order does not depend on the batch."""
        out = np.empty(features.shape, np.float32)
        for i, row in enumerate(features):
            np.dot(row.astype(np.float32) - self.mean, self.matrix, out=out[i])
        return out


def fit_whitening(features: np.ndarray, shrinkage: float | None = None) -> Whitening:
    """Whitening by the covariance of normal training features, in float64.

    Squared distances between whitened features are Mahalanobis distances. The covariance C is shrunk towards a multiple of the
    identity, (1 - s) C + s (trace C / D) I, as Ledoit and Wolf (2004) propose, without which fewer images than dimensions could not
    be whitened. Directions with less variance than `FLOOR` times the largest, or than float32 resolves, count as having that much:
    there a feature that normal images never change does not decide by its rounding errors.

    Parameters
    ----------
    features : (M, D) float32, finite, M >= 1.
    shrinkage : s in [0, 1]; None: Ledoit and Wolf's estimate.
    """
    from sklearn.covariance import LedoitWolf, ShrunkCovariance

    x = features.astype(np.float64)
    fitted = (LedoitWolf() if shrinkage is None else ShrunkCovariance(shrinkage=shrinkage)).fit(x)
    variances, axes = np.linalg.eigh(fitted.covariance_)
    resolved = float(np.abs(x).max() * np.finfo(np.float32).eps) ** 2
    floor = max(FLOOR * float(variances[-1]), resolved) or 1.0  # 1: all features are zero
    matrix = (axes / np.sqrt(np.maximum(variances, floor))) @ axes.T
    return Whitening(fitted.location_.astype(np.float32), matrix.astype(np.float32))
