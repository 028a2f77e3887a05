# SPDX-License-Identifier: Apache-2.0
"""Image metrics on raw scores, and their bootstrap intervals.

All of them are functions of one curve: how many anomalous (`tp`) and normal (`fp`) images score at or above each
distinct score. Tied scores enter together, so no result depends on the order of the images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from panda_ad.errors import UserError

Metric = Callable[[np.ndarray, np.ndarray], float]

SMALL = 10
"""A class of fewer images is too small for AUROC's bootstrap interval."""

_BLOCK = 2**21  # resample counts held at a time: bounds the bootstrap's memory to some 50 MB


def auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Compute the area under the ROC curve.

    It is P(anomalous scores above normal) + P(they tie) / 2 (Mann-Whitney with midranks).

    Parameters
    ----------
    labels : (N,) of 0 (normal) and 1 (anomalous), both present.
    scores : (N,) finite floats, higher is more anomalous.

    Raises
    ------
    UserError
        A score is NaN or infinite, a class is missing, or the lengths differ. So do all functions of this module.
    """
    return float(_auroc(*_curve(labels, scores)[:2]))


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Compute average precision: the sum over the anomalous images of (recall step) x (precision there).

    There is no interpolation.
    """
    return float(_average_precision(*_curve(labels, scores)[:2]))


def fpr_at_tpr(labels: np.ndarray, scores: np.ndarray, tpr: float = 0.95) -> float:
    """Compute the false-positive rate at the highest threshold that finds at least a share `tpr` of the anomalous.

    There is no interpolation.
    """
    if not 0 < tpr <= 1:
        raise UserError(f"fpr_at_tpr: tpr must lie in (0, 1], not {tpr}")
    return float(_fpr_at_tpr(*_curve(labels, scores)[:2], tpr))


def recall_at_budget(budget: float) -> Metric:
    """Return a metric: the share of the anomalous above a threshold.

    The threshold is the lowest that alarms at most a share `budget` of these normal images.
    """

    def metric(labels: np.ndarray, scores: np.ndarray) -> float:
        normal = np.sort(scores[labels == 0])[::-1]
        allowed = min(int(np.floor(budget * len(normal) + 1e-9)), len(normal) - 1)
        return float((scores[labels == 1] > normal[allowed]).mean())

    return metric


def youden(labels: np.ndarray, scores: np.ndarray) -> float:
    """Return Youden's J of the decisions score > 0, in [-1, 1].

    It is the share of the anomalous above 0 less the share of the normal above 0.
    """
    return float((scores[labels == 1] > 0).mean() - (scores[labels == 0] > 0).mean())


def roc_curve(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute the ROC curve: false-positive rate, true-positive rate and threshold, each (T + 1,) float64.

    There is one point per distinct score (score >= threshold), thresholds descending.
    Before them is the point (0, 0) with threshold infinity.
    """
    tp, fp, thresholds = _curve(labels, scores)
    return np.r_[0, fp / fp[-1]], np.r_[0, tp / tp[-1]], np.r_[np.inf, thresholds]


def bootstrap_interval(
    metric: Metric, labels: np.ndarray, scores: np.ndarray, n: int = 1000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Compute the percentile bootstrap interval of a metric.

    Normal and anomalous images are resampled apart, so their numbers stay.

    Parameters
    ----------
    metric : `auroc`, `average_precision`, `fpr_at_tpr` (vectorized), or any function of labels and scores.
        The latter is called once per resample.
    labels, scores : (N,) as in `auroc`.
    n : resamples.
    confidence : coverage, in (0, 1).
    seed : of the resampling; the same seed gives the same interval.

    Returns
    -------
    (low, high). Where the classes are fully separated, every resample gives the sample's own value, and where one has
    fewer than `SMALL` images, resampling sees too little of their spread: AUROC's interval is then Newcombe's.
    That of any other metric is as narrow as it comes out.
    """
    labels, scores = _checked(labels, scores)
    if metric is auroc:
        value, normal, anomalous = auroc(labels, scores), int((labels == 0).sum()), int((labels == 1).sum())
        if value in (0.0, 1.0) or min(normal, anomalous) < SMALL:
            return newcombe_interval(value, normal, anomalous, confidence)
    values = np.concatenate([resample_metric(metric, labels, scores, counts) for counts in _resamples(labels, n, seed)])
    return percentiles(values, confidence)


def newcombe_interval(value: float, normal: int, anomalous: int, confidence: float) -> tuple[float, float]:
    """Compute the interval (low, high) of an AUROC `value` in [0, 1] from numbers of images, both at least 1.

    Source: Newcombe, Confidence intervals for an effect size measure based on the Mann-Whitney statistic, part 2,
    Statistics in Medicine 2006, method 5. The ends are the t at which (value - t)^2 = z^2 var(t), with the variance of
    Hanley and McNeil (Radiology 1982) for groups of equal size.
    """
    from scipy.optimize import brentq
    from scipy.special import ndtri  # the normal distribution's quantile; scipy.stats takes a second to import

    z = float(ndtri((1 + confidence) / 2))
    more = (normal + anomalous) / 2 - 1

    def error(t: float) -> float:
        return math.sqrt(t * (1 - t) * (1 + more * ((1 - t) / (2 - t) + t / (1 + t))) / (normal * anomalous))

    # at the value itself the difference is 0 and the error is not (or, at 0 and 1, both are: start beside it)
    low = 0.0 if value == 0 else float(brentq(lambda t: value - t - z * error(t), 0, min(value, 1 - 1e-12)))
    high = 1.0 if value == 1 else float(brentq(lambda t: t - value - z * error(t), max(value, 1e-12), 1))
    return low, high


def binomial_interval(hits: int, n: int, confidence: float) -> tuple[float, float]:
    """Compute the interval (low, high) of a share from `hits` out of n >= 1.

    Clopper and Pearson, Biometrika 1934: the interval is never too narrow.
    """
    from scipy.special import betaincinv

    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else float(betaincinv(hits, n - hits + 1, tail))
    high = 1.0 if hits == n else float(betaincinv(hits + 1, n - hits, 1 - tail))
    return low, high


def paired_bootstrap(
    metric: Metric, labels: np.ndarray, scores_a: np.ndarray, scores_b: np.ndarray, n: int = 1000, seed: int = 0
) -> np.ndarray:
    """Compute metric(a) - metric(b) on n stratified resamples, the same images for both: (n,) float64."""
    labels, scores_a = _checked(labels, scores_a)
    _, scores_b = _checked(labels, scores_b)
    return np.concatenate(
        [
            resample_metric(metric, labels, scores_a, c) - resample_metric(metric, labels, scores_b, c)
            for c in _resamples(labels, n, seed)
        ]
    )


def percentiles(values: np.ndarray, confidence: float) -> tuple[float, float]:
    """Return the central interval that holds a share `confidence` of the values."""
    if not 0 < confidence < 1:
        raise UserError(f"confidence must lie in (0, 1), not {confidence}")
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _checked(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return labels (N,) int8 and scores (N,) float64, or UserError."""
    labels, scores = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if labels.ndim != 1 or labels.shape != scores.shape:
        raise UserError(
            f"metrics: labels {labels.shape} and scores {scores.shape} must be two lists of the same length"
        )
    if not np.isin(labels, (0, 1)).all():
        raise UserError("metrics: a label is neither 0 (normal) nor 1 (anomalous)")
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        raise UserError(
            f"metrics: {len(bad)} of {len(scores)} scores are not finite (first: number {bad[0]}); the model is damaged"
        )
    normal, anomalous = int((labels == 0).sum()), int((labels == 1).sum())
    if not normal or not anomalous:
        raise UserError(
            f"metrics: {normal} normal and {anomalous} anomalous test images; at least one of each is needed"
        )
    return labels.astype(np.int8), scores


def _order(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the order of descending score (N,), and the last position of each run of equal scores (T,)."""
    order = np.argsort(-scores, kind="stable")
    return order, np.r_[np.flatnonzero(np.diff(scores[order])), len(scores) - 1]


def _curve(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tp, fp (T,) int64 at each distinct score, descending, and these scores."""
    labels, scores = _checked(labels, scores)
    order, ends = _order(scores)
    tp = np.cumsum(labels[order], dtype=np.int64)[ends]
    return tp, ends + 1 - tp, scores[order][ends]


def _resamples(labels: np.ndarray, n: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each image is drawn, (B, N) int32, in blocks of rows that add up to n."""
    if n < 1:
        raise UserError(f"bootstrap: at least one resample is needed, not {n}")
    rng = np.random.default_rng(seed)
    size = len(labels)
    members = [np.flatnonzero(labels == label) for label in (0, 1)]
    done = 0
    while done < n:
        rows = min(max(1, _BLOCK // size), n - done)
        offset = np.arange(rows)[:, None] * size
        counts = np.zeros(rows * size, np.int64)
        for group in members:
            drawn = group[rng.integers(0, len(group), (rows, len(group)))]  # (rows, members)
            counts += np.bincount((drawn + offset).ravel(), minlength=rows * size)
        yield counts.reshape(rows, size).astype(np.int32)
        done += rows


def resample_metric(metric: Metric, labels: np.ndarray, scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Compute a metric on each of B resamples, (B,) float64.

    Parameters
    ----------
    labels, scores : (N,) as in `auroc`.
    counts : int32 (B, N), how often each image is drawn; each class at least once in every row.
    metric : one of this module is taken from weighted curves, without sorting again.
    """
    if metric not in _OF_CURVE:
        return np.array([metric(np.repeat(labels, row), np.repeat(scores, row)) for row in counts])
    order, ends = _order(scores)
    counts = counts[:, order]
    total = np.cumsum(counts, axis=1, dtype=np.int32)[:, ends]
    tp = np.cumsum(counts * labels[order], axis=1, dtype=np.int32)[:, ends]
    return _OF_CURVE[metric](tp, total - tp)


def _auroc(tp: np.ndarray, fp: np.ndarray) -> np.ndarray:
    """Return the area under ROC curves by trapezoids: tp, fp (..., T) -> (...).

    Sums of integers below 2**53 are exact in float64.
    """
    twice = tp[..., 0].astype(np.float64) * fp[..., 0]
    twice += np.einsum(
        "...t,...t->...",
        (fp[..., 1:] - fp[..., :-1]).astype(np.float64),
        (tp[..., 1:] + tp[..., :-1]).astype(np.float64),
    )
    area: np.ndarray = twice / (2.0 * tp[..., -1].astype(np.float64) * fp[..., -1])
    return area


def _average_precision(tp: np.ndarray, fp: np.ndarray) -> np.ndarray:
    steps = np.diff(tp, axis=-1, prepend=0)
    # a resample may hold nothing above a threshold: precision 0 / 0, with a step of 0
    precision: np.ndarray = (steps * (tp / np.maximum(tp + fp, 1))).sum(axis=-1) / tp[..., -1]
    return precision


def _fpr_at_tpr(tp: np.ndarray, fp: np.ndarray, tpr: float = 0.95) -> np.ndarray:
    # a share of 0.95 of 20 is 19, though 0.95 * 20 may exceed it in the last bit
    first = np.argmax(tp >= tpr * tp[..., -1:] - 1e-9, axis=-1)
    rate: np.ndarray = np.take_along_axis(fp, first[..., None], axis=-1)[..., 0] / fp[..., -1]
    return rate


_OF_CURVE: dict[Metric, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    auroc: _auroc,
    average_precision: _average_precision,
    fpr_at_tpr: _fpr_at_tpr,
}
