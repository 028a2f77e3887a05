# SPDX-License-Identifier: Apache-2.0
"""What a threshold does to good parts of known sessions, and of the next one.

The interval of the next session is of sessions, not of images: with few sessions it is wide, however many images each
has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv, ndtr, ndtri

_SHRINK = 10
"""Images that the spread common to all sessions counts as, beside a session's own."""
_PRIOR = 1.0
"""Scale of the half-Cauchy prior of what sessions differ by, in standard deviations within a session."""
_DIFFER = np.linspace(0, 5, 201)
"""Standard deviations among sessions that are weighed, in those within a session."""


@dataclass(frozen=True)
class SessionRates:
    """What a threshold does to good parts of sessions, known ones and one never seen.

    Attributes
    ----------
    sessions : number of sessions that calibrated.
    within : share of good parts of a known session that raise an alarm.
    within_interval : (low, high) of it, Clopper and Pearson.
    unseen : the same of a session never seen: the mean over sessions, each scored without its own images.
    unseen_interval : (low, high) in which the rate of the next session lies with 95 % confidence.
    """

    sessions: int
    within: float
    within_interval: tuple[float, float]
    unseen: float
    unseen_interval: tuple[float, float]

    def __str__(self) -> str:
        """Say both rates in one line."""
        parts = []
        for name, rate, (low, high) in (
            ("within sessions", self.within, self.within_interval),
            ("on a session never seen", self.unseen, self.unseen_interval),
        ):
            parts.append(f"{name} {100 * rate:.2g} % [{100 * low:.2g}, {100 * high:.2g}]")
        return ", ".join(parts)


def session_rates(
    calibration: np.ndarray, sessions: Sequence[str], within: np.ndarray, limit: float, confidence: float = 0.95
) -> SessionRates:
    """Return what a threshold does to good parts of sessions.

    The interval of a session never seen takes sessions as exchangeable. Scores are brought to a normal scale by their
    ranks; there, each session's distance from the threshold, in its own standard deviations, is one observation, and
    `next_session` says where the next one lies. Its coverage was simulated (benchmarks/promise.py). Where differences
    need not be normal, G sessions promise no less than 1 / (G + 1) (Dunn et al. 2022,
    https://arxiv.org/abs/1809.07441, take one image of each).

    Parameters
    ----------
    calibration : (M,), scores of images by a model that has seen none of their session.
    sessions : of each, two or more distinct ones.
    within : (W,), scores of images by a model that has seen others of their session.
    limit : the threshold.
    """
    _, members, counts = np.unique(np.array(sessions, dtype=str), return_inverse=True, return_counts=True)
    low, high = (float(ndtr(end)) for end in next_session(*_distances(calibration, members, limit), confidence))
    unseen = float(np.mean(np.bincount(members, calibration > limit) / counts))
    alarms, n = int((within > limit).sum()), len(within)
    tail = (1 - confidence) / 2
    least = float(betaincinv(alarms, n - alarms + 1, tail)) if alarms else 0.0
    most = float(betaincinv(alarms + 1, n - alarms, 1 - tail)) if alarms < n else 1.0
    return SessionRates(len(counts), alarms / n, (least, most), unseen, (min(low, unseen), max(high, unseen)))


def _distances(calibration: np.ndarray, members: np.ndarray, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """Return each session's mean less the threshold in its standard deviations, (G,), and that figure's variance.

    Parameters
    ----------
    members : (M,), number of the session of each score.
    """
    counts = np.bincount(members)
    order = np.searchsorted(np.sort(calibration), calibration, side="right")
    values = ndtri((order - 0.5) / len(calibration))
    place = float(ndtri(np.clip((calibration <= limit).mean(), 0.5 / len(calibration), 1 - 0.5 / len(calibration))))
    means = np.bincount(members, values) / counts
    residuals = values - means[members]
    squares = np.bincount(members, residuals**2)
    pooled = float(squares.sum()) / max(1, len(values) - len(counts)) or 1.0
    freedom = counts - 1 + _SHRINK
    distances = (means - place) / np.sqrt((squares + _SHRINK * pooled) / freedom)
    return distances, 1 / counts + distances**2 / 2 * (counts - 1) / freedom**2


def next_session(distances: np.ndarray, variances: np.ndarray, confidence: float) -> tuple[float, float]:
    """Return the interval in which the next session's distance lies, by the normal random-effects model.

    Sessions lie around a mean with a standard deviation that is not known. Both are integrated over: the mean with a
    flat prior, the deviation on a grid with a half-Cauchy one (Röver 2020, https://arxiv.org/abs/1711.08683,
    sections 2.2 to 2.5). So the error that a few images leave in a session's distance is not taken for a difference
    of sessions, and that few sessions may look more alike than they are is.

    Parameters
    ----------
    distances, variances : (G,), of known sessions, G >= 2; the variance of each one's own error, above 0.
    """
    total = _DIFFER[:, None] ** 2 + variances
    error = 1 / (1 / total).sum(axis=1)  # variance of the mean, given a deviation
    mean = (distances / total).sum(axis=1) * error
    log = 0.5 * np.log(error) - 0.5 * (np.log(total) + (distances - mean[:, None]) ** 2 / total).sum(axis=1)
    log -= np.log1p((_DIFFER / _PRIOR) ** 2)
    weight = np.exp(log - log.max())
    weight /= weight.sum()
    spread = np.sqrt(_DIFFER**2 + error)

    def quantile(share: float) -> float:
        low = -float(np.abs(distances).max()) - 100
        high = -low
        while high - low > 1e-9:
            middle = (low + high) / 2
            low, high = (middle, high) if float(weight @ ndtr((middle - mean) / spread)) < share else (low, middle)
        return (low + high) / 2

    return quantile((1 - confidence) / 2), quantile((1 + confidence) / 2)
