# SPDX-License-Identifier: Apache-2.0
"""The figures of a category's test set, and the tables that its plots are drawn from.

A figure that the test images cannot give (an AUROC without defective ones) is left out, never made up.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from panda_ad.evaluation import image_metrics, pixel_metrics
from panda_ad.evaluation.intervals import Intervals
from panda_ad.params import Params
from panda_ad.scoring.session_rates import SessionRates

FEW = 10
"""Fewer images of a class than this are too few to rest a decision on: `cautions` says so."""

RANKING = {
    "image_auroc": image_metrics.auroc,
    "average_precision": image_metrics.average_precision,
    "fpr_at_95_tpr": image_metrics.fpr_at_tpr,
}


def image_figures(
    labels: np.ndarray, scores: np.ndarray, threshold: float, params: Params
) -> tuple[dict[str, float], Intervals]:
    """Compute the figures of image scores.

    Parameters
    ----------
    labels : (N,) of 0 (good) and 1 (defective); either may be absent, N may be 0.
    scores : (N,) finite float64, higher is more anomalous.
    threshold : a score above it is an alarm.

    Returns
    -------
    figures : AUROC, average precision and false-positive rate at 95 % recall (where both classes are present),
        threshold, false-alarm rate (with good images), recall (with defective ones), and the number of images of each.
    intervals : of all of them that are estimates. Ranking figures by bootstrap, rates by Clopper and Pearson.

    Raises
    ------
    UserError
        A score is not finite.
    """
    settings, figures, intervals = params.evaluate, {}, Intervals()
    good, defective = int((labels == 0).sum()), int((labels == 1).sum())
    if good and defective:
        for name, metric in RANKING.items():
            figures[name] = metric(labels, scores)
            intervals[name] = image_metrics.bootstrap_interval(
                metric, labels, scores, settings.bootstrap, settings.confidence, params.seed
            )
    figures["threshold"] = threshold
    for name, label, n in (("false_alarm_rate", 0, good), ("recall", 1, defective)):
        if n:
            alarms = int((scores[labels == label] > threshold).sum())
            figures[name] = alarms / n
            intervals[name] = image_metrics.binomial_interval(alarms, n, settings.confidence)
    return figures | {"test_good": good, "test_defect": defective}, intervals


def component_figures(
    labels: np.ndarray, feature_scores: np.ndarray, map_scores: np.ndarray | None
) -> dict[str, float]:
    """Compute the AUROC that either component of the score would give alone.

    The result is empty without good or without defective images.

    Parameters
    ----------
    labels : (N,) of 0 and 1.  feature_scores, map_scores : (N,) float64, or None without heat maps.
    """
    if len(set(labels.tolist())) < 2:
        return {}
    figures = {"features_auroc": image_metrics.auroc(labels, feature_scores)}
    return figures if map_scores is None else figures | {"heatmap_auroc": image_metrics.auroc(labels, map_scores)}


def session_figures(rates: SessionRates) -> tuple[dict[str, float], Intervals]:
    """Return the false-alarm rates of known sessions and of one never seen, estimated from training images."""
    figures = {
        "sessions": rates.sessions,
        "within_sessions_rate": rates.within,
        "unseen_session_rate": rates.unseen,
    }
    intervals = Intervals()
    intervals["within_sessions_rate"] = rates.within_interval
    intervals["unseen_session_rate"] = rates.unseen_interval
    return figures, intervals


def pixel_figures(
    masks: Sequence[np.ndarray], maps: Sequence[np.ndarray], params: Params
) -> tuple[dict[str, float], Intervals]:
    """Compute pixel AUROC, AU-PRO and best pixel F1, exact, with bootstrap intervals by image.

    Parameters
    ----------
    masks, maps : per image bool (H, W) and float (H, W) of the same shape.

    Returns
    -------
    Both empty where no pixel is defective, or none is normal.
    """
    if not any(mask.any() for mask in masks) or all(mask.all() for mask in masks):
        return {}, {}
    figures = {
        "pixel_auroc": pixel_metrics.pixel_auroc(masks, maps),
        "au_pro": pixel_metrics.au_pro(masks, maps),
        "pixel_f1": pixel_metrics.pixel_f1(masks, maps),
    }
    settings = params.evaluate
    return figures, pixel_metrics.pixel_intervals(masks, maps, settings.bootstrap, settings.confidence, params.seed)


def cautions(good: int, defective: int, confidence: float) -> list[str]:
    """Say in one line each what so few test images cannot tell.

    Parameters
    ----------
    good, defective : test images of each.
    confidence : of the interval named, in (0, 1).
    """
    lines = []
    if not defective:
        lines.append(
            "No defective test images: what this model catches has not been measured. "
            "Add some under test/ when there are any."
        )
    elif defective < FEW:
        low = image_metrics.binomial_interval(defective, defective, confidence)[0]
        images = "1 defective test image" if defective == 1 else f"{defective} defective test images"
        lines.append(
            f"Only {images}: even if all were caught, the true share caught could be as low as {100 * low:.0f} % "
            f"({100 * confidence:g} % interval). Figures below that need defects say little."
        )
    if not good:
        lines.append(
            "No good test images: false alarms have not been measured; the threshold rests on the calibration images."
        )
    elif good < FEW:
        high = image_metrics.binomial_interval(0, good, confidence)[1]
        images = "1 good test image" if good == 1 else f"{good} good test images"
        lines.append(
            f"Only {images}: even if none raised an alarm, "
            f"the true share of false alarms could be as high as {100 * high:.0f} % "
            f"({100 * confidence:g} % interval)."
        )
    return lines


def roc_table(labels: np.ndarray, scores: np.ndarray) -> pd.DataFrame:
    """Tabulate the ROC curve, a row per distinct score: false_positive_rate, true_positive_rate.

    The table is empty without both classes.
    """
    columns = ("false_positive_rate", "true_positive_rate")
    if len(set(labels.tolist())) < 2:
        return pd.DataFrame(columns=columns, dtype=np.float64)
    false_positive, true_positive, _ = image_metrics.roc_curve(labels, scores)
    return pd.DataFrame(dict(zip(columns, (false_positive, true_positive), strict=True)))


def histogram_table(labels: np.ndarray, scores: np.ndarray, threshold: float, bins: int = 30) -> pd.DataFrame:
    """Count good and defective images per interval of the score.

    Returns
    -------
    A row per bin and class: score (lower edge), upper (its other edge), images, label ('good' or 'defect'), threshold.
    Bins without images are left out, and so is a class without any.
    """
    columns = ["score", "upper", "images", "label", "threshold"]
    if not len(scores):
        return pd.DataFrame(columns=columns)
    edges = np.histogram_bin_edges(scores, bins)
    parts = []
    for label, name in ((0, "good"), (1, "defect")):
        counts = np.histogram(scores[labels == label], edges)[0]
        part = pd.DataFrame(
            {"score": edges[:-1], "upper": edges[1:], "images": counts, "label": name, "threshold": threshold}
        )
        parts.append(part[part["images"] > 0])
    return pd.concat(parts, ignore_index=True)[columns]
