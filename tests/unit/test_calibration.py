# SPDX-License-Identifier: Apache-2.0
"""Conformal p-values and thresholds: the rate is kept, the interval is exact, too few scores are reported."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from panda_ad.errors import UserError
from panda_ad.scoring.calibration import (
    alarms_chance,
    calibration_needed,
    p_values,
    threshold,
    threshold_rank,
)
from panda_ad.scoring.session_rates import next_session, session_rates


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=30), st.lists(st.integers(-6, 6), max_size=10))
def test_p_values_equal_their_definition(calibration, scores):
    expected = [(1 + sum(c >= s for c in calibration)) / (len(calibration) + 1) for s in scores]
    np.testing.assert_allclose(p_values(np.array(calibration), np.array(scores)), expected)


@given(st.lists(st.integers(-5, 5), min_size=1, max_size=60), st.integers(1, 99))
def test_above_the_threshold_means_p_value_within_the_rate(calibration, percent):
    calibration, rate = np.array(calibration, dtype=float), percent / 100
    found = threshold(calibration, rate)
    assert found.enough == (len(calibration) + 1 >= 100 / percent - 1e-9)
    if found.enough:
        scores = np.arange(-6.5, 7, 0.5)
        np.testing.assert_array_equal(scores > found.value, p_values(calibration, scores) <= rate + 1e-12)
    else:
        assert found.value == calibration.max()
        assert "at least" in found.message


def test_rounding_does_not_cost_an_alarm():
    for percent in range(1, 100):  # 0.29 * 100 < 29 in floating point
        assert threshold(np.arange(99.0), percent / 100).value == 99 - percent


def test_true_rate_is_kept_on_average_and_its_interval_covers():
    rng = np.random.default_rng(0)
    for n, rate in ((99, 0.05), (40, 0.1), (30, 0.05)):
        true_rates, inside = [], 0
        for _ in range(2000):
            found = threshold(rng.normal(size=n), rate)
            true_rates.append(stats.norm.sf(found.value))
            inside += found.interval[0] <= true_rates[-1] <= found.interval[1]
        assert np.mean(true_rates) <= rate + 0.003
        assert inside / 2000 == pytest.approx(0.95, abs=0.015)


def test_interval_is_the_beta_quantiles():
    assert threshold(np.arange(99.0), 0.05).interval == pytest.approx(stats.beta.ppf([0.025, 0.975], 5, 95))


def test_too_few_scores_are_said_with_the_number_needed():
    found = threshold(np.arange(198.0), 1 / 200)
    assert not found.enough
    assert "at least 199" in found.message and "\n" not in found.message
    enough = threshold(np.arange(199.0), 1 / 200)
    assert enough.enough and enough.message == "" and enough.value == 198


def test_refusals():
    with pytest.raises(UserError, match="no calibration scores"):
        threshold(np.array([]), 0.05)
    with pytest.raises(UserError, match="finite"):
        threshold(np.array([1.0, np.nan]), 0.05)
    with pytest.raises(UserError, match="false_alarm_rate"):
        threshold(np.array([1.0]), 1.0)
    with pytest.raises(UserError, match="image score is not finite"):
        p_values(np.array([1.0]), np.array([np.inf]))
    assert p_values(np.array([1.0]), np.array([])).shape == (0,)


@given(st.integers(1, 400), st.floats(0.001, 0.5))
def test_the_rank_is_what_the_threshold_uses(n, rate):
    scores = np.arange(n, dtype=float)
    limit = threshold(scores, rate)
    assert limit.value == scores[n - threshold_rank(n, rate)]
    assert limit.enough == (n >= calibration_needed(rate))


def test_the_chance_of_alarms_is_that_of_repeated_calibration():
    """By simulation: draw calibration and good images, count alarms above the threshold."""
    rng = np.random.default_rng(0)
    calibration, images = rng.random((4000, 24)), rng.random((4000, 50))
    limits = [threshold(row, 0.1).value for row in calibration]
    alarms = (images > np.array(limits)[:, None]).sum(axis=1)
    for count in (3, 8, 12):
        assert alarms_chance(count, 50, 24, 0.1) == pytest.approx((alarms >= count).mean(), abs=0.03)
    assert alarms_chance(0, 50, 24, 0.1) == 1.0


@pytest.mark.parametrize(("sessions", "differ"), [(2, 1.0), (3, 0.5), (6, 1.0), (12, 1.0)])
def test_the_next_sessions_rate_lies_in_its_interval(sessions, differ):
    """By simulation: log scores normal within a session, whose mean and spread differ from session to session."""
    rng = np.random.default_rng(0)
    names = np.repeat([f"shift {i}" for i in range(sessions)], 30)
    inside, rates = [], []
    for _ in range(400):
        means = rng.normal(0, differ, sessions + 1)
        spreads = np.exp(0.1 * differ * rng.normal(size=sessions + 1))
        scores = np.exp(rng.normal(means[:-1, None], spreads[:-1, None], (sessions, 30))).ravel()
        found = threshold(scores, 0.05, sessions=names, within=scores)
        true = stats.norm.sf((np.log(found.value) - means[-1]) / spreads[-1])
        inside.append(found.interval[0] <= true <= found.interval[1])
        rates.append(true)
        assert found.sessions is not None and found.interval == found.sessions.unseen_interval
    assert 0.91 <= np.mean(inside) <= 0.995
    assert np.mean(rates) <= 0.05 + 1 / (sessions + 1)


def test_session_rates_are_those_of_the_definition():
    scores = np.array([1.0, 2.0, 9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 9.0, 9.0])
    names = ["a"] * 3 + ["b"] * 5 + ["c"] * 2
    within = np.array([1.0, 2.0, 3.0, 8.0])
    rates = session_rates(scores, names, within, 5.0)
    assert rates.sessions == 3
    assert rates.unseen == pytest.approx((1 / 3 + 0 + 1) / 3)
    assert rates.within == 0.25
    assert rates.within_interval == pytest.approx(tuple(stats.binomtest(1, 4).proportion_ci(method="exact")))
    assert rates.unseen_interval[0] <= rates.unseen <= rates.unseen_interval[1]
    assert str(rates).startswith("within sessions 25 % [0.63, 81], on a session never seen 44 % [")
    rising = session_rates(np.exp(scores), names, np.exp(within), float(np.exp(5.0)))  # ranks alone count
    assert rising.unseen_interval == pytest.approx(rates.unseen_interval)


def test_the_next_session_is_that_of_the_random_effects_model():
    """Against draws from the posterior: deviation by its weight, mean given it, then the next session."""
    distances, variances = np.array([-1.2, -2.0, -1.7, -0.4]), np.array([0.05, 0.02, 0.1, 0.04])
    rng = np.random.default_rng(0)
    differ = 5 * rng.random(400_000)
    total = differ[:, None] ** 2 + variances
    error = 1 / (1 / total).sum(axis=1)
    mean = (distances / total).sum(axis=1) * error
    likely = np.prod(stats.norm.pdf(distances, mean[:, None], np.sqrt(total)), axis=1) * np.sqrt(error)
    weight = likely * stats.cauchy.pdf(differ)
    chosen = rng.choice(len(differ), 400_000, p=weight / weight.sum())
    following = rng.normal(rng.normal(mean[chosen], np.sqrt(error[chosen])), differ[chosen])
    expected = np.quantile(following, [0.025, 0.975])
    np.testing.assert_allclose(next_session(distances, variances, 0.95), expected, atol=0.03)


def test_sessions_that_differ_by_their_own_error_alone_narrow_the_interval():
    rng = np.random.default_rng(0)
    few, many = (next_session(-1.6 + 0.2 * rng.normal(size=n), np.full(n, 0.04), 0.95) for n in (4, 60))
    assert few[0] < many[0] < many[1] < few[1]
    assert many[1] - many[0] < 3.9 * 0.2, "of the error of a session alone it would be 3.9 of its standard deviations"


@given(
    st.lists(st.tuples(st.integers(-3, 3), st.sampled_from("abcd")), min_size=2, max_size=30),
    st.lists(st.integers(-3, 3), min_size=1, max_size=10),
    st.integers(1, 60),
)
def test_any_sessions_give_rates(images, within, percent):
    """Single images, ties and equal scores included."""
    scores, names = np.array([float(s) for s, _ in images]), [name for _, name in images]
    found = threshold(scores, percent / 100, sessions=names, within=np.array(within, dtype=float))
    plain = threshold(scores, percent / 100)
    assert found.value == plain.value
    if len(set(names)) < 2:
        assert found == plain
        return
    rates = found.sessions
    for rate, (low, high) in ((rates.within, rates.within_interval), (rates.unseen, rates.unseen_interval)):
        assert 0 <= low <= rate <= high <= 1
