# SPDX-License-Identifier: Apache-2.0
"""Scoring on a Dask cluster: whoever is killed, each picture has one row, and its score is the one of a single process."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from conftest import noise, save
from pyarrow import parquet
from tiny_bundle import make_bundle

from panda_ad.commands.score_parts import score_parts

IMAGES = 700
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Pictures, a bundle, and the rows of one process."""
    folder = tmp_path_factory.mktemp("cluster")
    (folder / "bundle").mkdir()
    make_bundle(folder / "bundle")
    for i in range(IMAGES):
        save(noise(i), folder / "in" / f"{i:03d}.png")
    score_parts([str(folder / "in")], None, folder / "bundle", str(folder / "alone"))
    return folder


def rows_of(folder: Path) -> list[tuple]:
    tables = [parquet.read_table(file).to_pylist() for file in folder.glob("*.parquet")]
    return sorted((row["path"], row["score"], row["p_value"], row["decision"]) for rows in tables for row in rows)


def start(place: Path, out: str, cluster: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "panda_ad.cli", "score", "in", "--bundle", "bundle", "--parts", out]
    return subprocess.Popen([*command, "--cluster", cluster], cwd=place, stderr=subprocess.PIPE, text=True)


def until_parts(folder: Path, count: int, process: subprocess.Popen) -> None:
    until = time.monotonic() + 120
    while len(list(folder.glob("*.parquet"))) < count:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)


def workers(process: subprocess.Popen) -> list[psutil.Process]:
    """Processes that Dask has spawned, those that watch over others left out."""
    return [p for p in psutil.Process(process.pid).children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]


def test_a_killed_worker_costs_nothing(place):
    process = start(place, "two", "2")
    until_parts(place / "two", 2, process)
    workers(process)[0].kill()
    assert process.wait(timeout=180) == 0, process.stderr.read()
    assert f"{IMAGES} images scored" in process.stderr.read()
    assert rows_of(place / "two") == rows_of(place / "alone")


def test_a_killed_client_goes_on_where_it_was(place):
    process = start(place, "killed", "2")
    until_parts(place / "killed", 3, process)
    children = workers(process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(children, timeout=60)  # they end by themselves when their client is gone
    assert not [p for p in children if p.is_running()]
    known = len(rows_of(place / "killed"))
    assert 0 < known < IMAGES
    process = start(place, "killed", "1")
    assert process.wait(timeout=180) == 0
    assert f"{IMAGES - known} images scored" in (said := process.stderr.read()) and f"{known} known" in said
    assert rows_of(place / "killed") == rows_of(place / "alone")


@contextmanager
def cluster(place: Path):
    """Start a scheduler and a worker as Dask's documentation says; gives the scheduler's process and address."""
    environment, file = {**os.environ, "OMP_NUM_THREADS": "1"}, place / "scheduler.json"
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", "0"]
    command += ["--no-dashboard", "--scheduler-file", str(file)]
    scheduler = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    command = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(file), "--nthreads", "1"]
    worker = subprocess.Popen([*command, "--no-dashboard"], env=environment, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not file.exists() and time.monotonic() < until:
            time.sleep(0.1)
        yield scheduler, json.loads(file.read_text())["address"]
    finally:
        for process in (worker, scheduler):
            process.terminate()
            process.wait(timeout=30)


def test_a_scheduler_that_runs_already(place):
    """Its workers may be anywhere; here they are processes of their own."""
    with cluster(place) as (_, address):
        score_parts([str(place / "in")], None, place / "bundle", str(place / "there"), cluster=address)
        assert rows_of(place / "there") == rows_of(place / "alone")


def test_a_scheduler_that_goes_away_is_said_in_a_line(place):
    with cluster(place) as (scheduler, address):
        process = start(place, "gone", address)
        until_parts(place / "gone", 2, process)
        scheduler.kill()
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 2 and "Traceback" not in said, said
    assert "panda-ad: --cluster: the scheduler is gone; what is written stays" in said
    assert set(rows_of(place / "gone")) <= set(rows_of(place / "alone"))
