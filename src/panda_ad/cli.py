# SPDX-License-Identifier: Apache-2.0
"""Visual anomaly detection that runs for years.

Exit codes: 0 done, 2 a mistake to correct, 3 the gate refused, 4 another run is at work, 5 drift found.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from panda_ad.errors import UserError
from panda_ad.system.surroundings import prepare

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__, rich_markup_mode=None
)

Categories = Annotated[
    list[str] | None,
    typer.Option("--category", "-c", help="Only this category (repeatable); default: all of params.yaml."),
]

Category = Annotated[str, typer.Argument(help="A category of params.yaml.")]
Reason = Annotated[str, typer.Option(help="Why, for the record.")]
gallery = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, add_completion=False, help="Look at the gallery in place, teach, undo."
)
app.add_typer(gallery, name="gallery")


@app.command()
def run() -> None:
    """Bring data, pipeline and promotion up to date.

    Pulls the data if missing, runs the stages that have changed, asks the gate, and says where to look.
    """
    from panda_ad.commands.run import run

    run()


@app.command()
def summary() -> None:
    """Show the figures of the last run.

    Metrics, threshold, time and memory per stage, versions, what the gate decided.
    """
    from panda_ad.commands.summary import summary

    print(summary())


@app.command()
def start(
    folder: Annotated[Path, typer.Argument(help="Pictures, sorted into folders (good, bad, test/<kind>) or not.")],
    out: Annotated[Path | None, typer.Option(help="Folder of results.  [default: <name>-start]")] = None,
    good: Annotated[bool, typer.Option("--good", help="Pictures in folders of no telling name are good.")] = False,
    size: Annotated[int, typer.Option(min=64, max=512, help="Network input, pixels; 224 for small defects.")] = 128,
) -> None:
    """Judge a folder of pictures, without a project.

    Learns from the good ones and judges the others; unsorted ones are ranked, the oddest first.
    """
    from panda_ad.commands.start import start

    start(folder, out, good, size)


@app.command()
def score(
    paths: Annotated[list[Path], typer.Argument(help="Images, or folders of images (searched recursively).")],
    model: Annotated[
        str | None, typer.Option(help="A registered model, e.g. models:/panda-sample-fabric@staging.")
    ] = None,
    bundle: Annotated[Path | None, typer.Option(help="A bundle folder, e.g. build/bundle/fabric.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the verdicts to this CSV file instead of standard output.")
    ] = None,
    heatmaps: Annotated[
        Path | None, typer.Option(help="Write an overlay of each image's heat map into this folder.")
    ] = None,
    false_alarm_rate: Annotated[
        float | None, typer.Option(help="Another false-alarm budget than the model's, in (0, 1).")
    ] = None,
    log: Annotated[
        bool, typer.Option("--log", help="Append to the verdict log; what it holds of this version is left out.")
    ] = False,
) -> None:
    """Score images or folders.

    Per image a row: score, p-value, good or defect, threshold, and the box of the region that decided.
    The box needs --heatmaps.
    """
    from panda_ad.commands.score import score_paths
    from panda_ad.system.paths import LOG

    score_paths(paths, model, bundle, out, heatmaps, false_alarm_rate, LOG if log else None)


@app.command()
def monitor(
    category: Categories = None,
    alias: Annotated[str, typer.Option(help="The registered version whose verdicts are looked at.")] = "staging",
    acknowledge: Annotated[
        bool, typer.Option("--acknowledge", help="End the open alarms: what images are like now is known and accepted.")
    ] = False,
    reason: Annotated[str, typer.Option(help="With --acknowledge: why, for the record.")] = "",
) -> None:
    """Test the logged images for a change.

    A change is an alarm once, with the time since when. Then images are compared with those since the change.
    Writes a report per category into monitoring/reports.

    Exit code 0: no new change. 5: a change. 2: no change found, but a category could not be checked.
    """
    from panda_ad.commands.audit import confirmed_good
    from panda_ad.monitor.check import DRIFT_FOUND, acknowledge_alarms, monitor

    if reason and not acknowledge:
        raise UserError("--reason: goes with --acknowledge")
    if acknowledge:
        for line in acknowledge_alarms(category or [], reason):
            print(line)
        return
    checks, problems = monitor(category or [], alias, confirmed_good)
    for check in checks:
        print(check)
    for problem in problems:
        print(f"panda-ad: {problem}", file=sys.stderr)
    if any(check.alarms for check in checks):
        raise typer.Exit(DRIFT_FOUND)
    if problems:
        raise typer.Exit(UserError.exit_code)


@app.command()
def ingest(
    category: Annotated[str, typer.Option("--category", "-c", help="What they show, one of params.yaml's categories.")],
    paths: Annotated[
        list[Path] | None, typer.Argument(help="New images, or folders of images (searched recursively).")
    ] = None,
    label: Annotated[
        Literal["good", "defect"], typer.Option(help="Good images go to train, defects to test.")
    ] = "good",
    kind: Annotated[str | None, typer.Option(help="Kind of defect, the name of its folder.  [default: defect]")] = None,
    split: Annotated[
        Literal["train", "test"] | None, typer.Option(help="Where good images go.  [default: train]")
    ] = None,
    masks: Annotated[
        Path | None, typer.Option(help="Folder of the defects' masks, named as the images are, or NAME_mask.png.")
    ] = None,
    session: Annotated[
        str | None, typer.Option(help="Shift, lot or camera they are of, a folder of its own.  [default: none]")
    ] = None,
    check: Annotated[bool, typer.Option(help="Have the present model look at images labeled good.")] = True,
    decided: Annotated[
        bool, typer.Option("--decided", help="The images decided on the inspector's page, in place of PATHS.")
    ] = False,
    remove: Annotated[
        bool, typer.Option("--remove", help="Take training images out: PATHS below data.root, or their sha256.")
    ] = False,
    reason: Reason = "",
) -> None:
    """Add images to the data set, or take some out.

    Records its new version with DVC; what cannot be used goes to quarantine/, with the reason.
    """
    from panda_ad.commands.ingest import ingest, ingest_decided, ingest_remove
    from panda_ad.data.add_request import Request

    if remove and (decided or not paths or label != "good" or kind or split or masks or session):
        raise UserError("--remove: give it with --category, and paths or sha256 of training images, alone")
    if reason and not remove:
        raise UserError("--reason: goes with --remove")
    if remove:
        ingest_remove(category, [str(path) for path in paths or []], reason)
    elif decided and (paths or label != "good" or kind or split or masks or session):
        raise UserError("--decided: the decisions say what is what; give it with --category alone")
    elif decided:
        ingest_decided(category, check)
    elif not paths:
        raise UserError("ingest: give images or folders, or --decided")
    else:
        ingest(Request(category, tuple(paths), label, kind, split, masks, session), check)


@app.command()
def inspect(
    port: Annotated[int, typer.Option(help="TCP port; 0 takes any free one.")] = 5002,
    host: Annotated[str, typer.Option(help="Address to listen on; another than loopback needs tokens.")] = "127.0.0.1",
    alias: Annotated[str, typer.Option(help="The registered versions that score and explain.")] = "staging",
    folder: Annotated[Path | None, typer.Option(help="Score the images of this folder into the log first.")] = None,
    category: Annotated[str | None, typer.Option("--category", "-c", help="What the folder shows.")] = None,
) -> None:
    """Serve the inspector's page, until Ctrl-C.

    People look at what was scored, decide, set thresholds, promote; see docs/inspect.md.
    """
    from panda_ad.inspect.server import inspect

    inspect(port, host, alias, category, folder)


@app.command()
def promote(
    category: Categories = None,
    to: Annotated[str, typer.Option(help="staging, or champion.")] = "staging",
    in_place: Annotated[
        bool,
        typer.Option("--in-place", help="Evaluate the version in place, e.g. one that was set by hand; nothing moves."),
    ] = False,
) -> None:
    """Move @staging to the challenger, if the gate agrees.

    Where it refuses: exit code 3, the failed rules, and by how much.
    """
    from panda_ad.registry.promote import promote

    for decision in promote(category or None, to, in_place):
        print(decision)


@gallery.command("list")
def gallery_list(category: Category) -> None:
    """List its images, and what was changed since training."""
    from panda_ad.commands.gallery import show

    show(category)


@gallery.command("add")
def gallery_add(
    category: Category,
    paths: Annotated[list[Path], typer.Argument(help="Good images, or folders of images.")],
    reason: Reason = "",
) -> None:
    """Add good images, without training.

    The model with them becomes a version of its own, which the gate puts in place.
    """
    from panda_ad.commands.gallery import add

    add(category, paths, reason)


@gallery.command("remove")
def gallery_remove(
    category: Category,
    images: Annotated[list[str], typer.Argument(help="sha256 (8 digits or more), or path as `gallery list` has it.")],
    reason: Reason = "",
) -> None:
    """Take images out.

    With all that followed from them; a version of its own, which the gate puts in place.
    """
    from panda_ad.commands.gallery import remove

    remove(category, images, reason)


@gallery.command("undo")
def gallery_undo(category: Category, reason: Reason = "") -> None:
    """Take the last change back.

    A version of its own, which the gate puts in place.
    """
    from panda_ad.commands.gallery import undo

    undo(category, reason)


@gallery.command("suspect")
def gallery_suspect(
    category: Category,
    most: Annotated[int, typer.Option("--most", "-n", min=1, help="Images that are listed.")] = 20,
) -> None:
    """List the images that look least like the others.

    As models see them that have not seen them before.
    """
    from panda_ad.commands.gallery import suspect

    suspect(category, most)


@app.command()
def audit(category: Categories = None) -> None:
    """Compare false alarms with the promised rate.

    For each version in use, on parts that were confirmed good since it scored them; over time, by session.
    Writes plot and table into monitoring/audit.

    Exit code 0: kept, or too little is known. 5: a promise is broken.
    """
    from panda_ad.commands.audit import audit
    from panda_ad.monitor.budget import BROKEN

    if audit(category or []):
        raise typer.Exit(BROKEN)


@app.command()
def rollback(
    category: Annotated[str, typer.Argument(help="A category of params.yaml.")],
    to_version: Annotated[int | None, typer.Option(help="This version; default: the one @staging held before.")] = None,
) -> None:
    """Put @staging back to an earlier version."""
    from panda_ad.registry.promote import rollback

    print(rollback(category, to_version))


@app.command()
def explain_version(
    name: Annotated[str, typer.Argument(help="A registered model, e.g. panda-sample-fabric.")],
    version: Annotated[str, typer.Argument(help="Its number, or an alias such as @staging.")] = "@staging",
) -> None:
    """Say where a version comes from, as JSON.

    Data, commit, parameters, run, figures, decisions, and the commands that reproduce it.
    """
    import json

    from panda_ad.registry.lineage import explain_version

    print(json.dumps(explain_version(name, version), indent=2, ensure_ascii=False))


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(help="A registered model, e.g. panda-sample-fabric.")],
    version: Annotated[str, typer.Argument(help="Its number, or an alias such as @staging.")] = "@staging",
    keep: Annotated[bool, typer.Option("--keep", help="Leave the temporary clone, to look into it.")] = False,
) -> None:
    """Make a version again and compare its figures.

    Digit by digit, in a temporary clone; exit code 2 where one differs.
    """
    from panda_ad.commands.reproduce import reproduce

    reproduce(name, version, keep)


@app.command()
def clean(
    keep: Annotated[int, typer.Option(help="Newest versions of each category that stay.")] = 5,
    delete: Annotated[bool, typer.Option("--delete", help="Delete; without it, only say what would go.")] = False,
) -> None:
    """Delete old versions and their runs from MLflow.

    What an alias points to stays, and what was rolled back.
    """
    from panda_ad.registry.clean import clean

    gone = clean(keep, delete)
    print("\n".join(gone) or "nothing to delete")
    if gone and not delete:
        print("nothing is deleted yet: add --delete")


@app.command()
def ui(
    mlflow_port: Annotated[int, typer.Option(help="Port of the MLflow server on 127.0.0.1.")] = 5000,
    prefect_port: Annotated[int, typer.Option(help="Port of the Prefect server on 127.0.0.1.")] = 4200,
    inspect_port: Annotated[int, typer.Option(help="Port of the inspector's page on 127.0.0.1.")] = 5002,
) -> None:
    """Start MLflow, Prefect and the inspector's page.

    On 127.0.0.1, with the deployments of prefect.yaml and a worker that runs them.
    """
    from panda_ad.commands.servers import serve_ui
    from panda_ad.params import load_params

    load_params()  # a wrong folder, or a mistake in params.yaml, is better said now than by a flow
    serve_ui(mlflow_port, prefect_port, inspect_port)


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="A registered model, e.g. models:/panda-sample-fabric@staging.")],
    port: Annotated[int, typer.Option(help="TCP port on 127.0.0.1; 0 takes any free one.")] = 5001,
) -> None:
    """Serve a registered model over REST, until Ctrl-C.

    MLflow's request format, on 127.0.0.1; answers base64 images with score, p-value, threshold and decision.
    """
    from panda_ad.registry.serve import serve

    serve(model, port)


@app.command()
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
    from panda_ad.params import load_params, parse_params

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


def main() -> None:
    """Entry point: a user's mistake is one line and its exit code, never a stack trace."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(
            line_buffering=True
        )  # into a file or a service's journal too, `ui` says at once where it listens
    try:
        prepare()
        app()
    except UserError as e:
        print(f"panda-ad: {e}", file=sys.stderr)
        sys.exit(e.exit_code)
    except OSError as e:
        if e.strerror is None:  # not from the operating system: a defect, and its trace is wanted
            raise
        where = f"{e.filename}: " if e.filename else ""
        print(f"panda-ad: {where}{e.strerror}", file=sys.stderr)
        sys.exit(UserError.exit_code)
    except SystemExit as e:
        if e.code == 130:  # typer's for Ctrl-C, without a word
            print("panda-ad: stopped", file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
