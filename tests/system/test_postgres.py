# SPDX-License-Identifier: Apache-2.0
"""Registry, decisions and Prefect on a real PostgreSQL, used by two clones or processes at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import postgres
import prefect_project
import pytest
from registry_project import NAME, make_project
from test_registry_server import free_port, serving

from panda_ad.errors import Unavailable
from panda_ad.inspect.decisions import AlreadyDecided, Subject, open_decisions
from panda_ad.registry import audit
from panda_ad.registry.connection import DEFAULTS, connect

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        postgres.program("initdb") is None, reason="no PostgreSQL server here (initdb): apt-get install postgresql"
    ),
]

START = """
import json, os, sys, time
from pathlib import Path


def together(step):
    Path(f"../{step}.{Path.cwd().name}").touch()  # each clone says that it is there, and waits for the other
    while not all(Path(f"../{step}.{name}").exists() for name in ("one", "two")):
        time.sleep(0.005)


def said(what, *values):
    print(json.dumps([what, *values]), flush=True)

"""

PUBLISH = """
from registry_project import retrained
from panda_ad.errors import UserError
from panda_ad.registry.promote import promote
from panda_ad.stages.publish import main as publish

here = Path.cwd()
for number in range(2):
    retrained(here, weights=f"{here.name} {number}".encode())
    together(f"publish {number}")
    publish("fabric")
    said("published", json.loads(Path("build/publish/fabric.json").read_text()))
    try:
        said(promote()[0].outcome)
    except UserError as e:
        said("refused", str(e))
"""

ROLLBACK = """
from panda_ad.errors import UserError
from panda_ad.registry.promote import rollback

for number in range(12):
    together(f"rollback {number}")
    try:
        said("moved", rollback("fabric", to_version=sys.argv[1 + number % 2]).version)
    except UserError as e:
        said("refused", str(e))
"""

DECIDE = """
import socket
from panda_ad.inspect.decisions import AlreadyDecided, Subject, open_decisions

me = Path.cwd().name
together("open")
table = open_decisions()
for number in range(60):
    subject = Subject("nut", f"{number:064x}", f"{number}.png", "panda-x-nut", "3", 4.5, 4.0)
    if number % 10 == 0:
        together(f"decide {number}")
    try:
        said("decided", number, table.decide(subject, "good" if me == "one" else "defect", "", me, 0).id)
    except AlreadyDecided as e:
        said("told", number, e.standing.who)
table.close()
"""


@pytest.fixture(scope="module")
def server():
    with postgres.running() as found:
        yield found


@pytest.fixture
def clones(tmp_path):
    """Two checkouts ready to publish."""
    return [make_project(tmp_path / name) for name in ("one", "two")]


@contextmanager
def tracking_server(folder, store, monkeypatch):
    """MLflow with its store in PostgreSQL, which keeps the artifacts itself; two workers, as in deploy/compose.yaml."""
    port = free_port()
    folder.mkdir()
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "2"]
    command += ["--artifacts-destination", "kept"]
    variables = {**DEFAULTS, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_BACKEND_STORE_URI": store}
    with serving(folder, port, command, variables):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        yield


def at_once(folders: list[Path], code: str, *arguments: str, **environment: str) -> list[list]:
    """Run code in both folders at the same time; what each said, line by line."""
    paths = [prefect_project.ROOT / "src", prefect_project.ROOT / "tests/helpers"]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), **environment}
    command = [sys.executable, "-W", "ignore", "-c", START + code, *arguments]
    running = [
        subprocess.Popen(command, cwd=folder, env=variables, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for folder in folders
    ]
    try:
        ended = [process.communicate(timeout=600) for process in running]
    finally:
        for process in running:
            process.kill()
    assert [p.returncode for p in running] == [0, 0], ended
    return [[json.loads(line) for line in out.splitlines() if line.startswith("[")] for out, _ in ended]


def test_two_clones_publish_promote_and_roll_back_at_once(server, clones, tmp_path, monkeypatch):
    with tracking_server(tmp_path / "server", server.create("mlflow"), monkeypatch):
        said = at_once(clones, PUBLISH)
        monkeypatch.chdir(clones[0])
        client = connect()
        published = [line[1] for lines in said for line in lines if line[0] == "published"]
        assert len({p["version"] for p in published}) == 4, "each model is a version, none is lost"
        for p in published:
            version = client.get_model_version(NAME, str(p["version"]))
            assert version.tags["panda.bundle"] == p["bundle"] and version.tags["panda.run"] == p["run_id"]
            assert str(client.get_logged_model(version.source.rpartition("/")[2]).status) == "READY"
        moves_are_whole(client)

        first, second = sorted(p["version"] for p in published)[:2]
        said = at_once(clones, ROLLBACK, str(first), str(second))
        moved = [line for lines in said for line in lines if line[0] == "moved"]
        stopped = [line[1] for lines in said for line in lines if line[0] == "refused"]
        assert len(moved) >= 6 and len(moved) + len(stopped) == 24, stopped
        assert all("at the same time" in text or "already" in text for text in stopped), stopped
        history = moves_are_whole(client)
        assert len([m for m in history if m["action"] == "rollback" and m["done"]]) == len(moved)


def moves_are_whole(client) -> list[audit.Move]:
    """Each move begins where the one before ended, nothing moved unrecorded, and the gate's tags are there."""
    model = client.get_registered_model(NAME)
    history = audit.history(model)
    assert [m for m in history if m["action"] == audit.BY_HAND] == []
    assert all(m["done"] and m["who"] and m["when"] and m["why"] for m in history)
    assert [m["from"] for m in history] == [None, *[m["to"] for m in history[:-1]]]
    assert history[-1]["to"] == audit.held(model, "staging")
    for move in history:
        if move["action"] == "promote":
            tags = client.get_model_version(NAME, move["to"]).tags
            assert tags["gate.staging"].startswith("promoted ") and tags["gate.staging.against"] == (
                move["from"] or "none"
            )
            assert any(value.startswith("passed: ") for key, value in tags.items() if key.startswith("gate.staging."))
    return history


def test_two_processes_decide_the_same_images_at_once(server, tmp_path, monkeypatch):
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    address = server.create("decisions")
    said = at_once(folders, DECIDE, PANDA_DECISIONS=address)
    decided = {
        number: who
        for who, lines in zip(("one", "two"), said, strict=True)
        for what, number, _ in lines
        if what == "decided"
    }
    told = {number: other for lines in said for what, number, other in lines if what == "told"}
    assert sorted(decided) == sorted(told) == list(range(60)), "one decides each image, the other one is told"
    assert told == decided and set(decided.values()) == {"one", "two"}

    table = open_decisions(address)
    standing = table.standing("nut")
    assert {int(sha256, 16): d.who for sha256, d in standing.items()} == decided
    last = max((d for d in standing.values() if d.who == "one"), key=lambda d: d.id)
    taken = table.undo("nut", "one")
    assert taken is not None and (taken.label, taken.undoes) == ("undecided", last.id)
    with pytest.raises(AlreadyDecided):
        table.decide(last.subject, "good", "", "two", last.id)
    assert table.decide(last.subject, "defect", "hole", "two", taken.id).kind == "hole"
    table.close()


def test_a_database_that_is_lost_is_one_line_and_the_next_decision_is_taken(server, monkeypatch):
    address = server.create("lost")
    table = open_decisions(address)
    subject = Subject("nut", "0" * 64, "0.png", "panda-x-nut", "3", 4.5, 4.0)
    server.rows("ALTER DATABASE lost ALLOW_CONNECTIONS false")
    server.rows("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = 'lost'")
    with pytest.raises(Unavailable, match="nothing was recorded") as error:
        table.decide(subject, "good", "", "Anna", 0)
    assert "\n" not in str(error.value) and address.split(":")[2].split("@")[0] not in str(error.value)
    server.rows("ALTER DATABASE lost ALLOW_CONNECTIONS true")
    assert table.decide(subject, "good", "", "Anna", 0).id > 0
    table.close()


def test_prefect_on_postgresql_runs_a_deployment(server, tmp_path, tmp_path_factory):
    project = prefect_project.make_project(tmp_path_factory, tmp_path / "plant")
    server.create("prefect")
    variables = {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": server.address("prefect", "asyncpg"),
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
    }
    with prefect_project.servers(project, **variables) as prefect:
        run = prefect.wait(prefect.press_run())
        assert run["state_type"] == "COMPLETED", prefect.logs(run["id"])
    (count,) = server.rows("SELECT count(*) FROM flow_run WHERE state_type = 'COMPLETED'", "prefect")
    assert count[0] == 1, "it was PostgreSQL that kept the run"
