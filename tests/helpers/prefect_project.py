# SPDX-License-Identifier: Apache-2.0
"""For the tests of the Prefect side: a small DVC project with this repository's flows, real stages of a second each, and its server's API."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from shared import copied, made_once

from panda_ad.commands.servers import running_servers

ROOT = Path(__file__).parents[2]
BIN = str(Path(sys.executable).parent)

# Stages look at files that DVC does not know of, so that a test can make one slow or fail.
DVC_YAML = """
stages:
  validate:
    cmd: mkdir -p build && cat data/images > build/manifest && echo validated
    deps: [data]
    outs: [build/manifest]
  adapt:
    matrix: {category: [fabric, grid]}
    cmd:
      - if [ -e slow ]; then echo waiting; sleep 98765; fi
      - if [ -e paused ]; then echo paused; while [ -e paused ]; do sleep 0.5; done; fi
      - cat build/manifest > build/adapt-${item.category}
      - echo ${adapt.method} ${adapt.epochs} >> build/adapt-${item.category}
      - echo "adapted ${item.category}"
    params: [adapt.method, adapt.epochs]
    deps: [build/manifest]
    outs: ["build/adapt-${item.category}"]
  publish:
    matrix: {category: [fabric, grid]}
    cmd:
      - echo once >> attempts-${item.category}
      - if [ -e down-once-${item.category} ]; then rm down-once-${item.category}; echo no server; exit 9; fi
      - if [ -e down-${item.category} ]; then echo no server; exit 9; fi
      - mkdir -p build/publish && echo "{\\"prefect_run\\":\\"$PANDA_PREFECT_RUN\\"}" > build/publish/${item.category}.json
    meta: {retries: 1}
    deps: ["build/adapt-${item.category}"]
    outs: ["build/publish/${item.category}.json": {cache: false}]
"""


def clean_environment() -> dict[str, str]:
    """The environment without servers, locks and settings of whoever runs the tests, `make test` among them."""
    theirs = ("PREFECT_", "MLFLOW_", "PANDA_", "DVC_", "MAKE", "MFLAGS")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(theirs)}
    return kept | {
        "PATH": os.pathsep.join([BIN, kept.get("PATH", os.defpath)]),
        "DVC_NO_ANALYTICS": "1",
        "DO_NOT_TRACK": "true",
    }


def call(*command: str, cwd: Path, check: bool = True) -> str:
    """Run a command to its end; stdout and stderr together."""
    result = subprocess.run(
        command,
        cwd=cwd,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert not check or result.returncode == 0, result.stdout
    return result.stdout


def make_project(factory: pytest.TempPathFactory, folder: Path) -> Path:
    """A git and DVC repository in `folder`, committed, nothing run yet."""
    return copied(made_once(factory, "project", _make_project), folder)


def finished_project(factory: pytest.TempPathFactory, folder: Path) -> Path:
    """The same after `dvc repro`, with dvc.lock committed."""

    def make(at: Path) -> None:
        make_project(factory, at)
        call("dvc", "repro", "-q", cwd=at)
        call("git", "add", "dvc.lock", cwd=at)
        call("git", "commit", "-q", "-m", "Run", cwd=at)

    return copied(made_once(factory, "finished project", make), folder)


def _make_project(folder: Path) -> None:
    folder.mkdir()
    shutil.copytree(ROOT / "flows", folder / "flows", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("prefect.yaml", "params.yaml"):
        shutil.copy(ROOT / name, folder / name)
    params = (folder / "params.yaml").read_text()
    (folder / "params.yaml").write_text(re.sub(r"(?m)^categories:.*", "categories: [fabric, grid]", params))
    (folder / "dvc.yaml").write_text(DVC_YAML)
    (folder / "data").mkdir()
    (folder / "data/images").write_text("one\n")
    ignored = ["/data", "/build", "/.cache", "/.prefect", "/slow", "/paused", "/down-*", "/attempts-*", "__pycache__"]
    (folder / ".gitignore").write_text("\n".join(ignored) + "\n")
    call("git", "init", "-q", cwd=folder)
    call("git", "config", "user.email", "test@example.org", cwd=folder)
    call("git", "config", "user.name", "test", cwd=folder)
    call("dvc", "init", "-q", cwd=folder)
    (folder / ".dvc/config").write_text("[core]\n    analytics = false\n")
    call("dvc", "add", "-q", "data", cwd=folder)
    call("git", "add", "-A", cwd=folder)
    call("git", "commit", "-q", "-m", "A project", cwd=folder)


@contextlib.contextmanager
def lock_held(project: Path, command: str) -> Iterator[int]:
    """Another process that holds the project's lock; gives its id."""
    code = f"import time; from panda_ad.system.lock import repository_lock\nwith repository_lock({command!r}): print('held', flush=True); time.sleep(3600)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=project, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            yield holder.pid
        finally:
            holder.kill()


def new_data(project: Path, text: str) -> None:
    """Change the data, so that every stage has work."""
    (project / "data/images").write_text(text + "\n")
    call("dvc", "add", "-q", "data", cwd=project)


ENDED = {"COMPLETED", "FAILED", "CANCELLED", "CRASHED"}


def server_errors(project: Path) -> str:
    """What the running Prefect server of `project` has logged of errors, with their traces; '' is as it should be."""
    found = []
    for log in sorted((project / ".prefect").glob("prefect*.log")):
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        first = next((n for n, line in enumerate(lines) if re.search(r"\b(ERROR|CRITICAL)\b|^Traceback", line)), None)
        if first is not None:
            found += [f"{log.name}:", *lines[first : first + 80]]
    return "\n".join(found)


@contextlib.contextmanager
def servers(project: Path, say=lambda line: None, **environment: str):
    """`make ui` in `project` without its last line, as a Prefect; fails where Prefect's server has logged an error.

    Parameters
    ----------
    environment : variables beside `clean_environment()`; MLFLOW_TRACKING_URI="http://127.0.0.1:9" leaves MLflow out.
    """
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(project):
        for name in set(os.environ) - set(clean_environment()):
            patch.delenv(name)
        for name, value in (clean_environment() | environment).items():
            patch.setenv(name, value)
        with running_servers(say=say) as (addresses, groups):
            yield Prefect(addresses, project, groups)
            errors = server_errors(
                project
            )  # before it is stopped: what it then cannot write any more, it logs as errors
            assert not errors, errors


class Prefect:
    """The few calls of Prefect's API that its UI makes."""

    def __init__(self, addresses, project, groups):
        self.address, self.mlflow, self.project, self.groups = addresses.prefect, addresses.mlflow, project, groups
        self.http = httpx.Client(base_url=f"{self.address}/api", timeout=120, trust_env=False)

    def post(self, path, **body):
        return self.http.post(path, json=body).raise_for_status().json()

    def get(self, path):
        return self.http.get(path).raise_for_status().json()

    def deployment(self, name="retrain"):
        return self.get(f"/deployments/name/{name}/{name}")

    def change_schedule(self, name, **change):
        """What the switch beside a schedule does, with `active`; the deployment has one."""
        deployment = self.deployment(name)
        path = f"/deployments/{deployment['id']}/schedules/{deployment['schedules'][0]['id']}"
        self.http.patch(path, json=change).raise_for_status()

    def upcoming(self, name):
        """Runs of a deployment that are scheduled, the next one first."""
        return self.post(
            "/flow_runs/filter",
            deployments={"name": {"any_": [name]}},
            flow_runs={"state": {"type": {"any_": ["SCHEDULED"]}}},
            sort="EXPECTED_START_TIME_ASC",
        )

    def press_run(self, **parameters):
        deployment = self.deployment()["id"]
        return self.post(
            f"/deployments/{deployment}/create_flow_run",
            parameters={"promote": False, **parameters},
            state={"type": "SCHEDULED"},
        )["id"]

    def run_by_hand(self, **parameters):
        """`python -m flows.retrain` with parameters; returns the finished flow run."""
        code = (
            f"from flows.retrain import retrain\nretrain(return_state=True, **{ ({'promote': False} | parameters)!r})"
        )
        environment = clean_environment() | {
            "PREFECT_API_URL": f"{self.address}/api",
            "PREFECT_HOME": str(self.project / ".prefect"),
        }
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=self.project, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        (run,) = self.post(
            "/flow_runs/filter", sort="START_TIME_DESC", limit=1, flow_runs={"deployment_id": {"is_null_": True}}
        )
        return run

    def wait(self, run, states=frozenset(ENDED), seconds=300.0):
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            flow_run = self.get(f"/flow_runs/{run}")
            if flow_run["state_type"] in states:
                return flow_run
            time.sleep(0.3)
        raise AssertionError(
            f"still {flow_run['state_name']} ({flow_run['state']['message']}) after {seconds} s, {self.logs(run)[-5:]}"
        )

    def tasks(self, run, seconds=120.0, count=1):
        """At least `count` task runs by name, ended or never to start; their events arrive a moment after the flow's end."""
        limit = time.monotonic() + seconds
        while True:
            found = self.post("/task_runs/filter", flow_runs={"id": {"any_": [run]}})
            settled = len(found) >= count and all(
                t["state_type"] in ENDED or t["state_name"] == "NotReady" for t in found
            )
            if settled or time.monotonic() > limit:
                return {t["name"]: t for t in found}
            time.sleep(0.3)

    def logs(self, run):
        return [
            entry["message"]
            for entry in self.post("/logs/filter", logs={"flow_run_id": {"any_": [run]}}, sort="TIMESTAMP_ASC")
        ]

    def wait_for_line(self, run, line, seconds=300.0):
        limit = time.monotonic() + seconds
        while line not in self.logs(run):
            assert time.monotonic() < limit, self.logs(run)
            time.sleep(0.3)
