"""The command line, `panda-ad`. Exit codes: 0 done, 2 a mistake to mend, 3 the gate refused, 4 another run is at work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from panda_ad.errors import UserError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__, rich_markup_mode=None)

Categories = Annotated[list[str] | None, typer.Option("--category", "-c", help="Only this category (repeatable); default: all of params.yaml.")]


@app.command()
def run() -> None:
    """Pull the data if missing, run what has changed, promote, and say where to look."""
    from panda_ad.run import run

    run()


@app.command()
def summary() -> None:
    """The figures of the last run: metrics, threshold, time and memory per stage, versions, gate."""
    from panda_ad.run import summary

    print(summary())


@app.command()
def score(
    paths: Annotated[list[Path], typer.Argument(help="Images, or folders of images (searched recursively).")],
    model: Annotated[str | None, typer.Option(help="A registered model, e.g. models:/panda-sample-fabric@staging.")] = None,
    bundle: Annotated[Path | None, typer.Option(help="A bundle folder, e.g. build/bundle/fabric.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the verdicts to this CSV file instead of standard output.")] = None,
    heatmaps: Annotated[Path | None, typer.Option(help="Write an overlay of each image's heat map into this folder.")] = None,
    false_alarm_rate: Annotated[float | None, typer.Option(help="Another false-alarm budget than the model's, in (0, 1).")] = None,
) -> None:
    """Verdicts for images: score, p-value, good or defect, and where."""
    from panda_ad.score import score_paths

    score_paths(paths, model, bundle, out, heatmaps, false_alarm_rate)


@app.command()
def promote(
    category: Categories = None,
    to: Annotated[str, typer.Option(help="staging, or champion.")] = "staging",
) -> None:
    """Move an alias to the challenger if the gate lets it through; exit code 3 and the failed rules if not."""
    from panda_ad.params import load_params
    from panda_ad.registry.promote import promote

    for decision in promote(category or load_params().categories, to):
        print(decision)


@app.command()
def rollback(
    category: Annotated[str, typer.Argument()],
    to_version: Annotated[int | None, typer.Option(help="This version; default: the one @staging held before.")] = None,
) -> None:
    """Put @staging back to the version it held before, or to a given one."""
    from panda_ad.registry.promote import rollback

    print(rollback(category, to_version))


@app.command()
def ui(
    mlflow_port: Annotated[int, typer.Option(help="Port of the MLflow server on 127.0.0.1.")] = 5000,
    prefect_port: Annotated[int, typer.Option(help="Port of the Prefect server on 127.0.0.1.")] = 4200,
) -> None:
    """Start the MLflow and Prefect servers on loopback with the retrain deployment and a worker, until Ctrl-C."""
    from panda_ad.servers import serve_ui

    serve_ui(mlflow_port=mlflow_port, prefect_port=prefect_port)


def main() -> None:
    """Entry point: a user's mistake is one line and its exit code, never a stack trace."""
    try:
        app()
    except UserError as e:
        print(f"panda-ad: {e}", file=sys.stderr)
        sys.exit(e.exit_code)
    except KeyboardInterrupt:
        print("panda-ad: stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
