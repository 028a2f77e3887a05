# SPDX-License-Identifier: Apache-2.0
"""Tests for drift: has what the model sees changed since calibration, and how would one say so.

A recent window is tested against the calibration images: verdicts (share of alarms, scores), image statistics one by
one, and content (features). A drift is what is both significant, after correction for the number of tests, and large.
The tests are exact if window and calibration images are exchangeable. Images that follow each other in time resemble
each other more than that, which is what the limit on size is for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from scipy import stats
from scipy.spatial.distance import cdist

from panda_ad.errors import UserError
from panda_ad.features.image_statistics import STATISTICS
from panda_ad.params import MonitorParams
from panda_ad.scoring.calibration import alarms_chance, threshold

COMPONENTS = 16
"""Principal components of the features that the test of content looks at."""
RESAMPLES = 1999
"""Permutations of that test.

The smallest p-value is 1 / 2000, below a significance of 0.01 divided by the nine tests.
"""
MOST = 1000
"""Images of each side that it looks at, a seeded choice where there are more: its memory grows with the square."""
TWICE = 2.0
"""The share of alarms counts as drifted from so many times the budget."""


class TooFew(UserError):
    """The window has too few images to say anything. Exit code 2."""


@dataclass(frozen=True)
class Sample:
    """Images as the model and the statistics see them.

    Attributes
    ----------
    scores : (N,) float64.  features : (N, D) float, pooled features under the model's last head.
    statistics : (M, S) float64, columns as `statistics.NAMES`; of a reference M may differ from N, since what images
        are like is known of those that earlier versions have scored too.
    """

    scores: np.ndarray
    statistics: np.ndarray
    features: np.ndarray

    def __post_init__(self) -> None:
        if len(self.scores) != len(self.features) or self.statistics.shape[1:] != (len(STATISTICS),):
            raise ValueError(
                f"sample: {self.scores.shape} scores, {self.statistics.shape} statistics, "
                f"{self.features.shape} features"
            )

    def __len__(self) -> int:
        return len(self.scores)


@dataclass(frozen=True)
class Test:
    """One test of window against calibration.

    Attributes
    ----------
    name : 'alarms', 'scores', a name of `statistics.NAMES`, or 'content'.
    method : the test by name.  statistic : its statistic.  p_value : uncorrected.
    adjusted : p-value after Benjamini and Hochberg's correction over all tests.
    shift : how much: alarms, share / budget; else the median's shift in standard deviations of the calibration images.
    before, after : calibration and window: the budget and the share of alarms; else medians. None for content.
    drifted : significant and large.
    finding : what happened, in plain words; empty unless `drifted`, or where another test says why.
    """

    __test__ = False  # for pytest: no test case

    name: str
    method: str
    statistic: float
    p_value: float
    adjusted: float
    shift: float
    before: float | None
    after: float | None
    drifted: bool
    finding: str

    def is_large(self, min_shift: float) -> bool:
        """Return whether the shift is large: from `min_shift` standard deviations on, of alarms from `TWICE` on."""
        return self.shift >= TWICE if self.name == "alarms" else abs(self.shift) >= min_shift


@dataclass(frozen=True)
class Drift:
    """All tests of a window.

    Attributes
    ----------
    findings : what happened, in plain words, the largest shift first within verdicts, image and content.
        Empty: no drift.
    reference, window : number of images.
    """

    tests: list[Test]
    findings: list[str] = field(default_factory=list)
    reference: int = 0
    window: int = 0

    @property
    def drifted(self) -> bool:
        """Whether anything has."""
        return bool(self.findings)

    @property
    def headline(self) -> str:
        """One line: 'no drift in 200 images', or the findings."""
        return "; ".join(self.findings) if self.findings else f"no drift in {self.window} images"

    def to_dict(self) -> dict[str, Any]:
        """As JSON: drifted, headline, findings, reference, window, tests."""
        return {"drifted": self.drifted, "headline": self.headline, **asdict(self)}


def find_drift(reference: Sample, window: Sample, rate: float, limits: MonitorParams, seed: int = 0) -> Drift:
    """Test a window against the calibration images.

    Where the window is exchangeable with them, the chance of any finding is at most about `limits.significance`.

    Parameters
    ----------
    reference : the calibration images.  window : recent images.
    rate : false-alarm budget, in (0, 1).
    limits : `monitor` of params.yaml: min_images, significance, min_shift.
    seed : of the permutations.

    Raises
    ------
    TooFew
        The window has fewer images than `limits.min_images`.
    UserError
        The reference has fewer than four images.
    """
    if len(window) < limits.min_images:
        raise TooFew(
            f"{len(window)} images in the log, {limits.min_images} are needed (monitor.min_images); score more"
        )
    if len(reference) < 4:
        raise UserError(
            f"{len(reference)} calibration images are too few to compare with; "
            "raise data.calibration_fraction and retrain"
        )
    raw = [compare_alarms(reference.scores, window.scores, rate), compare_scores(reference.scores, window.scores)]
    raw += [compare_statistic(i, reference.statistics[:, i], window.statistics[:, i]) for i in range(len(STATISTICS))]
    raw.append(compare_content(reference.features, window.features, seed))
    adjusted = stats.false_discovery_control([t.p_value for t in raw], method="bh")
    tests = [_judged(test, float(p), limits) for test, p in zip(raw, adjusted, strict=True)]
    image = [t for t in tests[2:-1] if t.drifted]
    content = tests[-1]
    if content.drifted and image:  # other light or focus moves features as well, so they say nothing of their own
        tests[-1] = _with_finding(content, "")
    by_size = sorted(image, key=lambda t: -abs(t.shift))
    findings = [t.finding for t in (*tests[:2], *by_size, tests[-1]) if t.finding]
    return Drift(tests, findings, len(reference), len(window))


def _judged(test: Test, adjusted: float, limits: MonitorParams) -> Test:
    drifted = adjusted <= limits.significance and test.is_large(limits.min_shift)
    return Test(
        **(asdict(test) | {"adjusted": adjusted, "drifted": drifted, "finding": test.finding if drifted else ""})
    )


def _with_finding(test: Test, finding: str) -> Test:
    return Test(**(asdict(test) | {"finding": finding}))


def compare_alarms(reference: np.ndarray, window: np.ndarray, rate: float) -> Test:
    """Test whether there are more alarms than the budget allows.

    The budget itself is known only from M calibration images: the true false-alarm rate of their k-th largest score is
    Beta(k, M + 1 - k), so that the number of alarms among n good images is beta-binomial. A binomial test at the
    nominal rate would take the calibration's own error for drift (with M = 24 and rate 0.05, every third time at
    significance 0.01).
    """
    n, m = len(window), len(reference)
    alarms = int((window > threshold(reference, rate).value).sum())
    p = alarms_chance(alarms, n, m, rate)
    share = alarms / n
    return Test(
        "alarms",
        "beta-binomial",
        alarms,
        min(1.0, p),
        p,
        share / rate,
        rate,
        share,
        False,
        "more images score as defects",
    )


def compare_scores(reference: np.ndarray, window: np.ndarray) -> Test:
    """Test whether scores are higher or lower than the reference's."""
    test = _compared("scores", reference, window, 0.0)
    return _with_finding(test, "scores are higher" if test.shift > 0 else "scores are lower")


def compare_statistic(index: int, reference: np.ndarray, window: np.ndarray) -> Test:
    """Test whether an image statistic, by its index in `STATISTICS`, is higher or lower than the reference's."""
    known = STATISTICS[index]
    test = _compared(known.name, reference, window, known.resolution)
    return _with_finding(test, known.higher if test.shift > 0 else known.lower)


def _compared(name: str, reference: np.ndarray, window: np.ndarray, resolution: float) -> Test:
    """Two-sample Kolmogorov-Smirnov test; the shift of the median in standard deviations of the reference."""
    found = stats.ks_2samp(reference, window)
    before, after = float(np.median(reference)), float(np.median(window))
    spread = max(float(np.std(reference, ddof=1)), resolution, 1e-9 * abs(before), 1e-300)
    p = float(found.pvalue)
    return Test(
        name, "Kolmogorov-Smirnov", float(found.statistic), p, p, (after - before) / spread, before, after, False, ""
    )


def compare_content(reference: np.ndarray, window: np.ndarray, seed: int) -> Test:
    """Permutation test of the energy distance (Szekely and Rizzo 2013) between features.

    Features are projected on principal components of both samples together: components of the reference alone would
    fit it better than any other sample, and the test would find that difference.
    """
    rng = np.random.default_rng(seed)
    reference, window = (
        x[np.sort(rng.choice(len(x), MOST, replace=False))] if len(x) > MOST else x for x in (reference, window)
    )
    both = np.concatenate([reference, window]).astype(np.float64)
    both -= both.mean(axis=0)
    left, sizes, _ = np.linalg.svd(both, full_matrices=False)
    points = left[:, :COMPONENTS] * sizes[:COMPONENTS]
    m = len(reference)
    rows = np.arange(len(points))
    found = stats.permutation_test(
        (rows[:m], rows[m:]), _energy(cdist(points, points)),
        permutation_type="independent", vectorized=True, n_resamples=RESAMPLES,
        batch=250, alternative="greater", rng=rng,
    )  # fmt: skip
    shift = _shift_of_points(points[:m], points[m:])
    p = float(found.pvalue)
    name = "content has changed while light, focus and color have not"
    return Test("content", "energy distance", float(found.statistic), p, p, shift, None, None, False, name)


def _energy(distances: np.ndarray) -> Callable[..., np.ndarray]:
    """Return the energy distance of two sets of rows of a (N, N) matrix of distances, as a function over leading axes.

    It is 2 E|X - Y| - E|X - X'| - E|Y - Y'|.
    """
    total = distances.sum()

    def statistic(x: np.ndarray, y: np.ndarray, axis: int = -1) -> np.ndarray:
        x, y = np.moveaxis(x, axis, -1), np.moveaxis(y, axis, -1)
        chosen = np.zeros((*x.shape[:-1], len(distances)))
        np.put_along_axis(chosen, x.astype(np.intp), 1.0, axis=-1)
        to_x = chosen @ distances
        within_x = (to_x * chosen).sum(axis=-1)
        across = to_x.sum(axis=-1) - within_x
        m, n = x.shape[-1], y.shape[-1]
        return 2 * across / (m * n) - within_x / m**2 - (total - 2 * across - within_x) / n**2

    return statistic


def _shift_of_points(reference: np.ndarray, window: np.ndarray) -> float:
    """Return how far the median moves along the direction between the two means.

    The unit is the reference's standard deviation. The direction comes from every second point and the shift is
    measured on the others, then the other way round. Measured on the same points it would be positive even if nothing
    had moved.
    """
    shifts = []
    for a, b in ((0, 1), (1, 0)):
        direction = window[a::2].mean(axis=0) - reference[a::2].mean(axis=0)
        before, after = reference[b::2] @ direction, window[b::2] @ direction
        spread = float(np.std(before, ddof=1))
        shifts.append(
            (float(np.median(after)) - float(np.median(before))) / max(spread, 1e-300) if np.any(direction) else 0.0
        )
    return float(np.mean(shifts))
