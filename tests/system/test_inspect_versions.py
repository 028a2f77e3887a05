# SPDX-License-Identifier: Apache-2.0
"""Versions from the inspector's page, in a real registry: another threshold, promote, roll back, what the state says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from inspect_site import Inspector
from monitor_project import drop, make_monitored
from registry_project import NAME, aliases, moves, set_gate

from panda_ad.commands.score import score_files
from panda_ad.errors import UserError
from panda_ad.inspect.access import Access
from panda_ad.inspect.server import make_site
from panda_ad.monitor.log import LOG
from panda_ad.params_file import load_params
from panda_ad.registry.connection import connect
from panda_ad.registry.evidence import artifact
from panda_ad.registry.load import load_model
from panda_ad.registry.new_threshold import set_threshold
from panda_ad.registry.promote import promote, rollback


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return make_monitored(tmp_path_factory, tmp_path_factory.mktemp("built") / "plant")


@pytest.fixture
def plant(built, tmp_path, monkeypatch):
    """A copy of a project whose version 1 is in place and has scored eight images."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("PANDA_DECISIONS", raising=False)
    folder = shutil.copytree(built, tmp_path / "plant")
    monkeypatch.chdir(folder)
    set_gate(folder, decision_margin=None)  # of ten good test images one more alarm is too many
    drop(folder, 8, seed=5)
    model = load_model(f"models:/{NAME}@staging", None)
    score_files(sorted(Path("inbox/fabric").iterdir()), model, Path("verdicts.csv"), log=LOG)
    return folder


@pytest.fixture
def anna(plant):
    site = make_site(load_params(), Access())
    yield Inspector(site)
    site.close()


def test_another_threshold_is_a_version_with_the_same_scores(plant):
    decision = set_threshold("fabric", 2 / 7)
    assert decision.outcome == "promoted" and aliases() == {"staging": 2, "challenger": 2}
    old, new = (load_model(f"models:/{NAME}/{n}", None).detector for n in (1, 2))
    assert new.config.false_alarm_rate == 2 / 7 and new.config.provenance["scores_of_versions"] == ["1"]
    assert new.threshold().value == sorted(old.calibration)[-2] < old.threshold().value
    images = [np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8) for i in range(3)]
    assert [v.score for v in new.score(images)] == [v.score for v in old.score(images)]
    version = connect().get_model_version(NAME, "2")
    run = connect().get_run(version.run_id)
    assert run.data.params["verdict.false_alarm_rate"] == json.dumps(2 / 7) and run.info.status == "FINISHED"
    metrics = json.loads(artifact(connect(), version.run_id, "fabric/metrics.json"))
    assert metrics["threshold"] == new.threshold().value == run.data.metrics["fabric/threshold"]
    assert version.tags["panda.budget"] == repr(2 / 7) and version.description.startswith(
        "Version 1 with false-alarm rate"
    )
    assert [d.outcome for d in promote("fabric")] == ["unchanged"], "nothing puts the former threshold back"
    with pytest.raises(UserError, match="is 0.2857 already"):
        set_threshold("fabric", 2 / 7)
    rollback("fabric")
    assert aliases()["staging"] == 1 and [d.outcome for d in promote("fabric")] == ["held back"]


def test_a_threshold_that_the_gate_refuses_moves_nothing(plant):
    missing = connect().get_model_version(NAME, "1").tags
    table = artifact(connect(), missing["panda.run"], "fabric/scores.csv").decode().splitlines()
    caught = next(line.split(",")[0] for line in table if "test/hole" in line)
    set_gate(plant, must_catch=[caught, "nowhere.png"])
    decision = set_threshold("fabric", 2 / 7)
    assert decision.outcome == "refused" and "nowhere.png" in decision.reason
    assert aliases() == {"staging": 1, "challenger": 1} and moves() == [("promote", "staging", None, "1")]


def test_the_page_changes_versions_in_the_name_of_a_person(anna):
    assert "version 1" in anna.get("/state/fabric").text.lower()
    page = anna.post("/threshold/fabric", rate=repr(2 / 7), reason="too few alarms").text
    assert "version 2, @staging: promoted" in page
    state = anna.get("/state/fabric").text
    assert "version 2" in state and "Anna (" in state and "too few alarms" in state and "FAILED" not in state
    assert "Of 8 images" not in state, "version 2 has scored nothing itself"
    assert "8 scored images" in anna.get("/threshold/fabric").text, (
        "what version 1 scored counts, the scores are the same"
    )
    page = anna.post("/state/fabric", what="rollback", version="1", reason="too many after all").text
    assert "rolled back" in page and "Of 8 images" in page and aliases()["staging"] == 1
    last = connect().get_registered_model(NAME)
    record = json.loads(
        max((k, v) for k, v in last.tags.items() if k.startswith("panda.audit."))[1].rpartition("\n")[2]
    )
    assert record["who"].startswith("Anna (") and record["why"].endswith("; too many after all")
    assert "held back" in anna.post("/state/fabric", what="promote", version="1", reason="again").text
    assert anna.post("/state/fabric", what="delete", reason="x").status_code == 200, "one line, nothing done"
    assert aliases()["staging"] == 1


def test_the_state_says_what_lacks(anna, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    page = anna.get("/state/fabric")
    assert page.status_code == 200 and "does not answer" in page.text and "Not checked yet" in page.text
    assert anna.get("/state/fabric/drift").status_code == 404
