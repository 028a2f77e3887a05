# SPDX-License-Identifier: Apache-2.0
"""One run at a time per repository."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from panda_ad.errors import Busy
from panda_ad.system.files import write_json

LOCK = Path(".cache/panda.lock")
HOLDER = LOCK.with_suffix(".json")
"""Who holds the lock: pid, command, since."""


@contextmanager
def repository_lock(command: str, root: Path | str = ".") -> Iterator[None]:
    """Hold the repository's lock, and leave word that `command` does.

    Whatever changes build/, the data or the registry takes it: `panda-ad run`, `ingest`, `promote`, `rollback` and
    `clean`, the retrain flow, and every stage. A stage that a holder started passes, since the holder is among its
    parent processes; so does the holder itself when it asks again. A stage of a bare `dvc repro` has no such parent and
    takes the lock itself, so a second pipeline or an `ingest` cannot come between its reading and its writing. The
    kernel frees the lock when its holder dies, in whatever way.

    Raises
    ------
    Busy
        Another run holds it: which command, which process, since when.
    """
    lock = FileLock(Path(root) / LOCK)
    Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
    note = Path(root) / HOLDER
    try:
        lock.acquire(blocking=False)
    except Timeout:
        holder = _read(note)
        if holder and holder["pid"] in {os.getpid(), *(p.pid for p in psutil.Process().parents())}:
            yield
            return
        raise Busy(_busy(Path(lock.lock_file), holder)) from None
    try:
        write_json(note, {"pid": os.getpid(), "command": command, "since": time.strftime("%Y-%m-%d %H:%M:%S")})
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def _read(note: Path) -> dict[str, Any] | None:
    try:
        return json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # the holder has just come, or is just leaving
        return None


def _busy(path: Path, holder: dict[str, Any] | None) -> str:
    if holder is None:
        return f"another run holds {path}; wait for it to end"
    day, clock = holder["since"].split(" ")
    since = clock[:5] if day == time.strftime("%Y-%m-%d") else f"{day} {clock[:5]}"
    holding = f'another run (pid {holder["pid"]}, "{holder["command"]}", since {since}) holds {path}'
    return f"{holding}; wait for it to end, or stop it"
