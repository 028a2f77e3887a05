# SPDX-License-Identifier: Apache-2.0
"""Command `panda-ad benchmark`: the paper's tables.

Options and words; what they do is imported when they run, so that the help is there at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def benchmark(
    datasets: Annotated[
        list[str],
        typer.Argument(
            help="cifar10, cifar100, fashion_mnist, cats_vs_dogs, flowers102, cub, dior, wbc, mvtec, "
            "or a folder's name."
        ),
    ],
    method: Annotated[
        list[str] | None, typer.Option("--method", "-m", help="Only this method (repeatable); default: all.")
    ] = None,
    normal: Annotated[
        list[str] | None, typer.Option("--class", help="Only this normal class or category (repeatable); default: all.")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seed (repeatable); default: 0.")] = None,
    train: Annotated[int | None, typer.Option(help="At most so many training images per class; default: all.")] = None,
    test: Annotated[int | None, typer.Option(help="At most so many test images per data set; default: all.")] = None,
    leave_one_out: Annotated[
        bool, typer.Option("--leave-one-out", help="All classes but one are normal together.")
    ] = False,
    size: Annotated[int | None, typer.Option(help="Network input, pixels; default: params.yaml's.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", help="METHOD.KEY=VALUE of the adapt section, e.g. ewc.epochs=20 (repeatable)."),
    ] = None,
    dask: Annotated[
        str | None,
        typer.Option(help="Run on the Dask scheduler at this address; 'local' starts a cluster on this machine."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of results; what it holds is not computed again.")] = Path(
        "build/benchmark"
    ),
    mlflow: Annotated[bool, typer.Option(help="Log the tables to MLflow.")] = True,
) -> None:
    """Run the paper's benchmark, on PANDA_BENCH_DATA.

    Resumes where it stopped, and writes a table per data set.
    """
    from panda_ad.benchmark.runner import METHODS
    from panda_ad.benchmark.runner import benchmark as run_benchmark
    from panda_ad.params_file import load_params, parse_params

    params = load_params()
    if size is not None:
        values = params.model_dump()
        values["backbone"]["input_size"] = size
        params = parse_params(values, "--size")
    runner = None
    if dask is not None:
        sys.path.insert(0, str(Path.cwd()))  # flows/ belongs to the repository, not to the installed package
        from flows.benchmark import dask_runner

        runner = dask_runner(None if dask == "local" else dask)
    run_benchmark(
        params,
        datasets,
        method or METHODS,
        protocol="leave-one-out" if leave_one_out else "one-vs-rest",
        classes=normal,
        seeds=seed or [0],
        train=train,
        test=test,
        changes=changes or [],
        out=out,
        runner=runner,
        mlflow=mlflow,
    )
    for path in sorted(out.glob("*.md")):
        if path.stem.removesuffix("-leave-one-out") in datasets:
            print(path.read_text())
