# SPDX-License-Identifier: Apache-2.0
"""Watch whether features collapse in training (paper, section 3.2: 'catastrophic collapse').

The compactness loss has a useless minimum, f(x) = c for every image.
The watch reads the normal training images alone; no anomaly is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from panda_ad.errors import UserError

MIN_RANK = 0.5
MIN_VARIANCE = 0.25
"""Collapsed: effective rank below this share of the pretrained features', or variance below this share.

On three CIFAR-10 classes (embedded backbone, 512 images) AUROC was highest at 0.8 of the variance, back where it began
at about 0.5, and 1 to 2 points below its best at 0.11 to 0.16; the rank had then fallen to between 0.75 and 0.92 only.
"""

SAMPLE = 256
"""Training images looked at; a fixed, seeded choice where there are more."""

LOOKS = 10
"""Most looks at the features in training, at equal intervals and at most one an epoch.

Looking must stay cheaper than training.
"""


def feature_statistics(features: Tensor, center: Tensor) -> dict[str, float]:
    """Return what the watch compares and the history keeps.

    Parameters
    ----------
    features : (N, D) of normal training images.
    center : (D,), of the compactness loss.

    Returns
    -------
    center_distance : mean of ||f(x) - c||, in feature units.
    feature_variance : trace of the covariance / D.
    effective_rank : exp of the entropy of the covariance's normalized eigenvalues (Roy and Vetterli, EUSIPCO 2007),
        1 to min(N - 1, D); 0 where all features are equal.
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
    """Return whether features have collapsed since `start`.

    Both arguments are as `feature_statistics` gives them; NaN counts as collapsed.
    """
    return not (
        now["effective_rank"] >= MIN_RANK * start["effective_rank"]
        and now["feature_variance"] >= MIN_VARIANCE * start["feature_variance"]
    )


class Watch:
    """The history of training, the weights kept of it, and whether the features have collapsed.

    Parameters
    ----------
    pretrained : (N, D), features of some training images before training.
    center : (D,), of the compactness loss.
    state : of the adapted layers before training.
    keep : steps whose states are kept; 0 is `state`.
    judge : whether features can be found collapsed; outliers keep them apart.

    Attributes
    ----------
    snapshots : step -> state.
    history, collapsed_at : see `train.Adapted`.
    """

    def __init__(
        self, pretrained: Tensor, center: Tensor, state: dict[str, Tensor], keep: Sequence[int], *, judge: bool
    ):
        self.center, self.keep, self.judge = center, keep, judge
        self.start = feature_statistics(pretrained, center)
        self.history = [{"step": 0.0, "epoch": 0.0, **self.start}]
        self.collapsed_at: int | None = None
        self.last_good = (0, state)
        self.snapshots = {0: state} if 0 in keep else {}

    def look(self, figures: dict[str, float], features: Tensor, state: dict[str, Tensor]) -> bool:
        """Add a row to the history and return whether the features have collapsed.

        Parameters
        ----------
        figures : step, epoch, loss, ...
        features : (N, D), of the same training images at every look.
        state : of the adapted layers.

        Raises
        ------
        UserError
            A feature is not finite.
        """
        step = int(figures["step"])
        if not torch.isfinite(features).all():
            raise UserError(f"adapt: the features are not finite after step {step}; lower adapt.learning_rate")
        now = feature_statistics(features, self.center)
        self.history.append({**figures, **now})
        if self.collapsed_at is None and self.judge and collapsed(now, self.start):
            self.collapsed_at = step
        if self.collapsed_at is None:
            self.last_good = (step, state)
        if step in self.keep:
            self.snapshots[step] = state
        return self.collapsed_at is not None

    def fall_back(self) -> int:
        """Keep the last state before the collapse in place of those after it; return its step."""
        step, state = self.last_good
        self.snapshots = {s: kept for s, kept in self.snapshots.items() if s < step} | {step: state}
        return step
