# SPDX-License-Identifier: Apache-2.0
"""Figures of test sets that lack something: what cannot be measured is left out, and the few are said to be few."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import REPO

from panda_ad.errors import UserError
from panda_ad.evaluation import figures
from panda_ad.evaluation.image_metrics import auroc
from panda_ad.evaluation.intervals import read_intervals
from panda_ad.params_file import load_params
from panda_ad.system.files import write_json


@pytest.fixture
def params():
    return load_params(REPO / "params.yaml")


def test_a_whole_test_set_has_all_figures_and_their_intervals(params, tmp_path):
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], (30, 40))
    scores = rng.normal(labels, 1.0)
    values, intervals = figures.image_figures(labels, scores, 0.5, params)
    assert set(values) == {*figures.RANKING, "threshold", "false_alarm_rate", "recall", "test_good", "test_defect"}
    assert values["image_auroc"] == auroc(labels, scores)
    assert values["recall"] == np.mean(scores[labels == 1] > 0.5)
    assert set(intervals) == {*figures.RANKING, "false_alarm_rate", "recall"}
    assert all(low <= values[name] <= high for name, (low, high) in intervals.items())
    write_json(tmp_path / "intervals.json", intervals)
    assert read_intervals(tmp_path) == intervals
    assert read_intervals(tmp_path / "none") == {}


@pytest.mark.parametrize(
    ("good", "defective", "kept"),
    [(30, 0, {"false_alarm_rate"}), (0, 12, {"recall"}), (0, 0, set())],
)
def test_what_cannot_be_measured_is_left_out(params, good, defective, kept):
    labels = np.repeat([0, 1], (good, defective))
    scores = np.linspace(0, 1, good + defective)
    values, intervals = figures.image_figures(labels, scores, 0.5, params)
    assert set(values) == {"threshold", "test_good", "test_defect"} | kept
    assert set(intervals) == kept
    assert (values["test_good"], values["test_defect"]) == (good, defective)
    assert figures.component_figures(labels, scores, scores) == {}
    assert list(figures.roc_table(labels, scores).columns) == ["false_positive_rate", "true_positive_rate"]
    assert len(figures.roc_table(labels, scores)) == 0
    table = figures.histogram_table(labels, scores, 0.5)
    assert table["images"].sum() == good + defective
    lines = figures.cautions(good, defective, 0.95)
    assert any("No defective test images" in line for line in lines) == (defective == 0)
    assert any("No good test images" in line for line in lines) == (good == 0)


def test_a_score_that_is_not_finite_is_refused(params):
    with pytest.raises(UserError, match="not finite"):
        figures.image_figures(np.array([0, 1]), np.array([0.0, np.nan]), 0.5, params)


def test_pixel_figures_need_a_defective_and_a_normal_pixel(params):
    none, whole = np.zeros((4, 4), bool), np.ones((4, 4), bool)
    heat = np.arange(16, dtype=np.float32).reshape(4, 4)
    assert figures.pixel_figures([none, none], [heat, heat], params) == ({}, {})
    assert figures.pixel_figures([whole], [heat], params) == ({}, {})
    assert figures.pixel_figures([], [], params) == ({}, {})
    values, intervals = figures.pixel_figures([heat > 10, none], [heat, heat], params)
    assert values["pixel_f1"] > 0.6
    assert set(values) == set(intervals) == {"pixel_auroc", "au_pro", "pixel_f1"}


def test_cautions_name_how_little_a_few_images_say():
    assert figures.cautions(30, 30, 0.95) == []
    (one,) = figures.cautions(30, 1, 0.95)
    assert one.startswith("Only 1 defective test image: ") and "as low as 3 %" in one
    (few,) = figures.cautions(9, 30, 0.95)
    assert few.startswith("Only 9 good test images: ") and "as high as 34 %" in few


def test_the_histogram_has_true_edges_and_every_image_once():
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 2, 200)
    scores = rng.normal(3.0 * labels, 1)
    table = figures.histogram_table(labels, scores, 1.5)
    for label, name in ((0, "good"), (1, "defect")):
        rows = table[table["label"] == name]
        assert (rows["images"] > 0).all()
        assert rows["images"].sum() == (labels == label).sum()
        inside = [
            ((scores[labels == label] >= r.score) & (scores[labels == label] <= r.upper)).sum()
            for r in rows.itertuples()
        ]
        assert (np.array(inside) >= rows["images"]).all()
    assert np.ptp(table["upper"] - table["score"]) < 1e-9
    assert (table["threshold"] == 1.5).all()
