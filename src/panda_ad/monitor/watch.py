# SPDX-License-Identifier: Apache-2.0
"""Has what a category's images are like changed, since when, and in what: sequential tests, the size of the change.

Each image statistic and the score is a stream of its own (`sequence.py`), against the reference that the record of
alarms leads to (`alarms.State`). A change is what is both certain (`sequence.limit_of`) and large
(`monitor.min_shift`): images that follow each other in time are alike, and a test that takes them for exchangeable is
sooner or later certain of nothing much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from panda_ad.features.image_statistics import NAMES
from panda_ad.monitor.alarms import State
from panda_ad.monitor.drift import Test, compare_alarms, compare_content, compare_scores, compare_statistic
from panda_ad.monitor.sequence import Evidence, evidence_of_change, limit_of
from panda_ad.monitor.stream import Stream
from panda_ad.params import MonitorParams

STREAMS = (*NAMES, "scores")
"""What is watched, in the order of `Change.streams`."""
SHARES = len(STREAMS) + 1
"""The significance is shared by these and the test of content in blocks of images."""


ALIKE = 0.3
"""Correlation of images that follow each other up to which they count as if they did not."""
BLOCK = 20
"""Images in which that correlation is looked for."""


@dataclass(frozen=True)
class Reference:
    """What a category's images are compared with.

    Attributes
    ----------
    statistics : (M, S) float64 of the reference images.  scores : (K,) float64, by the version in place.
    tested : images after the reference, with those the version was made from left out.
    scored : indices into `tested` of the images whose scores are tested.
    images : indices into the stream of the reference's images that the version has scored; None: the calibration
        images are the reference.
    """

    statistics: np.ndarray
    scores: np.ndarray
    tested: Stream
    scored: np.ndarray
    images: np.ndarray | None


@dataclass(frozen=True)
class Change:
    """A change of what images are like.

    Attributes
    ----------
    since : when the first of the changed images was logged, datetime64[us].
    first : its index in `Reference.tested`.
    tests : of the streams that changed, by the size of the shift.
    """

    since: np.datetime64
    first: int
    tests: list[Test]

    @property
    def findings(self) -> list[str]:
        """What changed, in plain words."""
        return list(dict.fromkeys(t.finding for t in self.tests if t.finding))


def reference_images(stream: Stream, state: State, calibration: tuple[np.ndarray, np.ndarray], least: int) -> Reference:
    """Divide a stream into the reference of a state and the images that are tested against it.

    In a state that began with an alarm the reference is the images since the change until it was found, and at least
    `least`. A version that came later has scored few of them or none: the first `least` that it has scored since the
    change are its scores' reference, since its calibration images are a mixture of this state and earlier ones.

    Parameters
    ----------
    calibration : statistics (M, S) and scores (M,) of the calibration images.
    """
    fresh = np.flatnonzero(~stream.seen)
    times, own = stream.times[fresh], stream.own[fresh]
    if state.since is None:
        first = state.start if state.start is not None else times[own].min(initial=np.datetime64("9999", "us"))
        tested = stream.take(fresh[times >= first])
        return Reference(*calibration, tested, np.flatnonzero(tested.own), None)
    rows = fresh[times >= state.since]
    count = max(least, int((stream.times[rows] <= state.until).sum()))
    known, rest = rows[:count], rows[count:]
    mine = rows[stream.own[rows]]
    among = known[stream.own[known]]
    if len(among) < least:
        among = mine[:least]
    if state.start is not None:
        rest = rest[stream.times[rest] >= state.start]
    tested = stream.take(rest)
    later = tested.own & ~np.isin(tested.sha256, stream.sha256[among])
    return Reference(stream.statistics[known], stream.scores[among], tested, np.flatnonzero(later), among)


def watch(reference: Reference, seed: int) -> dict[str, Evidence]:
    """Return the evidence of each stream that a change has happened, by name."""
    tested, found = reference.tested, {}
    streams = {name: (reference.statistics[:, i], tested.statistics[:, i]) for i, name in enumerate(NAMES)}
    streams["scores"] = reference.scores, tested.scores[reference.scored]
    for i, (name, (known, stream)) in enumerate(streams.items()):
        if len(known):
            apart = spacing(stream)
            e = evidence_of_change(known, stream[::apart], seed + i)
            found[name] = replace(e, start=None if e.start is None else e.start * apart)
    return found


def spacing(stream: np.ndarray) -> int:
    """Return how far apart images of a stream must be to be about as different as any two.

    Neighbors with correlation r differ by a variance of 2 (1 - r) times that of all (von Neumann's ratio). It is taken
    in blocks of `BLOCK` images and its median counts, so that a sudden change, which is in one block, does not. Where r
    is beyond chance and `ALIKE`, only every g-th image is tested, with r^g = 0.1.

    Parameters
    ----------
    stream : (T,) finite, in order; too few for three blocks tell nothing, and all are tested.
    """
    count = min(len(stream) // BLOCK, 50)
    if count < 3:
        return 1
    blocks = stream[-count * BLOCK :].reshape(count, BLOCK)
    variance = blocks.var(axis=1, ddof=1)
    ratios = np.mean(np.diff(blocks, axis=1) ** 2, axis=1) / np.maximum(2 * variance, 1e-300)
    r = 1 - float(np.median(ratios[variance > 0])) if (variance > 0).any() else 0.0
    if r <= ALIKE + 2 / math.sqrt(count * BLOCK):
        return 1
    return math.ceil(math.log(0.1) / math.log(min(r, 0.99)))


def find_change(
    reference: Reference, evidence: dict[str, Evidence], rate: float, limits: MonitorParams
) -> Change | None:
    """Return the change that the evidence shows, if it is large; None if there is none.

    Parameters
    ----------
    rate : false-alarm budget, in (0, 1).
    """
    least = limit_of(limits.significance, limits.window, SHARES)
    found: list[tuple[float, int, Test]] = []
    for name, e in evidence.items():
        if e.start is None or e.value < least:
            continue
        first = int(reference.scored[e.start]) if name == "scores" else e.start
        found += [
            (e.value, first, test) for test in _sizes(reference, name, first, rate) if test.is_large(limits.min_shift)
        ]
    if not found:
        return None
    _, first, _ = max(found, key=lambda item: item[0])
    tests = [test for _, _, test in found]
    tests.sort(key=lambda t: (t.name in NAMES, -abs(t.shift)))
    return Change(reference.tested.times[first], first, tests)


def _sizes(reference: Reference, name: str, first: int, rate: float) -> list[Test]:
    """Return how much a stream has shifted since an image."""
    tested = reference.tested
    if name == "scores":
        since = tested.scores[reference.scored[reference.scored >= first]]
        return [compare_alarms(reference.scores, since, rate), compare_scores(reference.scores, since)]
    i = NAMES.index(name)
    return [compare_statistic(i, reference.statistics[:, i], tested.statistics[first:, i])]


def find_content_change(
    reference: Reference, features: tuple[np.ndarray, np.ndarray], limits: MonitorParams, seed: int
) -> Change | None:
    """Return the change of the newest complete block of `monitor.window` images in content; None if there is none.

    Features have no order in which one could bet on them, so that they are tested in blocks that do not overlap.

    Parameters
    ----------
    features : float (K, D) of the reference images, and (len(block), D) of `newest_block`'s.
    """
    block = newest_block(reference, limits.window)
    if not len(block):
        return None
    test = compare_content(*features, seed)
    if test.p_value > limits.significance / SHARES or not test.is_large(limits.min_shift):
        return None
    first = int(block[0])
    return Change(reference.tested.times[first], first, [test])


def newest_block(reference: Reference, window: int) -> np.ndarray:
    """Return the indices into `tested` of the newest complete block of scored images, empty if there is none."""
    blocks = len(reference.scored) // window
    return reference.scored[(blocks - 1) * window : blocks * window] if blocks else reference.scored[:0]


def as_before(before: Reference, now: Reference, change: Change, rate: float, limits: MonitorParams) -> bool:
    """Return whether the images since a change are like those of an earlier reference.

    Parameters
    ----------
    before : of the state before the open alarm.  now : the present one, in which the change was found.
    """
    recent = now.tested.take(np.arange(change.first, len(now.tested)))
    tests = [
        compare_statistic(i, before.statistics[:, i], recent.statistics[:, i])
        for i in range(before.statistics.shape[1])
    ]
    if len(before.scores) and recent.own.any():
        scores = recent.scores[recent.own]
        tests += [compare_alarms(before.scores, scores, rate), compare_scores(before.scores, scores)]
    return not any(t.p_value <= limits.significance and t.is_large(limits.min_shift) for t in tests)
