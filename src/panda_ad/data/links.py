# SPDX-License-Identifier: Apache-2.0
"""Refuse links that DVC and this package would follow differently.

DVC records a link to a folder as an empty folder. It records a whole set through a link, and at the next checkout
deletes what is behind it: the files of a share. What is read, what is versioned and what is restored must be the same
files. A link to a file is safe: DVC records what it points to, and puts a copy in its place.
"""

from __future__ import annotations

import os
from pathlib import Path

from panda_ad.errors import UserError


def refuse_links(root: Path) -> None:
    """Look for links in the data's path within this repository, and for links to folders and dead ones below it.

    Raises
    ------
    UserError
        Naming the link, where it leads, and what to do.
    """
    here = Path.cwd()
    inside = root.absolute()
    if inside.is_relative_to(here):
        for folder in (inside, *inside.parents):
            if folder == here:
                break
            if folder.is_symlink():
                link, target = folder.relative_to(here), os.path.realpath(folder)
                raise UserError(
                    f"{link}: is a link to {target}, and `dvc checkout` would delete the files there: "
                    f"remove the link alone (`rm {link}`), then copy the images here, "
                    f"or set data.root: {target} (read from there, not versioned)"
                )
    _refuse_below(str(root))


def _refuse_below(folder: str) -> None:
    try:
        with os.scandir(folder) as listed:
            entries = list(listed)
    except OSError as e:
        raise UserError(f"{folder}: cannot be listed ({e.strerror})") from None
    for entry in entries:
        if entry.is_symlink():
            if os.path.isdir(entry.path):
                raise UserError(
                    f"{entry.path}: is a link to the folder {os.path.realpath(entry.path)}, which DVC records as "
                    "an empty one: new images there would go unseen. Copy the folder in its place, "
                    "or set data.root to the folder that holds the real ones"
                )
            if not os.path.exists(entry.path):
                raise UserError(
                    f"{entry.path}: is a link to {os.readlink(entry.path)}, which leads to no file: "
                    "remove it, or let it point to a file"
                )
        elif entry.is_dir():
            _refuse_below(entry.path)
