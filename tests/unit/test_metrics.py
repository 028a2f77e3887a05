# SPDX-License-Identifier: Apache-2.0
"""Image metrics against scikit-learn and plain loops, their intervals, and what they refuse."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, norm
from sklearn import metrics as sk

from panda_ad.errors import UserError
from panda_ad.evaluation import image_metrics as metrics

CASES = st.lists(st.tuples(st.integers(0, 1), st.integers(-3, 3)), min_size=2, max_size=30).filter(
    lambda rows: len({label for label, _ in rows}) == 2
)


def arrays(rows):
    labels, scores = zip(*rows, strict=True)
    return np.array(labels), np.array(scores, dtype=float) / 3


@given(CASES)
def test_equal_to_scikit_learn_with_ties(rows):
    labels, scores = arrays(rows)
    assert metrics.auroc(labels, scores) == pytest.approx(sk.roc_auc_score(labels, scores), abs=1e-12)
    assert metrics.average_precision(labels, scores) == pytest.approx(
        sk.average_precision_score(labels, scores), abs=1e-12
    )
    fpr, tpr, thresholds = sk.roc_curve(labels, scores, drop_intermediate=False)
    for ours, theirs in zip(metrics.roc_curve(labels, scores), (fpr, tpr, thresholds), strict=True):
        np.testing.assert_allclose(ours, theirs)
    assert metrics.fpr_at_tpr(labels, scores) == pytest.approx(fpr[np.argmax(tpr >= 0.95)])


@given(CASES, st.sampled_from([np.exp, lambda s: 1e6 * s + 5]))
def test_only_the_order_of_scores_matters(rows, increasing):
    labels, scores = arrays(rows)
    for metric in (metrics.auroc, metrics.average_precision, metrics.fpr_at_tpr):
        assert metric(labels, increasing(scores)) == metric(labels, scores)
    assert metrics.auroc(1 - labels, -scores) == pytest.approx(metrics.auroc(labels, scores), abs=1e-12)


def test_fpr_at_a_share_that_is_a_whole_number_of_images():
    labels = np.r_[np.ones(20), np.zeros(4)]
    scores = np.r_[np.arange(20) + 10.0, 10.5, 10.4, 1, 0]  # 19 of 20 defects lie above every good image
    assert metrics.fpr_at_tpr(labels, scores) == 0
    assert metrics.fpr_at_tpr(labels, scores, tpr=1.0) == 0.5
    with pytest.raises(UserError, match="tpr"):
        metrics.fpr_at_tpr(labels, scores, tpr=0.0)


@pytest.mark.parametrize("metric", [metrics.auroc, metrics.average_precision, metrics.fpr_at_tpr])
def test_fast_bootstrap_equals_one_call_per_resample(metric):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 60)
    scores = np.round(rng.normal(labels, 1), 1)
    slow = metrics.bootstrap_interval(lambda y, s: metric(y, s), labels, scores, n=200, seed=3)
    assert metrics.bootstrap_interval(metric, labels, scores, n=200, seed=3) == pytest.approx(slow, abs=1e-12)


def test_interval_covers_the_true_auroc():
    rng = np.random.default_rng(1)
    truth = 0.76025  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    labels = np.r_[np.zeros(60), np.ones(60)]
    inside = 0
    for i in range(200):
        low, high = metrics.bootstrap_interval(metrics.auroc, labels, rng.normal(labels, 1), n=200, seed=i)
        inside += low <= truth <= high
    assert 0.90 <= inside / 200 <= 0.99


def test_separated_classes_have_an_interval_that_their_numbers_allow():
    """Every resample of them has an AUROC of 1; Newcombe's equation holds at the lower end."""
    scores = np.r_[np.zeros(11), np.ones(12)]
    low, high = metrics.bootstrap_interval(metrics.auroc, scores, scores)
    assert high == 1 and low == pytest.approx(0.8245, abs=1e-4)
    m, n, z = 11, 12, 1.959964
    variance = low * (1 - low) / (m * n) * (1 + ((m + n) / 2 - 1) * ((1 - low) / (2 - low) + low / (1 + low)))
    assert (1 - low) ** 2 == pytest.approx(z**2 * variance, rel=1e-5)
    assert metrics.bootstrap_interval(metrics.auroc, 1 - scores, scores) == (0.0, pytest.approx(1 - low))
    more = np.repeat([0.0, 1.0], 200)
    assert low < metrics.bootstrap_interval(metrics.auroc, more, more)[0] < 1
    rng, small = np.random.default_rng(0), np.repeat([0.0, 1.0], (11, 12))
    shift = 2**0.5 * norm.ppf(low)  # of an AUROC at the lower end, few sets of this size are separated
    assert np.mean([metrics.auroc(small, rng.normal(shift * small)) == 1 for _ in range(2000)]) < 0.025


@pytest.mark.parametrize(("defects", "at_most"), [(1, 0.09), (3, 0.06)])
def test_auroc_of_a_few_defects_has_an_honest_interval(defects, at_most):
    """The bootstrap sees no spread of one defect: its interval would be far too narrow. Newcombe's misses the truth rarely."""
    truth = norm.cdf(1.5 / 2**0.5)
    rng = np.random.default_rng(0)
    labels = np.r_[np.zeros(40), np.ones(defects)]
    missed = 0
    for _ in range(400):
        scores = rng.normal(1.5 * labels, 1)
        low, high = metrics.bootstrap_interval(metrics.auroc, labels, scores)
        assert low <= metrics.auroc(labels, scores) <= high
        missed += not low <= truth <= high
    assert missed / 400 <= at_most


@given(st.integers(1, 60), st.data())
def test_binomial_interval_is_the_one_of_the_binomial_tails(n, data):
    hits = data.draw(st.integers(0, n))
    low, high = metrics.binomial_interval(hits, n, 0.95)
    assert 0 <= low <= hits / n <= high <= 1
    assert low == 0 if hits == 0 else binom.sf(hits - 1, n, low) == pytest.approx(0.025)
    assert high == 1 if hits == n else binom.cdf(hits, n, high) == pytest.approx(0.025)


def test_bootstrap_is_seeded_and_fast():
    rng = np.random.default_rng(2)
    labels = np.r_[np.zeros(11_000), np.ones(1_000)]
    scores = rng.normal(labels, 1)
    start = time.process_time()
    first = metrics.bootstrap_interval(metrics.auroc, labels, scores, n=1000, seed=7)
    assert time.process_time() - start < 10  # 1 s; processor time, since the machine may be busy
    assert first[0] < metrics.auroc(labels, scores) < first[1]
    few = labels[::40], scores[::40]
    assert metrics.bootstrap_interval(metrics.auroc, *few, n=50, seed=7) == metrics.bootstrap_interval(
        metrics.auroc, *few, n=50, seed=7
    )
    assert metrics.bootstrap_interval(metrics.auroc, *few, n=50, seed=8) != metrics.bootstrap_interval(
        metrics.auroc, *few, n=50, seed=7
    )


def test_paired_bootstrap_pairs():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 2, 80)
    a = rng.normal(labels, 1)
    assert (metrics.paired_bootstrap(metrics.auroc, labels, a, 2 * a + 1, n=50) == 0).all()
    b = rng.normal(0, 1, 80)
    differences = metrics.paired_bootstrap(metrics.auroc, labels, a, b, n=300)
    assert differences.shape == (300,)
    assert differences.mean() == pytest.approx(metrics.auroc(labels, a) - metrics.auroc(labels, b), abs=0.03)
    noisy = a + rng.normal(0, 0.01, 80)  # nearly the same scorer: pairing makes the spread small
    assert metrics.paired_bootstrap(metrics.auroc, labels, a, noisy, n=300).std() < differences.std() / 5


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 1], [0.0, np.nan], "not finite"),
        ([0, 1], [np.inf, 0.0], "not finite"),
        ([0, 0], [0.0, 1.0], "0 anomalous"),
        ([1, 1], [0.0, 1.0], "0 normal"),
        ([0, 2], [0.0, 1.0], "neither"),
        ([0, 1], [0.0], "same length"),
        ([], [], "0 normal"),
    ],
)
def test_refusals(labels, scores, message):
    for metric in (
        metrics.auroc,
        metrics.average_precision,
        metrics.fpr_at_tpr,
        metrics.roc_curve,
    ):
        with pytest.raises(UserError, match=message):
            metric(np.array(labels), np.array(scores))
    with pytest.raises(UserError, match=message):
        metrics.bootstrap_interval(metrics.auroc, np.array(labels), np.array(scores))
    with pytest.raises(UserError, match=message):
        metrics.paired_bootstrap(metrics.auroc, np.array(labels), np.array(scores), np.array(scores))
