# SPDX-License-Identifier: Apache-2.0
"""`make ui` on real servers: schedules that run by themselves, one start per checkout, and pages that ask nobody else."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

import pytest
from browser import browser, file_url  # noqa: F401
from mlflow import MlflowClient
from prefect_project import finished_project, servers
from report_demo import demo

from panda_ad.commands.servers import running_servers
from panda_ad.errors import Busy
from panda_ad.report.build import write_report

pytestmark = pytest.mark.slow

DEPLOYMENTS = ("retrain", "score", "monitor")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return finished_project(tmp_path_factory, tmp_path_factory.mktemp("schedules") / "a project")


@pytest.fixture(scope="module")
def said():
    return []


@pytest.fixture(scope="module")
def prefect(project, said):
    with servers(project, say=said.append) as started:
        yield started


def until(condition, seconds=300.0):
    """The condition's first true value."""
    limit = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < limit, f"not within {seconds} s"
        time.sleep(0.3)
    return value


def test_the_start_says_what_is_ready_after_how_many_seconds_and_which_schedules_are_off(prefect, said):
    ready = [re.fullmatch(r" +\d+ s  (.*)", line)[1] for line in said if " s  " in line]
    assert ready == ["Prefect answers", "deployments registered; their schedules:", "MLflow answers"]
    schedules = {"monitor": "0 1 * * * UTC", "retrain": "0 2 * * * UTC", "score": "15 * * * * UTC"}
    expected = [f"{name} off {when}" for name, when in schedules.items()]
    assert sorted(" ".join(line.split()) for line in said if "UTC" in line) == expected


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_schedule_gets_runs_when_it_is_switched_on_and_none_when_it_is_off(prefect, name):
    assert prefect.upcoming(name) == []
    prefect.change_schedule(name, active=True)
    runs = until(lambda: prefect.upcoming(name))
    assert all(run["auto_scheduled"] for run in runs)
    assert datetime.fromisoformat(runs[0]["expected_start_time"]) > datetime.now(UTC)
    prefect.change_schedule(name, active=False)
    assert prefect.upcoming(name) == []
    time.sleep(7)  # the scheduler looks at changed deployments every five seconds
    assert prefect.upcoming(name) == []


def test_a_scheduled_run_starts_at_its_time_by_itself_and_completes(prefect):
    begin = datetime.now(UTC)
    schedule = {"interval": 60, "anchor_date": (begin + timedelta(seconds=20)).isoformat(), "timezone": "UTC"}
    prefect.change_schedule("retrain", active=True, schedule=schedule, parameters={"promote": False})
    run = until(lambda: prefect.upcoming("retrain"))[0]
    assert run["auto_scheduled"] and run["state_name"] == "Scheduled"
    at = datetime.fromisoformat(run["expected_start_time"])
    ended = prefect.wait(run["id"])
    assert ended["state_type"] == "COMPLETED", (ended["state"]["message"], prefect.logs(run["id"]))
    # the runner takes a run that is nearly due, and may begin it a little before its time; a busy machine may take minutes
    late = datetime.fromisoformat(ended["start_time"]) - at
    assert timedelta(seconds=-15) < late < timedelta(minutes=5)
    prefect.change_schedule("retrain", active=False)
    until(lambda: not prefect.upcoming("retrain"))


def test_switches_and_writers_wait_for_each_other(prefect):
    """A schedule's switch was answered 503 where a run wrote at the same moment."""

    def write(number: int) -> set[int]:
        entry = {"name": "test", "level": 20, "message": "line", "timestamp": datetime.now(UTC).isoformat()}
        return {prefect.http.post("/logs/", json=[entry] * 20).status_code for _ in range(25)}

    def switch(name: str) -> set[int]:
        for number in range(16):
            prefect.change_schedule(name, active=number % 2 == 0)
        return {204}

    with ThreadPoolExecutor(6) as threads:
        switched, written = threads.map(switch, DEPLOYMENTS), threads.map(write, range(3))
        assert set().union(*switched, *written) == {201, 204}


def test_a_failed_run_shows_its_line_and_no_stack_trace(prefect):
    run = prefect.press_run(categories=["nowhere"])
    ended = prefect.wait(run)
    message = "categories: nowhere not in params.yaml, which has fabric, grid"
    assert (ended["state_type"], ended["state"]["message"]) == ("FAILED", message)
    until(lambda: any(message in line for line in prefect.logs(run)))
    time.sleep(3)  # the process ends a moment after the run, and logs what it says then
    assert "Traceback" not in "\n".join(prefect.logs(run))


def test_a_second_ui_of_the_checkout_is_refused_and_names_the_first(prefect):
    with contextlib.chdir(prefect.project), pytest.raises(Busy) as error, running_servers(say=lambda line: None):
        pass
    assert f"pid {os.getpid()}" in str(error.value) and prefect.address in str(error.value)
    assert "\n" not in str(error.value)


def mlflow_pages(address: str) -> list[str]:
    """Addresses of MLflow's pages, after a run with an artifact and a registered version have been made for them to show."""
    client = MlflowClient(address, address)
    experiment = client.create_experiment("panda-pages")
    run = client.create_run(experiment)
    client.log_metric(run.info.run_id, "image_auroc", 0.9)
    client.log_text(run.info.run_id, "<p>a report</p>", "report/report.html")
    client.create_registered_model("panda-pages-fabric", description="A card.")
    client.create_model_version("panda-pages-fabric", f"{run.info.artifact_uri}/report", run_id=run.info.run_id)
    client.set_terminated(run.info.run_id)
    runs = f"/#/experiments/{experiment}/runs"
    paths = ["/", "/#/experiments", runs, f"{runs}/{run.info.run_id}", f"{runs}/{run.info.run_id}/model-metrics"]
    paths += [f"{runs}/{run.info.run_id}/artifacts", "/#/models", "/#/models/panda-pages-fabric"]
    return [address + path for path in [*paths, "/#/models/panda-pages-fabric/versions/1"]]


def test_no_page_of_the_three_uis_asks_anything_beyond_this_machine(prefect, browser, tmp_path):  # noqa: F811
    """Prefect's second UI (/v2) asked amplitude.com; a second one is not served any more."""
    run = prefect.press_run(categories=["nowhere"])
    prefect.wait(run)
    write_report(demo(good=8, per_kind=2), tmp_path / "report.html")
    deployment = prefect.deployment()["id"]
    paths = ["/", "/v2", "/v2/deployments", "/dashboard", "/runs", f"/runs/flow-run/{run}", "/flows", "/deployments"]
    paths += [f"/deployments/deployment/{deployment}", f"/deployments/deployment/{deployment}/run", "/work-pools"]
    paths += ["/blocks", "/variables", "/automations", "/events", "/concurrency-limits", "/settings"]
    addresses = [prefect.address + path for path in paths]
    addresses += [*mlflow_pages(prefect.mlflow), file_url(tmp_path / "report.html")]
    asked: set[str] = set()
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.on("request", lambda request: asked.add(request.url))
    for address in addresses:
        page.goto(address, wait_until="load")
        page.wait_for_timeout(1500)
        assert "/v2" not in urlsplit(page.url).path
    page.close()
    local = [url for url in asked if urlsplit(url).hostname == "127.0.0.1"]
    assert len(local) > 100
    assert {url for url in asked if urlsplit(url).scheme in ("http", "https", "ws", "wss")} - set(local) == set()


def test_the_switch_in_prefects_ui_schedules_runs(prefect, browser):  # noqa: F811
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.goto(f"{prefect.address}/deployments/deployment/{prefect.deployment('monitor')['id']}", wait_until="load")
    switch = page.locator(".deployment-schedule-toggle-switch, .p-toggle, [role=switch]").first
    switch.click()
    assert until(lambda: prefect.upcoming("monitor"))
    switch.click()
    until(lambda: not prefect.upcoming("monitor"))
    page.close()


def test_a_run_whose_worker_died_before_it_began_gives_its_place_free(tmp_path, tmp_path_factory):
    """A Pending run keeps the deployment's only place; `make ui` again marks it crashed."""
    project = finished_project(tmp_path_factory, tmp_path / "project")
    with servers(project, MLFLOW_TRACKING_URI="http://127.0.0.1:9") as first:
        begun = first.press_run()
        first.wait(begun, {"PENDING"})
        os.killpg(first.groups["worker"].pid, signal.SIGKILL)
        assert first.get(f"/flow_runs/{begun}")["state_type"] == "PENDING"
    with servers(project, MLFLOW_TRACKING_URI="http://127.0.0.1:9") as again:
        run = again.press_run()
        assert again.wait(run, {"RUNNING", "COMPLETED"})
        assert again.get(f"/flow_runs/{begun}")["state_type"] == "CRASHED"
        assert again.wait(run)["state_type"] == "COMPLETED"
