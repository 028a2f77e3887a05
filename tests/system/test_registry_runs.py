# SPDX-License-Identifier: Apache-2.0
"""What runs hold: many categories and many checks of one version, and categories of which one fails."""

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from registry_project import NAME, the_run

from panda_ad.monitor import check
from panda_ad.registry import runs
from panda_ad.registry.connection import connect
from panda_ad.registry.monitoring import record_check
from panda_ad.stages.publish import main as publish


@pytest.fixture
def project(project):
    """A repository with version 1 published; the working directory."""
    publish("fabric")
    return project


def uploads(monkeypatch):
    """Names of the files that are uploaded from here on."""
    from mlflow import MlflowClient

    sent, real = [], MlflowClient.log_artifact

    def log_artifact(self, run_id, path, folder=None):
        sent.append(f"{folder}/{path.rpartition('/')[2]}")
        return real(self, run_id, path, folder)

    monkeypatch.setattr(MlflowClient, "log_artifact", log_artifact)
    return sent


def test_files_of_any_number_of_categories_are_uploaded_once(project, monkeypatch):
    path = project / ("scores with a long name " * 5)
    path.write_text("a,b")
    files = {f"category number {i:03d}": [path] for i in range(100)}
    sent = uploads(monkeypatch)
    for folder, paths in files.items():  # each category is a process of its own
        runs.log_files(connect(), the_run(), {folder: paths})
    assert len(sent) == 100
    runs.log_files(connect(), the_run(), files)
    assert len(sent) == 100


def test_a_tag_that_mlflow_has_cut_costs_an_upload_and_no_more(project, monkeypatch):
    client = connect()
    client.set_tag(the_run().info.run_id, "panda.artifacts", '{"params.yaml": "0123456789abcd')
    client.set_tag(the_run().info.run_id, "panda.artifacts.fabric", "{" + '"x": "y", ' * 2000)
    sent = uploads(monkeypatch)
    publish("fabric")
    assert {"None/params.yaml", "fabric/scores.csv"} <= set(sent)
    sent.clear()
    publish("fabric")
    assert sent == []


def test_a_version_can_be_checked_for_years(project, monkeypatch):
    report, data = project / "fabric.html", project / "fabric.json"
    report.write_text("report")
    data.write_text("{}")
    start = datetime(2026, 1, 1, tzinfo=UTC)
    times = [(start + timedelta(days=i)).isoformat() for i in range(80)]
    for time in times:
        record_check(
            "sample",
            NAME,
            "1",
            {"checked": time, "window": 30, "drifted": False, "findings": [], "tests": [], "open": [], "evidence": {}},
            [report, data],
        )
    client = connect()
    (run,) = client.search_runs([client.get_experiment_by_name("panda-sample-monitoring").experiment_id])
    assert len(client.list_artifacts(run.info.run_id)) == 80
    assert len(client.list_artifacts(run.info.run_id, times[-1].replace(":", ""))) == 2


def test_a_category_that_fails_in_a_way_of_its_own_leaves_the_others_checked(project, monkeypatch):
    def check_category(category, alias, params, good):
        if category == "fabric":
            raise ZeroDivisionError("float division\nby zero")
        return category

    recorded = []
    monkeypatch.setattr(check, "load_params", lambda: SimpleNamespace(categories=["fabric", "grid"], dataset="sample"))
    monkeypatch.setattr(check, "check_category", check_category)
    monkeypatch.setattr(check, "record", lambda found, dataset: recorded.append(found))
    checks, problems = check.monitor([], "staging", lambda params, category: {})
    assert checks == recorded == ["grid"]
    assert problems == ["category fabric: could not be checked (ZeroDivisionError: float division by zero)"]
