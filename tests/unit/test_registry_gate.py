# SPDX-License-Identifier: Apache-2.0
"""The gate's rules, on score tables alone."""

import numpy as np
import pandas as pd
import pytest

from panda_ad.evaluation.image_metrics import auroc, recall_at_budget
from panda_ad.params import GateParams
from panda_ad.registry.evidence import align, same_images
from panda_ad.registry.facts import Evidence
from panda_ad.registry.gate import evaluate_rules, refusal

OFF = {
    "margin": None, "recall_margin": None, "decision_margin": None, "confidence": 0.8, "min_image_auroc": None, "min_pixel_auroc": None,
    "min_defect_auroc": None, "min_defect_recall": None, "must_catch": [], "false_alarm_risk": None, "max_latency_ms": None, "promise_confidence": None,
    "max_bundle_mb": None,
}  # fmt: skip


def table(good, defects):
    """Scores of good images, and of defects {kind: scores}."""
    rows = [(f"good/{i}.png", f"g{i}", 0, "good", s) for i, s in enumerate(good)]
    rows += [
        (f"{kind}/{i}.png", f"{kind}{i}", 1, kind, s) for kind, scores in defects.items() for i, s in enumerate(scores)
    ]
    return pd.DataFrame(rows, columns=["path", "sha256", "label", "defect", "score"])


def evidence(scores=None, **changes):
    scores = table([0.1, 0.2, 0.3, 0.4], {"hole": [0.9, 0.8], "stain": [0.35, 0.7]}) if scores is None else scores
    facts = {"threshold": 0.5, "metrics": {"pixel_auroc": 0.9}, "budget": 0.05, "calibration": 24, **changes}
    return Evidence(scores=scores, **facts)


def gate(**rules):
    return GateParams(**{**OFF, **rules})


def test_no_rules_let_everything_through():
    assert evaluate_rules(evidence(), gate()) == []


@pytest.mark.parametrize(
    ("rules", "passed", "value"),
    [
        ({"min_image_auroc": 0.9}, [True], 15 / 16),
        ({"min_image_auroc": 0.95}, [False], 15 / 16),
        ({"min_pixel_auroc": 0.9}, [True], 0.9),
        ({"min_pixel_auroc": 0.91}, [False], 0.9),
        ({"min_defect_auroc": 0.9}, [True, False], 1.0),
        ({"min_defect_auroc": {"stain": 0.8}}, [True], 7 / 8),
        ({"min_defect_recall": 0.6}, [True, False], 1.0),
        ({"max_bundle_mb": 24.9}, [False], 25.0),
        ({"max_bundle_mb": 25.0}, [True], 25.0),
        ({"max_latency_ms": 10.0}, [False], 12.0),
    ],
)
def test_floors_and_ceilings(rules, passed, value):
    found = evaluate_rules(evidence(bundle_mb=25.0, latency_ms=12.0), gate(**rules))
    assert [r.passed for r in found] == passed
    assert found[0].value == pytest.approx(value)
    for rule in found:
        assert rule.by == (0 if rule.passed else pytest.approx(abs(rule.value - rule.limit)))


def test_a_promise_that_good_parts_have_not_met_refuses():
    rules = gate(promise_confidence=0.95)
    assert evaluate_rules(evidence(), rules) == [], "a candidate that was never in use"
    assert [r.passed for r in evaluate_rules(evidence(confirmed=(8, 70)), rules)] == [True]
    (broken,) = evaluate_rules(evidence(confirmed=(34, 40)), rules)
    assert not broken.passed and "34 alarms on 40 parts" in broken.text and broken.by == broken.value - 0.05
    assert evaluate_rules(evidence(confirmed=(34, 40)), gate(promise_confidence=None)) == []


def test_a_refusal_names_the_rule_and_by_how_much():
    text = refusal(evaluate_rules(evidence(), gate(min_image_auroc=0.95, min_pixel_auroc=0.5)))
    assert text == "image AUROC floor: 0.9375 (limit >= 0.95), off by 0.0125"


def test_no_pixel_floor_without_masks():
    assert evaluate_rules(evidence(metrics={}), gate(min_pixel_auroc=0.9)) == []


@pytest.mark.parametrize(
    ("entry", "passed"),
    [("hole/0.png", True), ("hole0", True), ("stain/0.png", False), ("grid/hole/0.png", None), ("typo.png", False)],
)
def test_must_catch(entry, passed):
    found = evaluate_rules(evidence(test_images=frozenset({"grid/hole/0.png"})), gate(must_catch=[entry]))
    assert [r.passed for r in found] == ([] if passed is None else [passed])


@pytest.mark.parametrize("rule", ["min_defect_auroc", "min_defect_recall"])
def test_a_floor_of_a_defect_that_no_category_has_fails_and_one_of_another_category_does_not(rule):
    known = frozenset({"hole", "stain", "dent"})
    found = evaluate_rules(evidence(test_defects=known), gate(**{rule: {"holes": 0.1, "dent": 0.1, "hole": 0.1}}))
    assert [(r.name.rpartition(" ")[2], r.passed) for r in found] == [("holes", False), ("hole", True)]
    assert "no such kind of defect in the test set of any category; this one has hole, stain" in refusal(found)


def test_the_threshold_itself_is_no_alarm():
    scores = table([0.1, 0.5], {"hole": [0.5]})
    (rule,) = evaluate_rules(evidence(scores), gate(must_catch=["hole/0.png"]))
    assert not rule.passed


def noisy(seed, shift=1.5, n=40):
    rng = np.random.default_rng(seed)
    return table(rng.normal(0, 1, n), {"hole": rng.normal(shift, 1, n)})


def test_equal_scores_are_not_worse():
    scores = noisy(0)
    rules = evaluate_rules(evidence(scores, incumbent=scores), gate(margin=0.0, recall_margin=0.0))
    assert [(r.passed, r.value) for r in rules] == [(True, 0.0), (True, 0.0)]


def test_a_worse_candidate_is_refused_and_a_better_one_is_not():
    good = noisy(1)
    spoiled = good.assign(score=np.where(good["label"] == 1, good["score"] - 1.0, good["score"]))
    rules = gate(margin=0.02, recall_margin=0.1)
    refused = evaluate_rules(evidence(spoiled, incumbent=good), rules)
    assert [r.passed for r in refused] == [False, False]
    assert refused[0].value > auroc(good["label"], good["score"]) - auroc(spoiled["label"], spoiled["score"]) - 1e-9
    assert "image AUROC not worse" in refusal(refused) and "too much" in refusal(refused)
    assert all(r.passed for r in evaluate_rules(evidence(good, incumbent=spoiled), rules))


def test_a_raised_threshold_is_refused_though_the_order_of_scores_is_the_same():
    """Defects among the calibration images: they raise the threshold, and AUROC does not see it."""
    scores = noisy(1)
    good, defects = scores["score"][scores["label"] == 0], scores["score"][scores["label"] == 1]
    fair, spoiled = float(good.quantile(0.95)), float(defects.quantile(0.95))
    rules = gate(margin=0.0, recall_margin=0.0, decision_margin=0.15)
    refused = evaluate_rules(evidence(scores, incumbent=scores, threshold=spoiled, incumbent_threshold=fair), rules)
    assert [r.passed for r in refused] == [True, True, False]
    caught = [(defects > t).mean() - (good > t).mean() for t in (spoiled, fair)]
    assert f"{caught[0]:.4f} against {caught[1]:.4f}" in refused[2].text and refused[2].by > 0
    assert all(
        r.passed
        for r in evaluate_rules(evidence(scores, incumbent=scores, threshold=fair, incumbent_threshold=spoiled), rules)
    )
    # a threshold may rise where it had let too many false alarms through
    loose = float(good.quantile(0.3))
    assert evaluate_rules(evidence(scores, incumbent=scores, threshold=fair, incumbent_threshold=loose), rules)[
        2
    ].passed


def test_the_champion_is_compared_by_the_same_rules():
    good, worse = noisy(1), noisy(1)
    worse = worse.assign(score=np.where(worse["label"] == 1, worse["score"] - 1.0, worse["score"]))
    facts = {"incumbent": worse, "incumbent_threshold": 1.6, "threshold": 1.6}
    rules = gate(margin=0.02, recall_margin=0.1, decision_margin=0.1)
    assert [r.passed for r in evaluate_rules(evidence(worse, **facts), rules)] == [True] * 3
    found = evaluate_rules(evidence(worse, **facts, champion=good, champion_threshold=1.6), rules)
    assert [r.passed for r in found] == [True, False] * 3
    assert [r.name for r in found[1::2]] == [f"{r.name} than the champion's" for r in found[::2]]
    against_good = evaluate_rules(evidence(worse, incumbent=good, incumbent_threshold=1.6, threshold=1.6), rules)
    assert [r.value for r in found[1::2]] == [r.value for r in against_good]


@pytest.mark.parametrize(("best", "passed"), [(None, []), (0.975, [True]), (0.98, [False])])
def test_two_margins_below_the_best_before_is_the_end(best, passed):
    assert [
        r.passed for r in evaluate_rules(evidence(best_before=best), gate(margin=0.02))
    ] == passed  # its AUROC is 0.9375
    assert evaluate_rules(evidence(best_before=best), gate()) == []


def test_more_confidence_asks_for_more():
    a, b = noisy(2), noisy(2)
    b = b.assign(score=b["score"] + np.random.default_rng(0).normal(0, 0.3, len(b)))
    drops = [
        evaluate_rules(evidence(b, incumbent=a), gate(margin=1.0, confidence=c))[0].value for c in (0.5, 0.8, 0.99)
    ]
    assert drops == sorted(drops) and drops[0] < drops[2]


def test_recall_at_budget_spends_the_budget_on_the_good_images():
    labels = np.array([0] * 20 + [1] * 4)
    scores = np.r_[np.arange(20), [18.5, 19.5, 18.0, 3.0]].astype(float)
    assert recall_at_budget(0.05)(labels, scores) == 0.5  # one alarm of 20 allowed: above 18
    assert recall_at_budget(0.01)(labels, scores) == 0.25  # none: above 19


def test_calibration_holds_as_often_as_the_risk_says():
    rng = np.random.default_rng(3)
    n, m, rate, risk, refused, rounds = 39, 30, 0.05, 0.05, 0, 1500
    for _ in range(rounds):
        calibration = np.sort(rng.normal(size=n))
        scores = table(rng.normal(size=m), {"hole": [9.0]})
        (rule,) = evaluate_rules(
            evidence(scores, threshold=calibration[-2], budget=rate, calibration=n), gate(false_alarm_risk=risk)
        )
        refused += not rule.passed
    assert 0 < refused / rounds <= risk + 3 * np.sqrt(risk * (1 - risk) / rounds)


def test_calibration_by_sessions_is_held_against_what_the_next_one_may_bring():
    scores = table([0.1] * 65 + [0.9] * 35, {"hole": [0.9]})
    (rule,) = evaluate_rules(evidence(scores), gate(false_alarm_risk=0.001))
    assert not rule.passed and "session" not in rule.text
    rates = {"within_sessions_rate": 0.01, "unseen_session_rate": 0.05, "unseen_session_rate_low": 0.0}
    for high, passed in ((0.4, True), (0.08, False)):
        metrics = {"sessions": 6, **rates, "unseen_session_rate_high": high}
        (rule,) = evaluate_rules(evidence(scores, metrics=metrics), gate(false_alarm_risk=0.001))
        assert (
            rule.passed == passed and f"on a session never seen 5 % [0, {100 * high:.2g}], by 6 sessions" in rule.text
        )


def test_calibration_is_held_against_the_newest_good_images():
    scores = table([0.1] * 90 + [0.9] * 10, {"hole": [0.9]})
    known = frozenset(f"g{i}" for i in range(90))
    (rule,) = evaluate_rules(evidence(scores, known=known), gate(false_alarm_risk=0.001))
    assert not rule.passed and "10 alarms on 10 newest good images" in rule.text
    (rule,) = evaluate_rules(evidence(scores, known=known | {"g90"}), gate(false_alarm_risk=1e-9))
    assert "100 good test images" in rule.text  # nine new ones are too few


def test_tables_are_compared_by_content_not_by_order():
    a = noisy(4)
    b = a.sample(frac=1, random_state=0)
    assert same_images(a, b) and (align(b, a)["score"].to_numpy() == a["score"].to_numpy()).all()
    assert not same_images(a, b.iloc[1:])
    assert not same_images(a, b.assign(label=1 - b["label"]))


@pytest.mark.parametrize("scores", [table([0.1] * 12, {}), table([], {"hole": [0.9] * 4})])
def test_with_one_kind_of_test_image_no_auroc_is_asked_for(scores):
    rules = gate(margin=0.02, min_image_auroc=0.9, min_defect_auroc=0.5, false_alarm_risk=0.01, decision_margin=0.1)
    found = evaluate_rules(evidence(scores, incumbent=scores, incumbent_threshold=0.5, best_before=0.99), rules)
    assert [r.name for r in found] == (["calibration holds"] if (scores["label"] == 0).any() else [])
