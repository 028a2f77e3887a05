# SPDX-License-Identifier: Apache-2.0
"""The paper's benchmark: {data sets} x {methods} x {normal classes} x {seeds}, resumable, one table per data set."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from panda_ad.benchmark.protocols import METHODS, Job, Protocol, Settings, jobs_of
from panda_ad.benchmark.sources import SETS, data_folder, read_set
from panda_ad.errors import UserError
from panda_ad.params import AdaptParams, Params
from panda_ad.params_file import parse_params, read_yaml

if TYPE_CHECKING:
    from panda_ad.benchmark.tables import Row

OUT = Path("build/benchmark")
CACHE = Path(".cache/activations")

Runner = Callable[[Sequence[Sequence[Job]], Settings, Path, Path, Path], None]
"""Runs jobs (a list per data set and class, first things first): jobs, settings, data, out, cache."""

__all__ = ["CACHE", "METHODS", "OUT", "SETS", "benchmark", "make_settings", "make_tables", "plan", "run_jobs"]


def benchmark(
    params: Params,
    datasets: Sequence[str],
    methods: Sequence[str] = METHODS,
    *,
    protocol: Protocol = "one-vs-rest",
    classes: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    train: int | None = None,
    test: int | None = None,
    changes: Sequence[str] = (),
    out: Path = OUT,
    cache: Path = CACHE,
    runner: Runner | None = None,
    mlflow: bool = True,
) -> dict[str, list[Row]]:
    """Run what is missing, write the tables, log them to MLflow.

    Parameters
    ----------
    params : backbone, gallery, adapt and evaluate sections are used.
    datasets : names in `SETS`, or folders of PANDA_BENCH_DATA in one of the generic layouts.
    methods : of METHODS. `compactness` and `ses` share a training run.
    classes : only these normal classes; None: all.
    train, test : at most so many training images per class, and test images per data set; None: all.
    changes : `METHOD.KEY=VALUE`, a key of the adapt section for one method, e.g. `ewc.epochs=20`, `oe.outliers=folder`.
    out : cells, raw features and tables are kept here; a later call computes only what is missing.
    runner : how jobs are run, by default one after another in this process.
    mlflow : log a run per data set.

    Returns
    -------
    Data set -> rows of its table.

    Raises
    ------
    UserError
        A data set is not there, or a name or value is not valid.
    """
    data = data_folder()
    settings = make_settings(params, methods, train, test, changes, data)
    jobs = plan(datasets, data, methods, protocol, classes, seeds)
    (runner or run_jobs)(jobs, settings, data, out, cache)
    return make_tables(jobs, settings, params, out, protocol, mlflow)


def make_settings(
    params: Params,
    methods: Sequence[str],
    train: int | None,
    test: int | None,
    changes: Sequence[str],
    data: Path,
) -> Settings:
    """Return the settings of the parameters and the changes per method; raise UserError if a change is not valid."""
    of_method: dict[str, dict[str, Any]] = {m: {} for m in ("ses", "ewc", "oe")}
    for change in changes:
        name, _, value = change.partition("=")
        method, _, key = name.partition(".")
        if method not in of_method or key not in AdaptParams.model_fields or not value:
            raise UserError(
                f"benchmark: --set {change}: write METHOD.KEY=VALUE, METHOD one of ses, ewc, oe "
                "and KEY of the adapt section"
            )
        of_method[method][key] = read_yaml(value)
    known = data / "tiny_imagenet_10k"
    default = params.adapt.outliers or (str(known) if known.is_dir() else None)
    if "oe" in methods and not (of_method["oe"].setdefault("outliers", default)):
        raise UserError(
            f"benchmark: method oe needs outliers: unpack tiny_imagenet_10k into {data}, or --set oe.outliers=FOLDER"
        )
    adapt: dict[str, AdaptParams] = {}
    for family, method in (("trajectory", "ses"), ("ewc", "ewc"), ("oe", "oe")):
        if method == "oe" and "oe" not in methods:
            continue
        section = {**params.adapt.model_dump(), **of_method[method], "method": method}
        adapt[family] = parse_params({**params.model_dump(), "adapt": section}, f"benchmark, {method}").adapt
    return Settings(params, adapt, train, test)


def plan(
    datasets: Sequence[str],
    data: Path,
    methods: Sequence[str],
    protocol: Protocol,
    classes: Sequence[str] | None,
    seeds: Sequence[int],
) -> list[list[Job]]:
    """Return the jobs, a list per data set and class.

    The first class of each set comes first, then the second of each, so that a run that is cut short covers all sets.
    """
    per_set = [jobs_of(name, read_set(name, data), protocol, methods, seeds, classes) for name in datasets]
    return [jobs for group in zip_longest(*per_set) for jobs in group if jobs]


def run_jobs(jobs: Sequence[Sequence[Job]], settings: Settings, data: Path, out: Path, cache: Path) -> None:
    """Run what is missing in this process, saying on standard error what is done and how long it took."""
    from panda_ad.benchmark.cells import Bench

    missing = [job for group in jobs for job in group if job.missing(out, settings)]
    if not missing:
        return
    bench = Bench(settings, data, out, cache)
    for i, job in enumerate(missing, 1):
        start = time.perf_counter()
        bench.run(job)
        print(f"[{i}/{len(missing)}] {job.label}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)


def make_tables(
    jobs: Sequence[Sequence[Job]], settings: Settings, params: Params, out: Path, protocol: Protocol, mlflow: bool
) -> dict[str, list[Row]]:
    """Write the tables of the finished cells of `jobs`.

    Those still missing are left out, and the table says how many classes it covers.
    """
    from panda_ad.benchmark.cells import read_cell
    from panda_ad.benchmark.tables import log_to_mlflow, write_tables

    cells: dict[str, list[Mapping[str, Any]]] = {}
    for job in (job for group in jobs for job in group):
        for method in job.methods:
            path = job.cell_path(out, method, settings)
            if path.exists():
                cells.setdefault(job.dataset, []).append(read_cell(path))
    result = {}
    for dataset, found in cells.items():
        e = params.evaluate
        result[dataset] = write_tables(dataset, protocol, found, settings, out, e.bootstrap, e.confidence)
        if mlflow:
            log_to_mlflow(dataset, protocol, result[dataset], settings, out)
    return result
