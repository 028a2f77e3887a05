# SPDX-License-Identifier: Apache-2.0
"""Commands on registered versions: promote, audit, rollback, explain-version, reproduce, export, clean.

Options and words; what they do is imported when they run, so that the help is there at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Categories = Annotated[
    list[str] | None,
    typer.Option("--category", "-c", help="Only this category (repeatable); default: all of params.yaml."),
]


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


def rollback(
    category: Annotated[str, typer.Argument(help="A category of params.yaml.")],
    to_version: Annotated[int | None, typer.Option(help="This version; default: the one @staging held before.")] = None,
) -> None:
    """Put @staging back to an earlier version."""
    from panda_ad.registry.promote import rollback

    print(rollback(category, to_version))


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


def export(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    model: Annotated[
        str | None, typer.Option(help="A registered model, e.g. models:/panda-sample-fabric@staging.")
    ] = None,
    bundle: Annotated[Path | None, typer.Option(help="A bundle folder, e.g. build/bundle/fabric.")] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(help="Images or folders to compare scores on (repeatable); default: the category's own."),
    ] = None,
) -> None:
    """Write a folder that scores on its own at a station.

    With a certificate that it scores the same; refused where one score differs (exit code 3).
    """
    from panda_ad.commands.export import export_model

    print(export_model(model, bundle, images or [], out))


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
