# SPDX-License-Identifier: Apache-2.0
"""Commands `panda-ad gallery ...`: look at the gallery in place, teach, undo.

Options and words; what they do is imported when they run, so that the help is there at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Category = Annotated[str, typer.Argument(help="A category of params.yaml.")]
Reason = Annotated[str, typer.Option(help="Why, for the record.")]
gallery = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, add_completion=False, help="Look at the gallery in place, teach, undo."
)


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
