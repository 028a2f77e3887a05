# SPDX-License-Identifier: Apache-2.0
"""What the gate's rules look at, and what each of them says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd


CONFIRMED, CONFIRMED_ALARMS = "panda.confirmed_good", "panda.confirmed_alarms"
"""Tags of a version in use: parts that were confirmed good after it had scored them, and its alarms on these."""


@dataclass(frozen=True)
class Rule:
    """One rule's outcome.

    Attributes
    ----------
    name : plain name, as in the refusal.
    passed : whether the candidate keeps it.
    value, limit : the figure and what it is held against; `by` is how far it lies on the wrong side, 0 where passed.
    text : the figure in words, for people.
    """

    name: str
    passed: bool
    value: float
    limit: float
    by: float
    text: str


@dataclass(frozen=True)
class Evidence:
    """What the rules look at.

    Attributes
    ----------
    scores : the candidate's test scores: columns path, sha256, label (0 good, 1 defect), defect, score.
    threshold : the candidate's; an image is anomalous where score > threshold.
    metrics : the candidate's figures of evaluation (pixel_auroc).
    budget : share of good parts that may raise an alarm.
    calibration : number of calibration images behind the threshold.
    incumbent : the version in place on the same images, column `score`, same order as `scores`.
        None if there is none.
    incumbent_threshold : of the version in place; None if there is none.
    champion, champion_threshold : the same of the version at @champion.
        None if there is none, or it is the one in place.
    best_before : highest image AUROC on these images of the versions promoted before.
        None if a champion is set or none is comparable.
    known : sha256 of images that the incumbent was tested or trained on; good images not in it are the newest.
    test_images : paths and sha256 of all test images of all categories, to tell a misspelled must_catch entry.
    test_defects : kinds of defect of all categories, to tell a misspelled or vanished one in a floor per defect.
    confirmed : (alarms, images) of the candidate on parts that were confirmed good after it had scored them.
        (0, 0) for one that has not been in use.
    bundle_mb, latency_ms : size in 10^6 bytes; median milliseconds per image, None if not measured.
    seed, resamples : of the paired bootstrap.
    """

    scores: pd.DataFrame
    threshold: float
    metrics: Mapping[str, float]
    budget: float
    calibration: int
    incumbent: pd.DataFrame | None = None
    incumbent_threshold: float | None = None
    champion: pd.DataFrame | None = None
    champion_threshold: float | None = None
    best_before: float | None = None
    known: frozenset[str] = frozenset()
    test_images: frozenset[str] = frozenset()
    test_defects: frozenset[str] = frozenset()
    confirmed: tuple[int, int] = (0, 0)
    bundle_mb: float | None = None
    latency_ms: float | None = None
    seed: int = 0
    resamples: int = 1000
    labels: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", self.scores["label"].to_numpy(dtype=np.int64))

    @property
    def both_kinds(self) -> bool:
        """Whether there are good and defective test images, without which no AUROC is defined."""
        return len(set(self.labels.tolist())) == 2

    @property
    def values(self) -> np.ndarray:
        """(N,) float64, the candidate's scores."""
        return np.asarray(self.scores["score"], dtype=np.float64)
