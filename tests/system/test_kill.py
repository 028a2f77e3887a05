# SPDX-License-Identifier: Apache-2.0
"""A stage killed at any moment, and run again, gives what an undisturbed run gives."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from conftest import REPO, make_mvtec
from prefect_project import call, clean_environment

# Data Docs and reports name the time at which they were made; .gitignore is DVC's.
TIMED = re.compile(r"data_docs/|report\.html$|timings/|validation/report\.json$|\.gitignore$")


def make_project(folder: Path) -> Path:
    """A DVC project with this repository's dvc.yaml and one tiny category."""
    folder.mkdir()
    make_mvtec(folder / "data", train=20, good=4, defective=4)
    params = yaml.safe_load((REPO / "params.yaml").read_text(encoding="utf-8"))
    params |= {"dataset": "tiny", "categories": ["nut"]}
    params["backbone"] |= {"input_size": 32}
    params["adapt"] |= {"epochs": 1}
    params["evaluate"] |= {"bootstrap": 20}
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    shutil.copy(REPO / "dvc.yaml", folder)
    shutil.copytree(REPO / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return folder


def outputs(folder: Path) -> dict[str, str]:
    """sha256 of each file below build/ that does not name a time."""
    files = (p for p in (folder / "build").rglob("*") if p.is_file())
    names = {p.relative_to(folder).as_posix(): p for p in files}
    return {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in sorted(names.items()) if not TIMED.search(n)}


def run_stages(folder: Path, how: str) -> None:
    done = subprocess.run(
        [sys.executable, str(REPO / "tests/helpers/kill_points.py"), how],
        cwd=folder,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The last bits depend on the number of threads, and a forked child can only have one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = make_project(tmp_path_factory.mktemp("undisturbed") / "project")
    run_stages(folder, "undisturbed")
    return folder


def test_killed_between_any_two_changes_to_the_disk(undisturbed, tmp_path):
    folder = make_project(tmp_path / "project")
    for note in undisturbed.glob("changes-*"):
        shutil.copy(note, folder)
    run_stages(folder, "killed")
    expected = outputs(undisturbed)
    assert {"build/evaluation/nut/metrics.json", "build/bundle/nut/learned.safetensors"} <= set(expected)
    assert outputs(folder) == expected


def test_dvc_repro_resumes_after_a_killed_stage_and_a_killed_run(undisturbed, tmp_path):
    folder = make_project(tmp_path / "project")
    call("git", "init", "-q", cwd=folder)
    call("dvc", "init", "-q", cwd=folder)
    victims = {"extract": "stage", "adapt": "run", "index": "stage"}
    for stage, victim in victims.items():
        repro = subprocess.Popen(
            ["dvc", "repro", "evaluate"], cwd=folder, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        assert repro.stdout is not None
        said = ""
        for line in repro.stdout:
            said += line
            if line.startswith(f"> python -m panda_ad.stages.{stage}"):
                killed = stage_process(repro.pid, stage)  # while it imports, for a second
                if victim == "run":
                    os.killpg(repro.pid, signal.SIGKILL)
                else:
                    killed.kill()
        assert repro.wait() != 0, said
        assert f"stages.{stage}" in said and "failed" in said or victim == "run"
    said = call("dvc", "repro", "evaluate", cwd=folder)
    assert "Stage 'extract' didn't change, skipping" in said
    assert outputs(folder) == outputs(undisturbed)


def stage_process(run: int, stage: str) -> psutil.Process:
    """The Python process of a stage that `dvc repro`, of process id `run`, is about to start or has started."""
    limit = time.monotonic() + 60
    while True:
        for process in psutil.Process(run).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if process.cmdline()[1:3] == ["-m", f"panda_ad.stages.{stage}"]:
                    return process
        assert time.monotonic() < limit
        time.sleep(0.01)


def on_a_full_disk(folder: Path, full: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command with 1 MB of disk below `full`; skips where this system allows no mounts in a namespace of one's own."""
    (folder / full).mkdir(parents=True, exist_ok=True)
    mount = f'mount -t tmpfs -o size=1m tmpfs "{full}"'
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], cwd=folder, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    script = f'{mount} && exec "$@"'
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", *command],
        cwd=folder,
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def full_disk_project(undisturbed, tmp_path) -> Path:
    folder = tmp_path / "project"
    shutil.copytree(undisturbed, folder)
    return folder


def test_a_full_disk_at_index_is_one_line_and_the_next_run_goes_on(undisturbed, full_disk_project):
    command = ["python", "-m", "panda_ad.stages.index", "nut"]
    done = on_a_full_disk(full_disk_project, "build/bundle", *command)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("panda-ad: index nut: no space left on the disk")
    call(*command, cwd=full_disk_project)
    assert outputs(full_disk_project) == outputs(undisturbed)


def test_a_full_disk_at_publish_is_one_line_and_registers_nothing(full_disk_project):
    command = ["python", "-m", "panda_ad.stages.publish", "nut"]
    done = on_a_full_disk(full_disk_project, "mlartifacts", *command)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "no space left on the disk" in done.stderr.strip().splitlines()[-1].lower()
    versions = "from panda_ad.registry.connection import connect; print(len(connect().search_model_versions()))"
    assert call("python", "-c", versions, cwd=full_disk_project).splitlines()[-1] == "0"
    assert "version 1 @challenger" in call(*command, cwd=full_disk_project)
