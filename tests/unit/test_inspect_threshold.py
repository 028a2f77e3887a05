# SPDX-License-Identifier: Apache-2.0
"""The threshold's figures against naive counts, and the page that shows them."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from inspect_site import Inspector, make_bundle, make_site, part, score_into_log, scratched

from panda_ad.errors import GateRefused
from panda_ad.inspect import threshold_page
from panda_ad.inspect.decisions import Decision
from panda_ad.inspect.figures import Scored, by_decision, histogram, kept, steps
from panda_ad.inspect.queue import Row
from panda_ad.registry import audit
from panda_ad.registry.promote import Decision as Move
from panda_ad.scoring.calibration import threshold

LABELS = ("good", "defect", "unsure", "undecided", None)
IMAGES = st.lists(st.tuples(st.floats(-5, 5), st.sampled_from(LABELS)), min_size=1, max_size=40)


def logged(images, limit: float = 1.0) -> tuple[list[Row], dict[str, Decision]]:
    now = datetime(2026, 3, 1, tzinfo=UTC)
    rows = [Row(str(i), f"{i}.png", now, "m", "1", s, 0.5, limit, s > limit) for i, (s, _) in enumerate(images)]
    standing = {
        str(i): Decision(i + 1, label, "", "A", "", 0, 0, "nut", str(i), "", "m", "1", s, limit)
        for i, (s, label) in enumerate(images) if label
    }  # fmt: skip
    return rows, standing


@given(IMAGES, st.lists(st.floats(-5, 5), min_size=3, max_size=30), st.floats(0.02, 0.5))
def test_each_step_counts_what_its_threshold_would_do(images, calibration, rate):
    rows, standing = logged(images)
    scored, known = by_decision(rows, standing), np.array(calibration)
    found, now = steps(len(known), lambda r: threshold(known, r), scored, rate)
    assert len(scored.all) == len(images)
    assert found[now].value == threshold(known, rate).value
    for k, step in enumerate(found, 1):
        assert step.value == sorted(calibration)[-k] and step.rate == pytest.approx(k / (len(calibration) + 1))
        assert step.low <= step.rate <= step.high or k == len(calibration)
        above = [label for score, label in images if score > step.value]
        assert step.false_alarms == above.count("good")
        assert step.missed == sum(label == "defect" and score <= step.value for score, label in images)
        assert step.undecided == len(above) - above.count("good") - above.count("defect")
        assert threshold(known, step.rate).value == step.value, "the rate that is saved gives the threshold shown"


@given(IMAGES)
def test_the_promise_is_held_against_what_was_decided(images):
    found = kept(*logged(images))
    labels = [label for score, label in images if score > 1]
    assert (found.images, found.alarms) == (len(images), len(labels))
    assert (found.good, found.defect) == (labels.count("good"), labels.count("defect"))
    assert found.undecided == len(labels) - found.good - found.defect
    assert found.missed == sum(label == "defect" for score, label in images if score <= 1)
    parts = len(images) - found.defect - found.missed
    if parts:
        assert found.low <= found.good / parts <= (found.good + found.undecided) / parts <= found.high
        assert found.verdict(1.0) == "kept" and (found.verdict(0.0) == "kept") == (found.good + found.undecided == 0)


@given(IMAGES, st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.floats(-5, 5))
def test_the_histogram_holds_every_image(images, calibration, limit):
    scored = by_decision(*logged(images))
    edges, counts = histogram(np.array(calibration), scored, limit)
    assert (np.diff(edges) > 0).all() and counts["calibration"].sum() == len(calibration)
    for name in ("good", "defect", "undecided"):
        assert counts[name].sum() == len(getattr(scored, name))


def test_defects_far_above_do_not_flatten_the_rest():
    none = np.zeros(0)
    edges, counts = histogram(np.linspace(0, 1, 50), Scored(none, np.array([500.0]), none), 0.9)
    assert edges[-1] < 4 and counts["defect"][-1] == 1


@pytest.fixture
def site(tmp_path, monkeypatch, make_params, bundle):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PANDA_DECISIONS", raising=False)
    score_into_log(bundle, {f"good {i}": part(100 + i) for i in range(3)} | {"bad": scratched(200)})
    found = make_site(make_params(["nut"]), bundle)
    yield found
    found.close()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle"))


def test_the_page_shows_the_steps_and_saves_one_with_name_and_reason(site, monkeypatch):
    anna = Inspector(site)
    anna.decide("defect", "scratch")
    page = anna.get("/threshold/nut").text
    shown = json.loads(re.search(r'id="steps"[^>]*>(.*?)</script>', page).group(1))
    assert len(shown) == 40 and "of 1 known defects" in page and 'class="defect" x=' in page
    asked = []

    def saved(category, rate):
        asked.append((category, rate, audit._BEHALF.get()))
        return Move(category, "panda-x-nut", "staging", "4", "3", "promoted", "5 rules passed")

    monkeypatch.setattr(threshold_page, "set_threshold", saved)
    page = anna.post("/threshold/nut", rate=repr(shown[1]["rate"]), reason="too many alarms").text
    assert asked == [("nut", 2 / 41, ("Anna", "too many alarms"))] and "version 4, @staging: promoted" in page

    def refused(category, rate):
        raise GateRefused("recall: too low")

    monkeypatch.setattr(threshold_page, "set_threshold", refused)
    assert "recall: too low" in anna.post("/threshold/nut", rate="0.1", reason="x").text
    assert anna.post("/threshold/nut", rate="0.1", reason=" ").status_code == 422
    assert anna.post("/threshold/nut", rate="one", reason="x").status_code == 422


def test_verdicts_of_a_version_that_scores_otherwise_do_not_count(site, bundle):
    score_into_log(bundle, {"other": scratched(300)}, version="2")
    anna = Inspector(site)
    assert "4 scored images" in anna.get("/threshold/nut").text
    model = site.models.current("nut")
    model.detector.config.provenance["scores_of_versions"] = ["2"]
    assert "5 scored images" in anna.get("/threshold/nut").text
