# SPDX-License-Identifier: Apache-2.0
"""Commands on pictures: start, score, watch, monitor, ingest, inspect.

Options and words; what they do is imported when they run, so that the help is there at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from panda_ad.errors import UserError

Categories = Annotated[
    list[str] | None,
    typer.Option("--category", "-c", help="Only this category (repeatable); default: all of params.yaml."),
]

Reason = Annotated[str, typer.Option(help="Why, for the record.")]


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


def score(
    paths: Annotated[list[str], typer.Argument(help="Images, or folders of images (searched recursively).")],
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
    parts: Annotated[
        str | None,
        typer.Option(help="For very many: write Parquet files into this folder; what it holds is not scored again."),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(help="With --parts: so many processes, or a Dask scheduler's address (tcp://host:8786)."),
    ] = None,
) -> None:
    """Score images or folders.

    Per image a row: score, p-value, good or defect, threshold, and the box of the region that decided.
    The box needs --heatmaps. With --parts, PATHS and the folder may be addresses, as s3://bucket/folder.
    """
    if parts is not None:
        from panda_ad.commands.score_parts import score_parts

        if out is not None or heatmaps is not None or log:
            raise UserError("--parts: goes without --out, --heatmaps and --log")
        score_parts(paths, model, bundle, parts, false_alarm_rate, cluster)
        return
    if cluster is not None:
        raise UserError("--cluster: goes with --parts FOLDER")
    from panda_ad.commands.score import score_paths
    from panda_ad.system.paths import LOG

    if addresses := [path for path in paths if "://" in path]:
        raise UserError(f"{addresses[0]}: an address goes with --parts FOLDER")
    score_paths([Path(path) for path in paths], model, bundle, out, heatmaps, false_alarm_rate, LOG if log else None)


def watch(
    folder: Annotated[Path, typer.Argument(help="Where pictures arrive.")],
    out: Annotated[Path, typer.Option(help="Table of verdicts; what it holds is not judged again.")] = Path(
        "watch.csv"
    ),
    model: Annotated[
        str | None, typer.Option(help="A registered model, e.g. models:/panda-sample-fabric@staging; it is followed.")
    ] = None,
    bundle: Annotated[Path | None, typer.Option(help="A bundle folder, e.g. build/bundle/fabric.")] = None,
    settle: Annotated[float, typer.Option(min=0, help="Seconds that a file must not have changed.")] = 0.5,
    webhook: Annotated[str | None, typer.Option(help="Address that each row is sent to as JSON.")] = None,
    once: Annotated[bool, typer.Option("--once", help="End when all that is there has been judged and sent.")] = False,
) -> None:
    """Judge pictures as they arrive in a folder.

    Until Ctrl-C. A restart goes on where it was. Webhooks are signed with PANDA_WEBHOOK_SECRET.
    """
    from panda_ad.commands.watch import watch

    watch(folder, model, bundle, out, settle, webhook, once)


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


def inspect(
    port: Annotated[int, typer.Option(min=0, max=65535, help="TCP port; 0 takes any free one.")] = 5002,
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
