# SPDX-License-Identifier: Apache-2.0
"""Which images were taken together: in the same session, be it a shift, a lot, a set-up or a camera.

Images of one session resemble each other more than images of two do. `data.sessions` says how sessions are told apart:

- `folder`: by the folders inside a folder of images, e.g. train/good/monday/*.png;
- `{name: REGEX}`: by a part of the file's name, that of the first group in parentheses, else the whole match;
- `{csv: FILE}`: by a table with the columns path and session; the file and its paths are relative to the data's root;
- `{gap_minutes: M}`: by the time in the camera's EXIF data: a pause of more than M minutes begins a new session.

An image whose session is not known has ''.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from panda_ad.errors import UserError
from panda_ad.params import Params

_EXIF, _ORIGINAL, _CHANGED = 0x8769, 36867, 306
"""EXIF 2.3: the tag of the camera's own fields, DateTimeOriginal in it, and DateTime."""
_EXIF_TIME = "%Y:%m:%d %H:%M:%S"


def sessions_of(paths: Sequence[str], taken: Sequence[str], params: Params, root: Path) -> list[str]:
    """Return the session of each image of one category.

    Parameters
    ----------
    paths : POSIX, relative to `root`, the data's root.
    taken : when each was taken (`taken_at`), or ''.

    Raises
    ------
    UserError
        The table of sessions cannot be read, or lacks a column.
    """
    rule = params.data.sessions
    if rule is None:
        return [""] * len(paths)
    if rule == "folder":
        depth = 4 if params.data.layout == "mvtec" else 3  # category/split/kind/session/file, split/class/session/file
        return [parts[-2] if len(parts := PurePosixPath(path).parts) > depth else "" for path in paths]
    ((kind, value),) = rule.items()
    if kind == "name":
        return [_named(str(value), PurePosixPath(path).name) for path in paths]
    if kind == "csv":
        table = _table(root / str(value))
        return [table.get(path, "") for path in paths]
    return _apart(taken, float(value))


def _named(pattern: str, name: str) -> str:
    found = re.search(pattern, name)
    return "" if found is None else (found.group(1) if found.re.groups else found.group()) or ""


def _table(path: Path) -> Mapping[str, str]:
    """Return {path: session} of a CSV file."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # spreadsheets begin a file with a mark
            rows = csv.DictReader(file)
            if missing := [name for name in ("path", "session") if name not in (rows.fieldnames or ())]:
                raise UserError(f"data.sessions.csv: {path} has no column {' and no column '.join(missing)}")
            return {row["path"]: (row["session"] or "").strip() for row in rows}
    except OSError as e:
        raise UserError(f"data.sessions.csv: {path} cannot be read ({e.strerror})") from None
    except (UnicodeDecodeError, csv.Error) as e:
        raise UserError(f"data.sessions.csv: {path} is no CSV file in UTF-8 ({e})") from None


def _apart(taken: Sequence[str], minutes: float) -> list[str]:
    """Return sessions named by their first image's time; more than `minutes` without an image begin a new one."""
    sessions = [""] * len(taken)
    name, last = "", ""
    for when, i in sorted((when, i) for i, when in enumerate(taken) if when):
        if not last or (datetime.fromisoformat(when) - datetime.fromisoformat(last)).total_seconds() > 60 * minutes:
            name = when[:16]
        sessions[i], last = name, when
    return sessions


def taken_at(data: bytes) -> str:
    """Return when the camera took an image by its EXIF data, as YYYY-MM-DD HH:MM:SS; '' where it does not say."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            exif = image.getexif()
            value: Any = exif.get_ifd(_EXIF).get(_ORIGINAL) or exif.get(_CHANGED) or ""
        return str(datetime.strptime(str(value).strip("\0 "), _EXIF_TIME))
    except Exception:  # EXIF data of nobody's making raise whatever Pillow's parsers do, and matter to nothing else
        return ""


def unknown_sessions(params: Params, category: str, paths: Sequence[str]) -> str:
    """Say that images have no session, by what `data.sessions` goes by."""
    rule = params.data.sessions
    (kind, value) = ("folder", "") if rule is None or rule == "folder" else next(iter(rule.items()))
    why = {
        "folder": "they lie in no folder of their own inside the folder of images",
        "name": f"their names do not match {value}",
        "csv": f"{value} does not name them",
        "gap_minutes": "their files hold no EXIF time",
    }[kind]
    shown = ", ".join(paths[:3]) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    return f"{category}: {len(paths)} images are of no known session and count as one more ({why}): {shown}"
