# SPDX-License-Identifier: Apache-2.0
"""From scores to verdicts: conformal p-values, and a threshold that keeps a false-alarm budget.

Calibration scores are those of normal images by a model that has not seen them (`fit_calibration`) or, where sessions
are known, none of their session. Test images play no part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import betaincinv

from panda_ad.errors import UserError
from panda_ad.scoring.session_rates import SessionRates, session_rates


@dataclass(frozen=True)
class Threshold:
    """A decision rule: an image is anomalous where its score > value.

    Attributes
    ----------
    value : the threshold, in units of the score.
    rate : the false-alarm rate asked for, in (0, 1).
    expected : the mean of the true false-alarm rate over draws of the calibration set, k / (M + 1).
        It is more than `rate` where n is not `enough`.
    interval : (low, high) in which the true false-alarm rate lies with 95 % confidence, given that many scores.
        With sessions it is that of a session never seen.
    n : calibration scores.
    enough : whether n suffices to keep the rate (n + 1 >= 1 / rate).
    message : empty if it does, else one line that says what is missing and what the threshold does instead.
    sessions : what it does to parts of sessions; None where fewer than two are known.
    """

    value: float
    rate: float
    expected: float
    interval: tuple[float, float]
    n: int
    enough: bool
    message: str
    sessions: SessionRates | None = None


def p_values(calibration: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Return conformal p-values (1 + #{calibration >= score}) / (M + 1) (Vovk et al. 2005, 2.2).

    For a good image exchangeable with the calibration images, P(p <= r) <= r for every rate r.

    Parameters
    ----------
    calibration : (M,) finite scores of normal images.
    scores : (N,) finite.

    Returns
    -------
    (N,) float64 in [1 / (M + 1), 1].
    """
    ordered = np.sort(_finite(calibration, "calibration"))
    at_least = len(ordered) - np.searchsorted(ordered, _finite(scores, "image", empty=True), side="left")
    return (1 + at_least) / (len(ordered) + 1)


def threshold_rank(count: int, rate: float) -> int:
    """Return k = max(1, floor(rate (count + 1))): the threshold is the k-th largest of `count` calibration scores."""
    return max(1, _allowed(count, rate))


def calibration_needed(rate: float) -> int:
    """Return the least number of calibration scores with which a false-alarm rate can be kept: n + 1 >= 1 / rate."""
    return math.ceil(1 / rate - 1 - 1e-9)


def alarms_chance(alarms: int, images: int, calibration: int, rate: float) -> float:
    """Return the chance of so many alarms or more on good images, with a threshold set for `rate`.

    The true false-alarm rate of the k-th largest of n calibration scores is Beta(k, n + 1 - k) distributed.
    So the number of alarms is beta-binomial.
    A binomial test at the nominal rate would take the calibration's own error for a finding.

    Parameters
    ----------
    alarms, images : alarms seen, and the good images that were scored.
    calibration : number of scores that set the threshold.
    rate : the false-alarm rate asked for, in (0, 1).
    """
    from scipy.stats import betabinom  # seconds to import, for the gate and monitoring alone

    k = threshold_rank(calibration, rate)
    return float(betabinom.sf(alarms - 1, images, k, calibration + 1 - k)) if alarms else 1.0


def _allowed(count: int, rate: float) -> int:
    return math.floor(rate * (count + 1) + 1e-9)  # 0.29 * 100 is 28.999999999999996


def threshold(
    calibration: np.ndarray,
    rate: float,
    confidence: float = 0.95,
    sessions: Sequence[str] = (),
    within: np.ndarray | None = None,
) -> Threshold:
    """Return the lowest threshold whose expected false-alarm rate is at most `rate`.

    Score > value then means p-value <= rate.

    With k = floor(rate (M + 1)), the value is the k-th largest calibration score.
    Whatever the (continuous) distribution of the scores, the true false-alarm rate of that rule is Beta(k, M + 1 - k)
    distributed over draws of the calibration set (mean k / (M + 1)); its central quantiles are the interval.
    With k = 0 no threshold among the scores keeps the rate: the largest score is taken, and `enough` and `message` say
    so.

    Parameters
    ----------
    calibration : (M,) finite scores of normal images, M >= 1.
    rate : share of good parts that may raise an alarm, in (0, 1). Another rate needs no retraining, only this function.
    sessions, within : as in `session_rates`, where sessions are known.

    Raises
    ------
    UserError
        No calibration score, one that is not finite, or a rate outside (0, 1).
    """
    if not 0 < rate < 1:
        raise UserError(f"verdict.false_alarm_rate must lie between 0 and 1, not {rate}")
    ordered = np.sort(_finite(calibration, "calibration"))
    n = len(ordered)
    enough, k = _allowed(n, rate) > 0, threshold_rank(n, rate)
    tail = (1 - confidence) / 2
    low, high = (float(betaincinv(k, n + 1 - k, q)) for q in (tail, 1 - tail))
    message = ""
    if not enough:
        message = (
            f"{n} calibration images are too few for a false-alarm rate of {rate:g}: "
            f"at least {calibration_needed(rate)} are needed; "
            f"the threshold is their largest score, whose expected rate is {1 / (n + 1):.3g}"
        )
    value = float(ordered[n - k])
    if len(set(sessions)) < 2 or within is None:
        return Threshold(value, float(rate), k / (n + 1), (low, high), n, enough, message)
    rates = session_rates(np.asarray(calibration, dtype=np.float64), sessions, within, value, confidence)
    return Threshold(value, float(rate), k / (n + 1), rates.unseen_interval, n, enough, message, rates)


def _finite(values: np.ndarray, what: str, empty: bool = False) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or (not empty and not len(values)):
        raise UserError(f"calibration: no {what} scores; the model is damaged, build it again")
    if not np.isfinite(values).all():
        raise UserError(f"calibration: a {what} score is not finite; the model is damaged")
    return values
