# SPDX-License-Identifier: Apache-2.0
"""The benchmark as a Prefect flow: a task per job, on a Dask cluster.

panda-ad benchmark cifar10 --dask tcp://scheduler:8786
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task, unmapped
from prefect.cache_policies import NO_CACHE

from panda_ad.benchmark.cells import Bench
from panda_ad.benchmark.protocols import Job, Settings


@functools.lru_cache(maxsize=1)
def _bench(_settings_key: str, *_where: Path) -> list[Bench]:
    """Return a holder that the first job fills: a worker keeps its backbone, items and caches from job to job."""
    return []


def bench_of(settings: Settings, data: Path, out: Path, cache: Path) -> Bench:
    """Return the worker's Bench for these settings."""
    import os

    import torch

    torch.set_num_threads(
        int(os.environ.get("OMP_NUM_THREADS", "1"))
    )  # a Dask worker per core: more threads would fight
    holder = _bench(repr(settings), data, out, cache)
    if not holder:
        holder.append(Bench(settings, data, out, cache))
    return holder[0]


@task(cache_policy=NO_CACHE, task_run_name="{job.label}")
def prepare(job: Job, settings: Settings, data: Path, out: Path, cache: Path) -> None:
    """Compute frozen activations and pretrained features of a set's or category's test images once.

    All its classes share them.
    """
    bench = bench_of(settings, data, out, cache)
    bench.pretrained(bench.test_items(job)[0])


@task(cache_policy=NO_CACHE, task_run_name="{job.label}", retries=1)
def run_job(job: Job, settings: Settings, data: Path, out: Path, cache: Path) -> list[str]:
    """Compute the missing cells of a job; return the files written."""
    return [str(path) for path in bench_of(settings, data, out, cache).run(job)]


@flow(
    name="benchmark",
    validate_parameters=False,
    description="Jobs of the benchmark on a Dask cluster; finished cells are not run again.",
)
def run_on_cluster(groups: list[list[Job]], settings: Settings, data: Path, out: Path, cache: Path) -> int:
    """Run what is missing; returns the number of cells written. Needs a DaskTaskRunner (see `dask_runner`)."""
    missing = [job for group in groups for job in group if job.missing(out, settings)]
    get_run_logger().info("%d jobs to run", len(missing))
    shared = (unmapped(settings), unmapped(data), unmapped(out), unmapped(cache))
    first = {(job.dataset, job.category): job for job in reversed(missing)}
    prepare.map(list(first.values()), *shared).wait()
    futures = run_job.map(missing, *shared)
    return sum(len(paths) for paths in futures.result())


def dask_runner(address: str | None = None, **cluster_kwargs: Any):
    """Return a runner for `panda_ad.benchmark.benchmark`.

    It uses the Dask scheduler at `address`, else a local cluster of one-threaded processes.
    """
    from prefect_dask import DaskTaskRunner

    def run(jobs: Sequence[Sequence[Job]], settings: Settings, data: Path, out: Path, cache: Path) -> None:
        if address:
            runner = DaskTaskRunner(address=address)
        else:
            local = {"threads_per_worker": 1, "dashboard_address": None, "host": "127.0.0.1", **cluster_kwargs}
            runner = DaskTaskRunner(cluster_kwargs=local)
        groups = [list(group) for group in jobs]
        with _prefect_server():
            run_on_cluster.with_options(task_runner=runner)(
                groups, settings, data.resolve(), out.resolve(), cache.resolve()
            )

    return run


@contextlib.contextmanager
def _prefect_server() -> Iterator[None]:
    """Use the server that PREFECT_API_URL names, else start one for the time being.

    By default each worker would start its own.
    """
    from prefect.logging.handlers import APILogHandler
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import PREFECT_API_URL, temporary_settings

    if PREFECT_API_URL.value():
        yield
        return
    server = SubprocessASGIServer()
    server.start(timeout=180)  # a busy machine needs more than Prefect's 20 seconds
    try:
        with temporary_settings({PREFECT_API_URL: server.api_url}):
            yield
    finally:
        APILogHandler().flush()  # else this process tries for a minute, at its end, to log to a server that is gone
        server.stop()
