# SPDX-License-Identifier: Apache-2.0
"""Atomic writes, and what a file holds, as a hash.

A kill at any moment leaves the old file or the new one, never half of one.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil


@contextmanager
def atomic_file(path: Path | str) -> Iterator[Path]:
    """Give a temporary name in the same folder; rename it to `path` when the block ends well, remove it otherwise."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(path)
    with renamed_file(path) as temporary:
        yield temporary


@contextmanager
def renamed_file(path: Path) -> Iterator[Path]:
    """`atomic_file` for one of many files in an existing folder: what killed writers left there is not looked for."""
    if path.exists() and not path.is_file():  # a rename would take the place of /dev/null
        raise FileExistsError(errno.EEXIST, "is a folder or a device, no file to write", str(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Give an empty temporary folder beside `path`; it takes the place of `path` when the block ends well.

    A folder cannot replace another in one step: for the moment between two renames there is none.

    Its files may be read by whoever the process's umask allows: safetensors makes them readable by their owner alone,
    and a model is for others too.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(path)
    temporary, old = (path.with_name(f".{path.name}.{word}{os.getpid()}.tmp") for word in ("", "old."))
    temporary.mkdir()
    try:
        yield temporary
        mode = temporary.stat().st_mode & 0o666
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(mode)
        if path.is_dir():
            os.rename(path, old)
        try:
            os.rename(temporary, path)
        except OSError:
            if old.exists():
                os.rename(old, path)
            raise
    finally:
        for folder in (temporary, old):
            shutil.rmtree(folder, ignore_errors=True)


def _remove_left_behind(path: Path) -> None:
    """Remove the temporary files and folders of writers of `path` that were killed."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        pid = temporary.name.split(".")[-2]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)


def write_text(path: Path | str, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: object) -> None:
    """Write JSON atomically, indented.

    Raises
    ------
    ValueError
        A number is NaN or infinite, since JSON has no word for these.
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def digest_file(path: Path) -> str:
    """Return the sha256 of a file, hex, '' if it is missing; OSError if it cannot be read."""
    if not path.is_file():
        return ""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest_if_readable(path: Path) -> str:
    """Return `digest_file`, '' also if the file cannot be read."""
    try:
        return digest_file(path)
    except OSError:
        return ""
