# SPDX-License-Identifier: Apache-2.0
"""`panda-ad score --parts`: verdicts for very many pictures, here or on a Dask cluster, with nothing done twice.

A task scores one part (`PART` pictures) and writes it. What a folder of parts holds is not scored again, so that a
killed worker costs its part, and a killed client goes on where it was. A score does not depend on who computes it: a
worker with other versions of what decides it refuses.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, lru_cache
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import panda_ad
from panda_ad.commands import parts
from panda_ad.commands.parts import Source
from panda_ad.commands.score import named
from panda_ad.data.damage import doubt
from panda_ad.data.images import Decoding, batches, picture, pixel_count
from panda_ad.data.listing import one_line
from panda_ad.errors import UserError
from panda_ad.registry.load import load_model
from panda_ad.scoring.checksums import CHECKSUMS
from panda_ad.scoring.detector import Detector
from panda_ad.scoring.verdict import Verdict
from panda_ad.system.cores import side_by_side
from panda_ad.system.processes import keep_freed_memory

if TYPE_CHECKING:
    from distributed import Client

_READ_TOGETHER = 8
_WAIT_SECONDS = 60
_AHEAD = 4  # tasks for each worker that are handed out before they are wanted
_DECIDING = ("faiss-cpu", "numpy", "onnxruntime", "pillow")


@dataclass(frozen=True)
class Job:
    """What all tasks share.

    Attributes
    ----------
    folder : of the parts.
    identity : of the model, as the parts keep it.
    model, bundle, false_alarm_rate : as `load_model` takes them; a number in place of an alias.
    versions : of what decides a score.
    """

    folder: str
    identity: str
    model: str | None
    bundle: str | None
    false_alarm_rate: float | None
    versions: tuple[str, ...]


@dataclass(frozen=True)
class Done:
    """What became of some pictures: how many were judged and called defect, and a line for each that was not read."""

    images: int = 0
    alarms: int = 0
    problems: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()

    def __add__(self, other: Done) -> Done:
        """Join two counts."""
        return Done(
            self.images + other.images, self.alarms + other.alarms,
            self.problems + other.problems, self.failed + other.failed,
        )  # fmt: skip


def score_parts(
    paths: Sequence[str],
    model: str | None,
    bundle: Path | None,
    folder: str,
    false_alarm_rate: float | None = None,
    cluster: str | None = None,
) -> None:
    """Do what the command line does: score what has no row yet, with words.

    Parameters
    ----------
    paths : files, folders and addresses.
    model, bundle, false_alarm_rate : as `load_model` takes them.
    folder : of the parts, or its address.
    cluster : None: here. A number: that many processes here. Else the address of a Dask scheduler.

    Raises
    ------
    UserError
        Nothing to score, a folder of another model's parts, a cluster that cannot be had; at the end, parts that
        failed and pictures that could not be read.
    """
    pictures = parts.sources(paths)
    job = make_job(model, bundle, folder, false_alarm_rate)
    known = parts.judged(folder, job.identity)
    rest = [p for p in pictures if Source(one_line(p.path), p.state) not in known]
    with _workers(cluster) as client:
        done = _run(job, rest, client)
    before = f", {len(pictures) - len(rest)} known" if len(rest) < len(pictures) else ""
    print(f"{done.images} images scored, {done.alarms} called defect{before}: {folder}", file=sys.stderr)
    if done.failed:
        raise UserError(f"{len(done.failed)} parts are missing: {named(done.failed)}; run the command again")
    if done.problems:
        raise UserError(f"{len(done.problems)} of {len(rest)} files could not be read: {named(done.problems)}")


def make_job(model: str | None, bundle: Path | None, folder: str, false_alarm_rate: float | None = None) -> Job:
    """Load the model once, here, and say what all tasks share. UserError as `load_model` raises it."""
    loaded = load_model(model, bundle, false_alarm_rate)
    if loaded.note:
        print(f"{model}: {loaded.note}", file=sys.stderr)
    limit = loaded.detector.threshold()
    if not limit.enough:
        print(f"panda-ad: {limit.message}", file=sys.stderr)
    if bundle is not None:
        bundle = bundle.resolve()
        name = f"bundle {hashlib.sha256((bundle / CHECKSUMS).read_bytes()).hexdigest()[:16]}"
    else:
        model, name = f"models:/{loaded.name}/{loaded.version}", f"{loaded.name} version {loaded.version}"
    if not parts.is_address(folder):
        folder = str(Path(folder).resolve())
    identity = f"{name}, threshold {limit.value!r}"
    return Job(folder, identity, model, None if bundle is None else str(bundle), false_alarm_rate, versions())


@cache
def versions() -> tuple[str, ...]:
    """Return the versions of what decides a score, those of this process."""
    return (f"panda-ad {panda_ad.__version__}", *(f"{name} {version(name)}" for name in _DECIDING))


def _run(job: Job, rest: Sequence[Source], client: Client | None) -> Done:
    """Score shard by shard, with a bar."""
    from tqdm import tqdm

    total = Done()
    with tqdm(total=len(rest), desc="score", unit="img", disable=None) as bar:
        found = _here(job, rest) if client is None else _on_cluster(client, job, rest)
        for count, done in found:
            total += done
            bar.update(count)
    return total


def _here(job: Job, rest: Sequence[Source]) -> Iterator[tuple[int, Done]]:
    for shard in parts.shards(rest):
        yield len(shard), score_shard(job, shard)


def _on_cluster(client: Client, job: Job, rest: Sequence[Source]) -> Iterator[tuple[int, Done]]:
    """Score on a cluster; some tasks for each worker are under way at a time, however many there are in all.

    A task that fails otherwise than by a mistake of the user's, as one whose workers have died three times, costs its
    part alone.
    """
    from distributed import as_completed
    from distributed.comm import CommClosedError

    def submit(shard: list[Source]) -> Any:
        future = client.submit(score_shard, job, shard, pure=False)
        sizes[future.key] = len(shard)
        return future

    sizes: dict[str, int] = {}
    waiting = parts.shards(rest)
    try:
        client.wait_for_workers(1, timeout=_WAIT_SECONDS)
    except TimeoutError:
        raise UserError(f"--cluster: no worker has joined the scheduler in {_WAIT_SECONDS} s; start some") from None
    first = [submit(shard) for shard in islice(waiting, _AHEAD * len(client.scheduler_info()["workers"]))]
    running = as_completed(first)
    for future in running:
        try:
            done = future.result()
        except UserError:
            raise
        except (CancelledError, CommClosedError):  # the connection is lost, and with it what was under way
            raise UserError("--cluster: the scheduler is gone; what is written stays, run the command again") from None
        except Exception as e:
            done = Done(failed=(f"{type(e).__name__}: {' '.join(str(e).split())[:200]}",))
        yield sizes.pop(future.key), done
        for shard in islice(waiting, 1):
            running.add(submit(shard))


@contextmanager
def _workers(cluster: str | None) -> Iterator[Client | None]:
    """Give a cluster's client; None where work stays in this process. UserError where there is none."""
    if cluster is None:
        yield None
        return
    try:
        from distributed import Client, LocalCluster
    except ImportError:
        raise UserError("--cluster: needs the package distributed; pip install 'panda-ad[pipeline]'") from None
    for name in ("distributed", "distributed.client"):  # what is wrong is said in a line, without Dask's traces
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if cluster.isdecimal() and int(cluster) > 0:
        one = {"threads_per_worker": 1, "env": {"OMP_NUM_THREADS": "1"}}  # each process has a core
        local = {"n_workers": int(cluster), "host": "127.0.0.1", "dashboard_address": None, "silence_logs": 50}
        with LocalCluster(**local, **one) as started, Client(started) as client:
            yield client
        return
    if "://" not in cluster:
        raise UserError(f"--cluster {cluster}: a number of processes, or a scheduler's address, as tcp://host:8786")
    try:
        client = Client(cluster, timeout=20)
    except (OSError, ValueError, TimeoutError) as e:
        raise UserError(f"--cluster {cluster}: no scheduler answers ({' '.join(str(e).split())[:160]})") from None
    with client:
        yield client


def score_shard(job: Job, shard: Sequence[Source]) -> Done:
    """Score the pictures of a part and write it. UserError where the model or the versions here are others."""
    if (here := versions()) != job.versions:
        other = [f"{b} here, {a} there" for a, b in zip(job.versions, here, strict=True) if a != b]
        raise UserError(f"worker {os.uname().nodename}: {'; '.join(other)}; its scores may differ")
    detector = _detector(job.model, job.bundle, job.false_alarm_rate)
    limit = detector.threshold().value
    rows: list[dict[str, Any]] = []
    for group in parts.shards(shard, _READ_TOGETHER):
        rows += _judge(detector, limit, group)
    parts.write_part(job.folder, parts.part_name(shard), job.identity, rows)
    problems = tuple(row["problem"] for row in rows if row["decision"] == "unreadable")
    return Done(len(rows) - len(problems), sum(row["decision"] == "defect" for row in rows), problems)


@lru_cache(maxsize=1)
def _detector(model: str | None, bundle: str | None, false_alarm_rate: float | None) -> Detector:
    keep_freed_memory()  # Dask has its workers give it back at once: a third of the time
    return load_model(model, None if bundle is None else Path(bundle), false_alarm_rate).detector


def _judge(detector: Detector, limit: float, group: Sequence[Source]) -> list[dict[str, Any]]:
    """Return the rows of some pictures, in order."""
    decoding = Decoding.of(detector.config)
    read = list(zip(group, parts.contents(group, decoding), strict=True))
    pictures = batches(read, lambda item: pixel_count(item[1]) if isinstance(item[1], bytes) else 0)
    return list(chain.from_iterable(_rows(detector, limit, batch, decoding) for batch in pictures))


def _rows(
    detector: Detector, limit: float, batch: Sequence[tuple[Source, bytes | str]], decoding: Decoding
) -> list[dict[str, Any]]:
    def decoded(item: tuple[Source, bytes | str]) -> tuple[dict[str, Any], Any]:
        source, data = item
        name = one_line(source.path)
        row: dict[str, Any] = {"path": name, "state": source.state, "time": datetime.now(UTC)}
        try:
            if isinstance(data, str):
                raise UserError(data)
            row["sha256"] = hashlib.sha256(data).hexdigest()
            rgb = picture(data, name, decoding=decoding).rgb
        except UserError as e:
            return row | {"decision": "unreadable", "problem": str(e)}, None
        return row | {"warning": doubt(data, rgb)}, rgb

    opened = side_by_side(decoded, batch)
    verdicts = iter(detector.score([rgb for _, rgb in opened if rgb is not None]))
    return [row if rgb is None else row | _columns(next(verdicts), limit) for row, rgb in opened]


def _columns(verdict: Verdict, limit: float) -> dict[str, Any]:
    whole, worst = verdict.components or (None, None)
    decision = "defect" if verdict.anomalous else "good"
    numbers = {"score": verdict.score, "p_value": verdict.p_value, "threshold": limit}
    return {**numbers, "decision": decision, "whole_image": whole, "worst_spot": worst}
