# SPDX-License-Identifier: Apache-2.0
"""What a threshold costs, and what a model has kept of its promise: counted from verdicts and decisions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from panda_ad.evaluation.image_metrics import binomial_interval
from panda_ad.inspect.decisions import Decision
from panda_ad.inspect.queue import Row
from panda_ad.scoring.calibration import Threshold, threshold_rank

MOST_STEPS = 200
"""Most positions of the slider."""
_BINS = 40


@dataclass(frozen=True)
class Scored:
    """Scores of logged images that one model gave, by what was decided of them; each (N,) float64."""

    good: np.ndarray
    defect: np.ndarray
    undecided: np.ndarray

    @property
    def all(self) -> np.ndarray:
        """All of them."""
        return np.concatenate([self.good, self.defect, self.undecided])


@dataclass(frozen=True)
class Step:
    """One position of the slider: a threshold with its promise, and what it would have done to the logged images.

    Attributes
    ----------
    value : the threshold.  rate : promised share of false alarms; low, high : its 95 % interval.
    false_alarms : decided good and above.  missed : decided defect and not above.
    undecided : above and not decided.
    """

    value: float
    rate: float
    low: float
    high: float
    false_alarms: int
    missed: int
    undecided: int


@dataclass(frozen=True)
class Kept:
    """False alarms of the images that a version has scored.

    Attributes
    ----------
    images, alarms : scored, and above the threshold.
    good, defect, undecided : the alarms by what was decided of them; unsure counts as undecided.
    missed : decided defect without an alarm.
    low, high : share of false alarms among parts that are not known to be defects: the lower counts no undecided alarm,
        the upper all of them, each at the end of its 95 % interval (Clopper and Pearson).
    """

    images: int
    alarms: int
    good: int
    defect: int
    undecided: int
    missed: int
    low: float
    high: float

    def verdict(self, rate: float) -> Literal["kept", "open", "broken"]:
        """Say whether a promised rate was kept; open where the undecided alarms could still break it."""
        if self.low > rate:
            return "broken"
        parts = self.images - self.defect - self.missed
        return "open" if self.undecided and self.good + self.undecided > rate * parts else "kept"


def by_decision(rows: Iterable[Row], standing: Mapping[str, Decision]) -> Scored:
    """Return the scores of `rows`, parted by decisions."""
    parts: dict[str, list[float]] = {"good": [], "defect": [], "undecided": []}
    for row in rows:
        decision = standing.get(row.sha256)
        label = decision.label if decision is not None else "undecided"
        parts[label if label in parts else "undecided"].append(row.score)
    return Scored(*(np.array(parts[name], dtype=np.float64) for name in ("good", "defect", "undecided")))


def steps(count: int, limit_at: Callable[[float], Threshold], scored: Scored, rate: float) -> tuple[list[Step], int]:
    """Return the thresholds that the calibration images allow, strictest promise first, and which `rate` has now.

    Position k - 1 is the k-th largest of `count` calibration scores: a promised rate of k / (count + 1).

    Parameters
    ----------
    limit_at : a false-alarm rate's threshold, `Detector.threshold`.
    """
    found = []
    for k in range(1, min(count, MOST_STEPS) + 1):
        limit = limit_at(k / (count + 1))
        above = [int((part > limit.value).sum()) for part in (scored.good, scored.defect, scored.undecided)]
        missed = len(scored.defect) - above[1]
        found.append(Step(limit.value, limit.rate, *limit.interval, above[0], missed, above[2]))
    return found, min(threshold_rank(count, rate), len(found)) - 1


def histogram(calibration: np.ndarray, scored: Scored, limit: float) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the bins' edges (B + 1,) and counts (B,) per kind; the last bin holds whatever is higher still.

    Defects may score a hundred times as high as good parts: the bins end five times as far above the median of the
    calibration scores as the threshold lies.
    """
    kinds = {"calibration": calibration, "undecided": scored.undecided, "good": scored.good, "defect": scored.defect}
    middle = float(np.median(calibration))
    low = float(min(part.min() for part in kinds.values() if len(part)))
    high = max(float(max(part.max() for part in kinds.values() if len(part))), limit)
    high = min(high, middle + 5 * max(limit - middle, 1e-9))
    edges = np.linspace(min(low, middle), max(high, min(low, middle) + 1e-9), _BINS + 1)
    return edges, {name: np.histogram(np.minimum(part, edges[-1]), edges)[0] for name, part in kinds.items()}


def kept(rows: Sequence[Row], standing: Mapping[str, Decision]) -> Kept:
    """Count what became of a version's alarms."""
    alarms = {"good": 0, "defect": 0, "undecided": 0}
    missed = 0
    for row in rows:
        decision = standing.get(row.sha256)
        label = decision.label if decision is not None and decision.label in alarms else "undecided"
        if row.alarm:
            alarms[label] += 1
        elif label == "defect":
            missed += 1
    parts = len(rows) - alarms["defect"] - missed
    low = binomial_interval(alarms["good"], parts, 0.95)[0] if parts else 0.0
    high = binomial_interval(alarms["good"] + alarms["undecided"], parts, 0.95)[1] if parts else 1.0
    good, defect, undecided = alarms["good"], alarms["defect"], alarms["undecided"]
    return Kept(len(rows), sum(alarms.values()), good, defect, undecided, missed, low, high)
