# SPDX-License-Identifier: Apache-2.0
"""The retrain deployment on a real Prefect server with a real worker, started and cancelled through the API as its UI does."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import psutil
import pytest
from monitor_project import drop, make_monitored
from prefect_project import ROOT, call, clean_environment, finished_project, lock_held, new_data, servers

from panda_ad.commands.servers import server_settings
from panda_ad.system.lock import repository_lock
from panda_ad.system.processes import Group
from panda_ad.system.surroundings import QUIET

pytestmark = pytest.mark.slow

SECRET = "a-token-nobody-may-read"


@pytest.fixture(scope="module")
def webhook():
    """An address that keeps what is posted to it."""
    received: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            received.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/{SECRET}", received
        server.shutdown()


@pytest.fixture(scope="module")
def prefect(tmp_path_factory, webhook):
    project = finished_project(tmp_path_factory, tmp_path_factory.mktemp("prefect") / "project")
    with servers(project, MLFLOW_TRACKING_URI="http://127.0.0.1:9", PANDA_WEBHOOK_URL=webhook[0]) as started:
        yield started


@pytest.fixture(autouse=True)
def nothing_in_the_way(prefect):
    yield
    for path in [
        *prefect.project.glob("down-*"),
        *prefect.project.glob("attempts-*"),
        prefect.project / "slow",
        prefect.project / "paused",
    ]:
        path.unlink(missing_ok=True)


def stage_processes():
    """The commands of slow stages that are alive."""
    return [
        p
        for p in psutil.process_iter(["cmdline", "status"])
        if "98765" in (p.info["cmdline"] or []) and p.info["status"] != "zombie"
    ]


def engine(prefect):
    """The flow run's process, a child of the worker."""
    worker = psutil.Process(prefect.groups["worker"].pid)
    (found,) = [p for p in worker.children(recursive=True) if "prefect.engine" in p.cmdline()]
    return found


def test_the_page_calls_the_server_it_came_from(prefect):
    """On any port: the page takes the API's address from the server's settings, whose default is port 4200."""
    assert httpx.get(f"{prefect.address}/ui-settings", trust_env=False).json()["api_url"] == f"{prefect.address}/api"


def test_the_server_forgets_old_runs(prefect):
    """Prefect's own default is to keep them for ever."""
    settings = prefect.get("/admin/settings")["server"]["services"]["db_vacuum"]
    assert "flow_runs" in settings["enabled"] and settings["retention_period"] == "P90D"


def test_run_button_gives_dvcs_graph_results_and_logs(prefect):
    (prefect.project / "data/images").write_text("two\n")
    run = prefect.press_run()
    ended = prefect.wait(run)
    assert ended["state_type"] == "COMPLETED", ended["state"]["message"]
    tasks = prefect.tasks(run)
    assert set(tasks) == {"data.dvc", "validate", "adapt@fabric", "adapt@grid", "publish@fabric", "publish@grid"}
    names = {t["id"]: name for name, t in tasks.items()}
    edges = {
        (name, names[parent["id"]]) for name, t in tasks.items() for parent in t["task_inputs"].get("wait_for", [])
    }
    assert edges == {
        ("validate", "data.dvc"),
        ("adapt@fabric", "validate"),
        ("adapt@grid", "validate"),
        ("publish@fabric", "adapt@fabric"),
        ("publish@grid", "adapt@grid"),
    }
    assert {t["state_name"] for t in tasks.values()} == {"Completed"}

    prefect.wait_for_line(run, "adapted grid")
    assert json.loads((prefect.project / "build/publish/grid.json").read_text())["prefect_run"] == run
    artifacts = {a["key"]: a for a in prefect.post("/artifacts/filter", artifacts={"flow_run_id": {"any_": [run]}})}
    assert set(artifacts) == {"retrain-results", "retrain-summary"}
    assert [row["category"] for row in json.loads(artifacts["retrain-results"]["data"])] == ["fabric", "grid"]
    assert "| adapt@grid | Completed |" in artifacts["retrain-summary"]["data"]
    assert call("dvc", "status", "data.dvc", cwd=prefect.project).strip() == "Data and pipelines are up to date."
    assert "up to date" in call("dvc", "repro", cwd=prefect.project)


def test_run_again_does_nothing(prefect):
    run = prefect.press_run(categories=["grid"])
    assert prefect.wait(run)["state_type"] == "COMPLETED"
    assert {name: t["state_name"] for name, t in prefect.tasks(run, count=4).items()} == dict.fromkeys(
        ["data.dvc", "validate", "adapt@grid", "publish@grid"], "Unchanged"
    )


def triggered(prefect, deployment):
    """Runs of a deployment that an automation started."""
    runs = prefect.post("/flow_runs/filter", flow_runs={"deployment_id": {"any_": [deployment]}})
    return [r for r in runs if (r["created_by"] or {}).get("type") == "AUTOMATION"]


def test_a_drift_found_by_the_monitor_flow_runs_retrain_for_its_category(prefect, tmp_path, tmp_path_factory):
    """The real score and monitor flows in a project with a real model, on this server; the automation runs `retrain` in the other."""
    plant = make_monitored(tmp_path_factory, tmp_path / "plant")
    drop(plant, 14, seed=1)
    drop(plant, 16, seed=2, shift=-40)
    code = "from flows.score import score\nfrom flows.monitor import monitor\nscore()\nprint(monitor(return_state=True).name)"
    server = {"PREFECT_API_URL": f"{prefect.address}/api", "PREFECT_HOME": str(plant / ".prefect")}
    environment = clean_environment() | server | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=plant, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and result.stdout.endswith("Drift\n"), result.stdout + result.stderr

    deployment = prefect.deployment()["id"]
    limit = time.monotonic() + 300
    while not (runs := triggered(prefect, deployment)):
        assert time.monotonic() < limit, prefect.post("/events/filter", filter={"event": {"name": ["panda.drift"]}})
        time.sleep(0.3)
    (run,) = runs
    assert run["parameters"] == {"categories": ["fabric"]}
    while "promote fabric" not in prefect.tasks(
        run["id"], seconds=0
    ):  # the gate; it has no MLflow here and would try again for minutes
        assert time.monotonic() < limit + 300, prefect.logs(run["id"])
        time.sleep(0.3)
    assert {"adapt@fabric", "publish@fabric"} < set(prefect.tasks(run["id"], seconds=0))
    prefect.post(f"/flow_runs/{run['id']}/set_state", state={"type": "CANCELLING", "name": "Cancelling"})
    assert prefect.wait(run["id"])["state_type"] == "CANCELLED"
    (event,) = prefect.post("/events/filter", filter={"event": {"name": ["panda.drift"]}})["events"]
    assert event["resource"]["prefect.resource.id"] == "panda.category.fabric"
    assert "darker" in event["payload"]["findings"] and event["payload"]["shifts"]["brightness"] < -0.5
    (flow_run,) = prefect.post("/flow_runs/filter", flows={"name": {"any_": ["monitor"]}})
    artifacts = {
        a["key"]: a["data"]
        for a in prefect.post("/artifacts/filter", artifacts={"flow_run_id": {"any_": [flow_run["id"]]}})
    }
    assert (
        "| brightness |" in artifacts["monitor-fabric"]
        and json.loads(artifacts["monitor-results"])[0]["state"] == "Drift"
    )
    (scored,) = prefect.post("/artifacts/filter", artifacts={"key": {"any_": ["score-results"]}})
    assert json.loads(scored["data"])[0]["scored"] == 30


def test_a_server_killed_for_20_seconds_during_a_run_loses_nothing(prefect):
    """A stage ends while the server is gone; run, worker and automations go on with the one that takes its place."""
    new_data(prefect.project, "server")
    (prefect.project / "paused").touch()
    run = prefect.press_run()
    prefect.wait_for_line(run, "paused")
    os.killpg(prefect.groups["prefect"].pid, signal.SIGKILL)
    time.sleep(5)
    (prefect.project / "paused").unlink()
    time.sleep(15)
    port = prefect.address.rpartition(":")[2]
    environment = clean_environment() | {"PREFECT_HOME": str(prefect.project / ".prefect")}
    environment |= QUIET | server_settings(prefect.address)
    with open(prefect.project / ".prefect/prefect-again.log", "wb") as log:
        command = [sys.executable, "-m", "flows.server", "127.0.0.1", port]
        prefect.groups["prefect"] = Group(command, env=environment, output=log)
    limit = time.monotonic() + 300
    while True:
        with contextlib.suppress(httpx.TransportError):
            if prefect.http.get("/health").status_code == 200:
                break
        assert time.monotonic() < limit
        time.sleep(0.5)
    ended = prefect.wait(run)
    assert ended["state_type"] == "COMPLETED", (ended["state"]["message"], prefect.logs(run)[-5:])
    assert "up to date" in call("dvc", "repro", cwd=prefect.project)
    assert prefect.wait(prefect.press_run())["state_type"] == "COMPLETED"


def test_cancelling_stops_the_children(prefect):
    new_data(prefect.project, "four")
    (prefect.project / "slow").touch()
    run = prefect.press_run()
    prefect.wait_for_line(run, "waiting")
    assert stage_processes()
    prefect.post(f"/flow_runs/{run}/set_state", state={"type": "CANCELLING", "name": "Cancelling"})
    assert prefect.wait(run)["state_type"] == "CANCELLED"
    assert stage_processes() == []
    with repository_lock("the next run"):
        pass


def test_a_killed_flow_process_is_crashed_at_once_and_the_next_run_succeeds(prefect):
    (prefect.project / "slow").touch()
    run = prefect.press_run()
    prefect.wait_for_line(run, "waiting")
    engine(prefect).kill()
    crashed = prefect.wait(run)
    assert crashed["state_type"] == "CRASHED"
    assert "No heartbeat" not in crashed["state"]["message"], (
        "the worker says so, and nobody waits for missing heartbeats"
    )
    assert stage_processes() == []
    (prefect.project / "slow").unlink()
    assert prefect.wait(prefect.press_run())["state_type"] == "COMPLETED"


@pytest.fixture(scope="module")
def dead_machine(prefect):
    """Worker and flow die at the same moment; nobody is left to say so. Gives the run, a second one that waits, and when they died."""
    new_data(prefect.project, "five")
    (prefect.project / "slow").touch()
    run = prefect.press_run()
    prefect.wait_for_line(run, "waiting")
    os.killpg(prefect.groups["worker"].pid, signal.SIGKILL)
    killed = datetime.now(UTC)
    (prefect.project / "slow").unlink()
    return run, prefect.press_run(), killed


def test_a_failed_stage_is_retried_the_rest_goes_on_and_dvc_repro_resumes(prefect, dead_machine):
    new_data(prefect.project, "three")
    (prefect.project / "down-once-fabric").touch()
    (prefect.project / "down-grid").touch()
    ended = prefect.run_by_hand()
    assert ended["state_type"] == "FAILED"
    assert ended["state"]["message"].startswith("stage publish@grid failed")
    tasks = prefect.tasks(ended["id"])
    assert (tasks["publish@fabric"]["state_type"], tasks["publish@fabric"]["run_count"]) == ("COMPLETED", 2)
    assert (tasks["publish@grid"]["state_type"], tasks["publish@grid"]["run_count"]) == ("FAILED", 2)
    (prefect.project / "down-grid").unlink()
    said = call("dvc", "repro", cwd=prefect.project)
    assert [line for line in said.splitlines() if line.startswith("Running")] == ["Running stage 'publish@grid':"]


def test_changed_parameters_are_an_experiment_and_leave_no_trace(prefect, dead_machine):
    call("git", "commit", "-q", "-am", "New data", cwd=prefect.project)
    ended = prefect.run_by_hand(method="ewc", set_params=["adapt.epochs=7"])
    assert ended["state_type"] == "COMPLETED", ended["state"]["message"]
    assert call("git", "status", "--porcelain", cwd=prefect.project) == ""
    experiment = ended["name"]
    assert experiment in call("dvc", "exp", "list", cwd=prefect.project)
    shown = json.loads(call("dvc", "exp", "show", "--json", cwd=prefect.project))
    recorded = shown[1]["experiments"][0]["revs"][0]["data"]["params"]["params.yaml"]["data"]["adapt"]
    assert (recorded["method"], recorded["epochs"]) == ("ewc", 7)
    said = call("dvc", "repro", cwd=prefect.project)
    assert "Running stage 'adapt" not in said and "Running stage 'validate" not in said, (
        "the results of before come back from the cache"
    )


def test_a_wrong_parameter_is_one_line(prefect, dead_machine):
    ended = prefect.run_by_hand(set_params=["adapt.metod=ewc"])
    assert ended["state_type"] == "FAILED"
    assert "metod" in ended["state"]["message"] and "\n" not in ended["state"]["message"]
    response = prefect.http.post(
        f"/deployments/{prefect.deployment()['id']}/create_flow_run",
        json={"parameters": {"method": "magic"}},
    )
    assert response.status_code == 409, "the form's choices are checked before anything runs"


def test_one_run_at_a_time(prefect, dead_machine):
    with lock_held(prefect.project, "panda-ad run") as pid:
        ended = prefect.run_by_hand()
        assert ended["state_type"] == "FAILED"
        assert f'another run (pid {pid}, "panda-ad run", since ' in ended["state"]["message"]


def test_a_failed_run_is_posted_to_the_webhook_whose_address_stays_secret(prefect, dead_machine, webhook):
    ended = prefect.run_by_hand(categories=["nowhere"])
    assert ended["state_type"] == "FAILED"
    limit = time.monotonic() + 300
    while not (posted := [json.loads(body)["text"] for body in webhook[1] if ended["name"] in body]):
        assert time.monotonic() < limit, webhook[1]
        time.sleep(0.3)
    assert posted == [
        f"retrain run {ended['name']}: Failed: categories: nowhere not in params.yaml, which has fabric, grid"
    ]
    assert SECRET not in "".join(log.read_text() for log in (prefect.project / ".prefect").glob("*.log"))
    assert SECRET not in "".join(prefect.logs(ended["id"]))


def test_a_dead_machine_leaves_no_zombie_and_the_next_run_succeeds(prefect, dead_machine):
    run, following, killed = dead_machine
    crashed = prefect.wait(run, seconds=600)
    assert crashed["state_type"] == "CRASHED"
    assert datetime.fromisoformat(crashed["state"]["timestamp"]) - killed < timedelta(minutes=5)
    assert stage_processes() == []
    environment = clean_environment() | {
        "PREFECT_API_URL": f"{prefect.address}/api",
        "PREFECT_HOME": str(prefect.project / ".prefect"),
    }
    with Group([sys.executable, "-m", "prefect", "worker", "start", "--pool", "panda"], env=environment) as worker:
        assert prefect.wait(following)["state_type"] == "COMPLETED", "it waited for the dead run's place"
        assert worker.running
