"""Collapse watch: does adaptation still tell images apart? (paper, section 3.2: 'catastrophic collapse')

The compactness loss has a useless minimum, f(x) = c for every image. It is watched on the normal training images alone; no
anomaly is needed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MIN_RANK = 0.5
MIN_VARIANCE = 0.25
"""Collapsed: effective rank below this share of the unadapted features', or variance below this share.

On three CIFAR-10 classes (embedded backbone, 512 images) AUROC was highest at 0.8 of the variance, back where it began at about
0.5, and 1 to 2 points below its best at 0.11 to 0.16; the rank had then fallen to between 0.75 and 0.92 only.
"""

SAMPLE = 256
"""Training images looked at; a fixed, seeded choice where there are more."""


def feature_statistics(features: Tensor, center: Tensor) -> dict[str, float]:
    """What the watch logs.

    Parameters
    ----------
    features : (N, D) of normal training images.  center : (D,), of the compactness loss.

    Returns
    -------
    center_distance : mean of ||f(x) - c||, in feature units.
    feature_variance : trace of the covariance / D.
    effective_rank : exp of the entropy of the covariance's normalized eigenvalues (Roy and Vetterli, EUSIPCO 2007), 1 to
        min(N - 1, D); 0 where all features are equal.
    """
    x = features.double()
    centered = x - x.mean(dim=0)
    # the smaller of covariance and Gram matrix has the same non-zero spectrum
    gram = centered @ centered.T if len(x) < x.shape[1] else centered.T @ centered
    spectrum = torch.linalg.eigvalsh(gram).clamp(min=0) / len(x)
    trace = float(spectrum.sum())
    p = spectrum / max(trace, 1e-300)
    p = p[p > 1e-12]
    return {
        "center_distance": float((x - center.double()).norm(dim=1).mean()),
        "feature_variance": trace / x.shape[1],
        "effective_rank": math.exp(float(-(p * p.log()).sum())) if trace > 1e-20 else 0.0,
    }


def collapsed(now: dict[str, float], start: dict[str, float]) -> bool:
    """Whether features have collapsed since `start`, both as `feature_statistics` gives them."""
    return not (
        now["effective_rank"] >= MIN_RANK * start["effective_rank"]
        and now["feature_variance"] >= MIN_VARIANCE * start["feature_variance"]
    )
