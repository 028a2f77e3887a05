# SPDX-License-Identifier: Apache-2.0
"""Stage `evaluate` on test sets that lack something: no defective images, no good ones, a single defect, none at all."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from registry_project import make_project

from panda_ad.evaluation.intervals import read_intervals


@pytest.fixture(scope="module")
def plant(tmp_path_factory):
    """A project with a bundle, up to `index`."""
    from panda_ad.stages import adapt, extract, index

    folder = make_project(tmp_path_factory.mktemp("sets") / "plant")
    for name in ("adapt", "bundle", "evaluation"):
        shutil.rmtree(folder / "build" / name)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["adapt"]["method"] = "none"
    params["evaluate"]["bootstrap"] = 50
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        extract.main()
        adapt.main("fabric")
        index.main("fabric")
    return folder


def evaluated(plant: Path, monkeypatch: pytest.MonkeyPatch, keep) -> tuple[dict[str, float], str]:
    """Figures and report of the stage on the test rows for which `keep(label, n-th of its label)`."""
    from panda_ad.stages import common, evaluate

    def rows(category: str) -> dict[str, pd.DataFrame]:
        splits = common.category_rows(category)
        test = splits["test"]
        numbers = test.groupby("label").cumcount()
        chosen = [keep(label, n) for label, n in zip(test["label"], numbers, strict=True)]
        return splits | {"test": test[np.array(chosen, bool)]}

    monkeypatch.chdir(plant)
    monkeypatch.setattr(evaluate, "category_rows", rows)
    evaluate.main("fabric")
    folder = plant / "build/evaluation/fabric"
    assert len(pd.read_csv(folder / "scores.csv")) == sum(
        json.loads((folder / "metrics.json").read_text())[k] for k in ("test_good", "test_defect")
    )
    return json.loads((folder / "metrics.json").read_text()), (folder / "report.html").read_text(encoding="utf-8")


def warnings(html: str) -> list[str]:
    section = html[html.index('<section id="headline"') : html.index('<form id="bar"')]
    return re.findall(r'^ *<p class="warning">([^<]*)</p>', section, re.M)  # not the one in <noscript>


def test_a_whole_test_set_has_its_figures(plant, monkeypatch):
    figures, html = evaluated(plant, monkeypatch, lambda label, n: True)
    assert {"image_auroc", "recall", "false_alarm_rate", "features_auroc", "threshold"} <= set(figures)
    assert figures["test_good"] >= 10 and figures["test_defect"] >= 10
    assert not any("No " in line for line in warnings(html))
    assert "<dt>commit</dt>" in html and "build/publish/fabric.json" in html


def test_good_images_alone(plant, monkeypatch, capsys):
    figures, html = evaluated(plant, monkeypatch, lambda label, n: label == 0)
    assert figures["test_defect"] == 0
    assert set(figures) == {"threshold", "false_alarm_rate", "test_good", "test_defect"}
    assert set(read_intervals(plant / "build/evaluation/fabric")) == {"false_alarm_rate"}
    assert any(line.startswith("No defective test images") for line in warnings(html))
    out = capsys.readouterr().out
    assert "fabric: false alarms" in out and "fabric: No defective test images" in out


def test_defective_images_alone(plant, monkeypatch):
    figures, html = evaluated(plant, monkeypatch, lambda label, n: label == 1)
    assert "image_auroc" not in figures and "false_alarm_rate" not in figures and "recall" in figures
    assert any(line.startswith("No good test images") for line in warnings(html))


def test_one_defect(plant, monkeypatch):
    figures, html = evaluated(plant, monkeypatch, lambda label, n: label == 0 or n == 0)
    assert figures["test_defect"] == 1 and 0 <= figures["image_auroc"] <= 1
    intervals = read_intervals(plant / "build/evaluation/fabric")
    assert intervals["recall"] in ((0.0, 0.975), pytest.approx((0.025, 1.0)))
    assert intervals["image_auroc"][1] - intervals["image_auroc"][0] > 0.3
    assert any(line.startswith("Only 1 defective test image") for line in warnings(html))


def test_no_test_images(plant, monkeypatch, capsys):
    figures, html = evaluated(plant, monkeypatch, lambda label, n: False)
    assert set(figures) == {"threshold", "test_good", "test_defect"}
    assert len(warnings(html)) == 2
    assert "fabric: no test images; threshold" in capsys.readouterr().out
    for name in ("roc.csv", "histogram.csv", "scores.csv"):
        assert len(pd.read_csv(plant / "build/evaluation/fabric" / name)) == 0
