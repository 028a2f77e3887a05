# SPDX-License-Identifier: Apache-2.0
"""`dvc plots diff` of two revisions, opened in headless Chromium: drawn without a network, and the figures that it draws."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
import yaml
from browser import browser, file_url, watch  # noqa: F401
from conftest import REPO
from prefect_project import BIN, call

CATEGORY = "nut"
MAKE = """
import sys
import numpy as np
from pathlib import Path
from panda_ad.evaluation.figures import histogram_table, roc_table
shift, seed = (float(v) for v in Path("quality.txt").read_text().split())
rng = np.random.default_rng(int(seed))
labels = np.repeat([0, 1], (40, 30))
scores = rng.normal(shift * labels, 1)
folder = Path("build/evaluation/nut")
folder.mkdir(parents=True, exist_ok=True)
roc_table(labels, scores).to_csv(folder / "roc.csv", index=False)
histogram_table(labels, scores, 1.7).to_csv(folder / "histogram.csv", index=False)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A repository with this one's plots, templates and DVC settings: one commit, and a working tree with other figures."""
    folder = tmp_path_factory.mktemp("plots") / "a plant"
    folder.mkdir()
    call("git", "init", "-q", cwd=folder)
    call(f"{BIN}/dvc", "init", "-q", cwd=folder)
    shutil.copytree(REPO / ".dvc" / "plots", folder / ".dvc" / "plots")
    shutil.copy(REPO / ".dvc" / "config", folder / ".dvc" / "config")
    plots = yaml.safe_load((REPO / "dvc.yaml").read_text(encoding="utf-8"))["stages"]["evaluate"]["plots"]
    stage = {
        "matrix": {"category": [CATEGORY]},
        "cmd": f"{shlex.quote(sys.executable)} make.py",
        "deps": ["quality.txt", "make.py"],
        "plots": plots,
    }
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"evaluate": stage}}))
    (folder / "make.py").write_text(MAKE)
    (folder / "quality.txt").write_text("1.0 0\n")
    call(f"{BIN}/dvc", "repro", "-q", cwd=folder)
    call("git", "add", "-A", cwd=folder)
    call("git", "commit", "-qm", "A first model", cwd=folder)
    (folder / "quality.txt").write_text("2.5 1\n")
    call(f"{BIN}/dvc", "repro", "-q", cwd=folder)
    return folder


@pytest.mark.parametrize("command", ["show", "diff"])
def test_the_page_draws_offline(project, browser, command):  # noqa: F811
    call(f"{BIN}/dvc", "plots", command, "-o", f"plots {command}", cwd=project)
    page, log = browser.new_page(), []
    watch(page, log)
    page.goto(file_url(project / f"plots {command}" / "index.html"))
    page.wait_for_function("document.querySelectorAll('.vega-embed canvas').length === 2")
    painted = page.evaluate(
        """() => [...document.querySelectorAll('.vega-embed canvas')].map(c => {
             const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data, found = new Set();
             for (let i = 0; i < d.length; i += 4) if (d[i + 3] > 200) found.add(`${d[i] >> 4} ${d[i + 1] >> 4} ${d[i + 2] >> 4}`);
             return found.size; })"""
    )
    assert all(colors > 8 for colors in painted), "an empty plot has the colors of its axes only"
    assert log == []
    page.close()


def test_the_plots_hold_each_image_and_each_step(project):
    call(f"{BIN}/dvc", "plots", "diff", "-o", "specs", cwd=project)
    page = (project / "specs" / "index.html").read_text(encoding="utf-8")
    specs = [json.loads(text) for text in re.findall(r"var spec = (\{.*\});\n", page)]
    assert {spec["title"]["text"] for spec in specs} == {f"ROC, {CATEGORY}", f"Scores, {CATEGORY}"}
    assert all("smooth" not in json.dumps(spec) and "loess" not in json.dumps(spec) for spec in specs)
    roc = next(spec for spec in specs if spec["title"]["text"].startswith("ROC"))
    scores = next(spec for spec in specs if spec["title"]["text"].startswith("Scores"))
    for revision in ("HEAD", "workspace"):
        rows = [row for row in scores["data"]["values"] if row["rev"] == revision]
        counts = {name: sum(int(r["images"]) for r in rows if r["label"] == name) for name in ("good", "defect")}
        assert counts == {"good": 40, "defect": 30}
        assert all(float(r["upper"]) > float(r["score"]) and float(r["threshold"]) == 1.7 for r in rows)
        points = np.array(
            [
                [float(r["false_positive_rate"]), float(r["true_positive_rate"])]
                for r in roc["data"]["values"]
                if r["rev"] == revision
            ]
        )
        assert points[0].tolist() == [0, 0] and points[-1].tolist() == [1, 1] and len(points) == 71
        assert (np.diff(points, axis=0).min(axis=1) == 0).all(), "without ties each step goes up or to the right"
    layers = scores["spec"]["layer"]
    assert (layers[0]["encoding"]["x"]["field"], layers[0]["encoding"]["y"]["field"]) == ("score", "images")
