"""One run at a time per repository."""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from panda_ad.errors import Busy
from panda_ad.params import Params, load_params
from panda_ad.system.changed_params import put_back

LOCK = Path(".cache/panda.lock")
HELD = "PANDA_LOCK_HELD"
"""Set, for children, to the process id of the holder: what the holder starts does not wait for the holder."""


@contextmanager
def repository_lock(command: str, root: Path | str = ".") -> Iterator[bool]:
    """Hold the repository's lock; `command` is what the next one is told is running.

    The kernel drops the lock with its holder, however that dies. Processes the holder starts, and the holder itself
    again, pass through. Gives whether params.yaml had to be put back, since a run that had changed it was killed: what was read
    before is not valid any more.

    Raises
    ------
    Busy
        Another run holds it.
    """
    path = Path(root) / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read(file)
            if holder and str(holder["pid"]) == os.environ.get(HELD):
                yield False
                return
            raise Busy(_busy(path, holder)) from None
        outer = os.environ.get(HELD)
        _write(file, {"pid": os.getpid(), "command": command, "since": time.strftime("%Y-%m-%d %H:%M:%S")})
        os.environ[HELD] = str(os.getpid())
        try:
            restored = put_back(Path(root))
            if restored:
                print(
                    "panda-ad: a run with changed parameters was killed; params.yaml is put back to what it was before",
                    file=sys.stderr,
                )
            yield restored
        finally:
            if outer is None:
                del os.environ[HELD]
            else:
                os.environ[HELD] = outer
            _write(file, None)


@contextmanager
def locked_params(command: str) -> Iterator[Params]:
    """`repository_lock`, and the parameters as they are under it: taking it puts back what a killed run had changed.

    Raises
    ------
    UserError
        There are none here, or they are wrong; no lock is left then in a folder that is no repository.
    Busy
        Another run holds the lock.
    """
    load_params()
    with repository_lock(command):
        yield load_params()


def _read(file: TextIO) -> dict[str, str] | None:
    file.seek(0)
    try:
        return json.loads(file.read())
    except json.JSONDecodeError:  # the holder is just writing, or letting go
        return None


def _write(file: TextIO, holder: dict[str, object] | None) -> None:
    """In place: a renamed file would be another lock."""
    file.seek(0)
    file.truncate()
    file.write("" if holder is None else json.dumps(holder))
    file.flush()


def _busy(path: Path, holder: dict[str, str] | None) -> str:
    if holder is None:
        return f"another run holds {path}; wait for it to end"
    day, clock = holder["since"].split(" ")
    since = clock[:5] if day == time.strftime("%Y-%m-%d") else f"{day} {clock[:5]}"
    return f'another run (pid {holder["pid"]}, "{holder["command"]}", since {since}) holds {path}; wait for it to end, or stop it'
