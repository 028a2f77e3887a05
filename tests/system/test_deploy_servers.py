# SPDX-License-Identifier: Apache-2.0
"""The services of deploy/compose.yaml, each with its own command, environment and health check, without containers.

PostgreSQL is real; a folder stands for MinIO. Names and ports of containers become free ports of this machine.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import time
import urllib.request
from contextlib import ExitStack, contextmanager

import postgres
import pytest
import yaml
from monitor_project import make_monitored
from prefect_project import ROOT, clean_environment
from test_registry_server import free_port

from panda_ad.registry.promote import promote
from panda_ad.stages.publish import main as publish
from panda_ad.system.processes import Group

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        postgres.program("initdb") is None, reason="no PostgreSQL server here (initdb): apt-get install postgresql"
    ),
]
SERVICES = yaml.safe_load((ROOT / "deploy/compose.yaml").read_text())["services"]
DOCKERFILE = (ROOT / "deploy/Dockerfile").read_text()
NAMES = {"mlflow": 5000, "prefect": 4200, "serve": 5001, "inspect": 5002}


class Compose:
    """Runs services as compose would, in a checkout that stands for /plant."""

    def __init__(self, plant, database, stack):
        self.plant, self.stack = plant, stack
        self.ports = {name: free_port() for name in (*NAMES, "worker")}
        self.values = {"POSTGRES_PASSWORD": database.password, "PANDA_MODEL": "models:/panda-sample-fabric@staging"}
        self.values |= {"PANDA_INSPECT_DECIDE": "d" * 16, "PANDA_INSPECT_PROMOTE": "p" * 16, "MINIO_PASSWORD": "unused"}
        self.changes = {"@postgres/": f"@127.0.0.1:{database.port}/", "0.0.0.0": "127.0.0.1", "/plant": str(plant)}
        self.changes |= {"s3://mlflow": str(plant.parent / "bucket")}
        for name, port in NAMES.items():
            self.changes[f"http://{name}:{port}"] = f"http://127.0.0.1:{self.ports[name]}"
            self.changes[str(port)] = str(self.ports[name])

    def here(self, text):
        text = re.sub(r"\$\{(\w+)[^}]*\}", lambda found: self.values[found[1]], str(text))
        for there, here in self.changes.items():
            text = text.replace(there, here)
        return text

    def environment(self, name):
        own = {key: self.here(value) for key, value in SERVICES[name].get("environment", {}).items()}
        return clean_environment() | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"} | own

    def words(self, name):
        first = instruction("ENTRYPOINT") if name == "serve" else []
        return [self.here(word) for word in [*first, *SERVICES[name].get("command", instruction("CMD"))]]

    def once(self, name):
        done = subprocess.run(
            self.words(name), cwd=self.plant, env=self.environment(name), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def up(self, name, **more):
        log = self.stack.enter_context(open(self.plant.parent / f"{name}.log", "w+b"))  # noqa: SIM115, the stack closes it
        group = Group(self.words(name), cwd=self.plant, env=self.environment(name) | more, output=log)
        return self.stack.enter_context(group), log

    def healthy(self, name, group, log, check=None):
        """Wait until the health check of compose, or else of the image, is content."""
        check = check or SERVICES[name]["healthcheck"]["test"][1:]
        limit = time.monotonic() + 180
        while subprocess.run(
            [self.here(word) for word in check], env=self.environment(name), capture_output=True, check=False
        ).returncode:
            assert group.running and time.monotonic() < limit, log.seek(0) or log.read().decode()[-3000:]
            time.sleep(0.5)


def instruction(name):
    """The words of the Dockerfile's last ENTRYPOINT or CMD (that of the worker)."""
    return json.loads(re.findall(rf"(?m)^{name} (.*)$", DOCKERFILE)[-1])


def image_check(port):
    """The image's health check on a port."""
    (found,) = re.findall(rf'(?m)^ +CMD (\["python".*:{port}/.*)$', DOCKERFILE)
    return json.loads(found)


@contextmanager
def compose(plant):
    with postgres.running() as database, ExitStack() as stack:
        for name in re.findall(r"CREATE DATABASE (\w+)", (ROOT / "deploy/databases.sql").read_text()):
            database.create(name)
        yield Compose(plant, database, stack), database


def get(address, data=None):
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


def test_all_services_come_up_and_answer(tmp_path, tmp_path_factory, monkeypatch):
    plant = make_monitored(tmp_path_factory, tmp_path / "plant")
    shutil.copytree(ROOT / "flows", plant / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "prefect.yaml", plant)
    with compose(plant) as (system, database):
        mlflow = system.up("mlflow", MLFLOW_S3_ENDPOINT_URL="")
        system.healthy("mlflow", *mlflow)
        request = urllib.request.Request(
            f"http://127.0.0.1:{system.ports['mlflow']}/ajax-api/2.0/mlflow/experiments/search?max_results=1"
        )
        request.add_header("Host", "elsewhere.example")
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(request, timeout=10)

        monkeypatch.chdir(plant)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{system.ports['mlflow']}")
        publish("fabric")
        assert promote()[0].outcome == "promoted"
        assert any((tmp_path / "bucket").rglob("bundle.json")), "the server keeps the artifacts where compose says"

        serve = system.up("serve")
        system.healthy("serve", *serve, check=image_check(5001))
        picture = base64.b64encode(next((plant / "data/fabric/test/good").iterdir()).read_bytes()).decode()
        answer = json.loads(
            get(f"http://127.0.0.1:{system.ports['serve']}/invocations", json.dumps({"inputs": [picture]}).encode())
        )
        assert isinstance(answer["predictions"][0]["score"], float)

        inspect = system.up("inspect")
        system.healthy("inspect", *inspect)
        assert database.rows("SELECT count(*) FROM panda_decisions", "decisions") == [(0,)]

        prefect = system.up("prefect")
        system.healthy("prefect", *prefect)
        system.once("deploy")
        system.once("deploy")
        worker = system.up("worker", PREFECT_WORKER_WEBSERVER_PORT=str(system.ports["worker"]))
        system.changes["8080"] = str(system.ports["worker"])
        system.healthy("worker", *worker, check=image_check(8080))
        assert database.rows("SELECT count(*) FROM deployment", "prefect") == [(3,)]
