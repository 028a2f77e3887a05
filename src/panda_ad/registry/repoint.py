# SPDX-License-Identifier: Apache-2.0
"""A local store whose checkout was moved, copied or mounted elsewhere: MLflow keeps absolute paths of artifacts."""

from __future__ import annotations

import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from panda_ad.errors import UserError

_FOLDER = "/mlartifacts"
_COLUMNS = {
    "experiments": "artifact_location",
    "runs": "artifact_uri",
    "logged_models": "artifact_location",
    "model_versions": "storage_location",
}


def repoint(store: Path, artifacts: str) -> None:
    """Let a SQLite store's artifact paths point to the folder `artifacts` (a file: URI), where its files now are.

    Paths of other folders, such as those that a person gave an experiment, stay. A line on standard error says what was
    done.

    Raises
    ------
    UserError
        The store cannot be written.
    """
    if not store.is_file():
        return
    try:
        with closing(sqlite3.connect(store, timeout=30)) as db:
            moved = [old for old in _folders(db) if old != artifacts and _came_along(db, old, artifacts)]
            changed = [_replace(db, old, artifacts) for old in moved]
            db.commit()
    except sqlite3.Error as e:
        raise UserError(f"{store}: its artifact paths cannot be read or changed ({e})") from None
    for old, runs in zip(moved, changed, strict=True):
        if runs:
            print(
                f"panda-ad: {store}: artifacts of {runs} runs are here now, no longer in {_path(old)}", file=sys.stderr
            )


def _folders(db: sqlite3.Connection) -> list[str]:
    """Return the artifact folders of checkouts that experiments name."""
    try:
        found = db.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
    except sqlite3.OperationalError:  # no store of MLflow's, or one of which the tables are not there yet
        return []
    return sorted(
        {
            uri[: uri.rindex(_FOLDER + "/")] + _FOLDER
            for (uri,) in found
            if uri and f"{_FOLDER}/" in uri and uri.startswith("file:")
        }
    )


def _came_along(db: sqlite3.Connection, old: str, new: str) -> bool:
    """Return whether an experiment's files lie in the new folder, or there is no old one any more."""
    names = db.execute("SELECT artifact_location FROM experiments WHERE artifact_location LIKE ?", (f"{old}/%",))
    here = (_path(new) / unquote(uri.removeprefix(f"{old}/")) for (uri,) in names)
    return any(folder.is_dir() for folder in here) or not _path(old).is_dir()


def _replace(db: sqlite3.Connection, old: str, new: str) -> int:
    """Replace a folder at the beginning of every path; return how many runs' paths changed."""
    changed = {}
    for table, column in _COLUMNS.items():
        there = db.execute("SELECT 1 FROM pragma_table_info(?) WHERE name = ?", (table, column)).fetchone()
        if there:
            change = f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?"
            changed[table] = db.execute(change, (new, len(old) + 1, len(old) + 1, f"{old}/")).rowcount
    return changed.get("runs", 0)


def _path(uri: str) -> Path:
    return Path(unquote(urlsplit(uri).path))
