# SPDX-License-Identifier: Apache-2.0
"""Sequential tests: exact p-values, bets that are densities, few false alarms, changes found and dated."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from panda_ad.features.image_statistics import NAMES
from panda_ad.monitor.alarms import State
from panda_ad.monitor.sequence import BETS, _bets, conformal_p_values, evidence_of_change, limit_of
from panda_ad.monitor.stream import Stream
from panda_ad.monitor.watch import as_before, find_change, find_content_change, reference_images, spacing, watch
from panda_ad.params import MonitorParams

LIMITS = MonitorParams(window=200, min_images=15, significance=0.01, min_shift=0.5)
LIMIT = limit_of(0.01, 200, 8)
NIGHT = np.timedelta64(1, "D")
START = np.datetime64("2026-03-01", "us")


@given(st.lists(st.integers(0, 5), max_size=8), st.lists(st.integers(0, 5), max_size=12), st.integers(0, 99))
def test_p_values_are_their_definition(reference, stream, seed):
    found = conformal_p_values(np.array(reference, float), np.array(stream, float), seed)
    u = 1 - np.random.default_rng(seed).random(len(stream))
    for t, x in enumerate(stream):
        pool = reference + stream[:t]
        greater, equal = sum(y > x for y in pool), sum(y == x for y in pool)
        assert found[t] == pytest.approx((greater + u[t] * (1 + equal)) / (len(pool) + 1))
        assert 0 < found[t] <= 1


def test_p_values_are_uniform_and_independent_however_few_the_reference_has():
    rng = np.random.default_rng(0)
    p = np.stack([conformal_p_values(rng.normal(size=2), rng.normal(size=6), i) for i in range(4000)])
    for column in p.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-4
    assert np.abs(np.corrcoef(p.T) - np.eye(6)).max() < 0.06


def test_each_bet_is_a_density():
    grid = (np.arange(20000) + 0.5) / 20000
    before, since = np.array([1, 7, 300]), np.array([1, 30, 4])
    total = np.mean([_bets(p, before, since) for p in grid], axis=0)
    assert total.shape == (3, 2 * len(BETS))
    np.testing.assert_allclose(total, 1, atol=2e-3)


@pytest.mark.parametrize(("known", "before"), [(8, 0), (24, 0), (60, 120)])
def test_a_large_change_is_found_within_sixteen_images_and_dated(known, before):
    rng = np.random.default_rng(known)
    stream = rng.normal(size=before + 40)
    stream[before:] -= 8
    found = evidence_of_change(rng.normal(size=known), stream)
    assert np.flatnonzero(found.path >= LIMIT)[0] in range(before, before + 16)
    assert found.value >= LIMIT and found.start in range(before - 3, before + 1)


def test_nothing_is_found_where_nothing_changes():
    """At most 200 x 400 / (limit x 200) of 300 streams by the bound, 0.75 on average for eight streams at once."""
    rng = np.random.default_rng(1)
    assert (
        sum((evidence_of_change(rng.gamma(2, size=20), rng.gamma(2, size=300)).path >= LIMIT).any() for _ in range(60))
        <= 1
    )
    assert evidence_of_change(np.ones(5), np.empty(0)).start is None


def test_old_images_join_the_reference_of_a_long_stream(monkeypatch):
    from panda_ad.monitor import sequence

    rng = np.random.default_rng(2)
    stream = rng.normal(size=130)
    stream[110:] += 8
    monkeypatch.setattr(sequence, "MOST", 60)
    found = evidence_of_change(rng.normal(size=20), stream)
    assert len(found.path) == 60 and found.value >= LIMIT and 107 <= found.start <= 110


def test_images_that_follow_each_other_alike_are_thinned():
    rng = np.random.default_rng(3)
    alike = np.empty(400)
    alike[0] = rng.normal()
    for t in range(1, 400):
        alike[t] = 0.9 * alike[t - 1] + np.sqrt(1 - 0.81) * rng.normal()
    assert spacing(alike) >= 5
    step = rng.normal(size=200)
    assert spacing(step) == 1 and spacing(alike[:40]) == 1 and spacing(np.ones(100)) == 1
    step[100:] += 5
    assert spacing(step) == 1, "a sudden change is no likeness of neighbors"


def stream_of(count: int, seed: int, own=None, seen=None) -> Stream:
    rng = np.random.default_rng(seed)
    scores = rng.gamma(4, size=count)
    if own is not None:
        scores[~own] = np.nan
    keys = np.array([f"{seed:032d}{i:032d}" for i in range(count)])
    times = START + np.arange(count) * NIGHT
    return Stream(
        times, keys, rng.normal(size=(count, len(NAMES))), scores, np.zeros(count, bool) if seen is None else seen
    )


def calibration(count: int = 40):
    rng = np.random.default_rng(99)
    return rng.normal(size=(count, len(NAMES))), rng.gamma(4, size=count)


def test_before_any_alarm_the_calibration_images_are_the_reference():
    own, seen = np.arange(50) >= 10, np.arange(50) % 10 == 0
    found = reference_images(stream_of(50, 0, own, seen), State(), calibration(), 15)
    assert found.images is None and len(found.statistics) == 40
    assert found.tested.times[0] == START + 11 * NIGHT, "from the first image on that the version has scored"
    assert not found.tested.seen.any() and len(found.scored) == len(found.tested)


def test_after_an_alarm_the_images_since_the_change_are_the_reference():
    stream = stream_of(60, 1)
    state = State(START + 20 * NIGHT, START + 24 * NIGHT)
    found = reference_images(stream, state, calibration(), 15)
    np.testing.assert_array_equal(found.statistics, stream.statistics[20:35])
    np.testing.assert_array_equal(found.scores, stream.scores[20:35])
    assert found.images.tolist() == list(range(20, 35)) and len(found.tested) == 25 == len(found.scored)


def test_a_version_that_came_later_is_compared_with_the_first_that_it_has_scored_since_the_change():
    stream = stream_of(80, 2, own=np.arange(80) >= 50)
    found = reference_images(stream, State(START + 20 * NIGHT, START + 40 * NIGHT), calibration(), 15)
    assert len(found.statistics) == 21 and len(found.tested) == 39
    np.testing.assert_array_equal(found.scores, stream.scores[50:65])
    np.testing.assert_array_equal(found.tested.scores[found.scored], stream.scores[65:])


def changed(first: int, size: float = 6, column: int = 0) -> Stream:
    stream = stream_of(60, 3)
    stream.statistics[first:, column] -= size
    return stream


def test_a_change_is_named_and_dated_and_a_small_one_is_none():
    reference = reference_images(changed(40), State(), calibration(), 15)
    change = find_change(reference, watch(reference, 0), 0.05, LIMITS)
    assert change.findings == ["darker"] and abs(change.first - 40) <= 3
    assert change.since == reference.tested.times[change.first]
    small = LIMITS.model_copy(update={"min_shift": 20.0})
    assert find_change(reference, watch(reference, 0), 0.05, small) is None
    steady = reference_images(stream_of(60, 3), State(), calibration(), 15)
    assert find_change(steady, watch(steady, 0), 0.05, LIMITS) is None


def test_defects_on_the_line_are_a_change_of_the_scores():
    stream = stream_of(160, 4)
    stream.scores[60::3] += 100
    reference = reference_images(stream, State(), calibration(100), 15)
    change = find_change(reference, watch(reference, 0), 0.05, LIMITS)
    assert change.findings[0] == "more images score as defects"


def test_what_returns_to_the_state_before_is_no_new_alarm():
    stream = changed(20)
    stream.statistics[45:, 0] += 6
    before = reference_images(stream, State(), calibration(), 15)
    now = reference_images(stream, State(START + 20 * NIGHT, START + 25 * NIGHT), calibration(), 15)
    change = find_change(now, watch(now, 0), 0.05, LIMITS)
    assert change.findings == ["brighter"]
    assert as_before(before, now, change, 0.05, LIMITS)
    stream.statistics[45:, 1] += 6
    now = reference_images(stream, State(START + 20 * NIGHT, START + 25 * NIGHT), calibration(), 15)
    assert not as_before(before, now, change, 0.05, LIMITS)


def test_other_content_is_found_in_complete_blocks():
    limits = LIMITS.model_copy(update={"window": 30})
    reference = reference_images(stream_of(70, 5), State(), calibration(), 15)
    rng = np.random.default_rng(0)
    known, block = rng.normal(size=(40, 6)), rng.normal(size=(30, 6))
    assert find_content_change(reference, (known, block), limits, 0) is None
    change = find_content_change(reference, (known, block + 3), limits, 0)
    assert change.first == 30 and "content" in change.findings[0]
    assert find_content_change(reference, (known, block + 3), limits.model_copy(update={"window": 71}), 0) is None
