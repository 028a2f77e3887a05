# SPDX-License-Identifier: Apache-2.0
"""`panda-ad watch`: a verdict for each picture that arrives in a folder, within a moment.

The table of verdicts is the memory: a row is appended, whole and synchronized, before anything else happens with it.
So a process that is killed has lost no row, and the next one judges what has none. Webhooks are sent from the table.
"""

from __future__ import annotations

import contextlib
import csv
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from threading import Event

import filelock

from panda_ad.commands.score import judge
from panda_ad.commands.webhook import Webhook, sent_mark
from panda_ad.data.listing import find_images, printable
from panda_ad.errors import UserError
from panda_ad.registry.load import Model, load_model
from panda_ad.system.files import atomic_file, digest_if_readable

COLUMNS = (
    "time", "path", "sha256", "decision", "score", "p_value", "threshold", "model", "version", "x0", "y0", "x1", "y1"
)  # fmt: skip
"""Of the table; `time` is UTC, with milliseconds; a picture that cannot be read is `unreadable` and has no score."""
_PAUSE = 0.1  # seconds between two looks at the folder
_ALIAS_SECONDS = 5.0

State = tuple[int, int]
"""Size and time of change of a file."""


@dataclass
class Table:
    """The verdicts so far, a CSV that is only appended to.

    Attributes
    ----------
    path : of the file.
    known : (path, sha256) of its rows.
    """

    path: Path
    known: set[tuple[str, str]] = field(default_factory=set)

    @classmethod
    def opened(cls, path: Path) -> Table:
        """Read a table, or begin one. What a killed process has written of its last row is cut off.

        Raises
        ------
        UserError
            The file is another table.
        """
        header = ",".join(COLUMNS) + "\n"
        if not path.exists():
            sent_mark(path).unlink(missing_ok=True)  # of an earlier table: its place is not this one's
            with atomic_file(path) as temporary:
                temporary.write_text(header, encoding="utf-8")
            return cls(path)
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if not whole.decode("utf-8", "replace").startswith(header):
            raise UserError(f"--out {path}: is no table of `panda-ad watch`; name another file")
        if whole != data:
            os.truncate(path, len(whole))
        rows = csv.DictReader(io.StringIO(whole.decode("utf-8")))
        return cls(path, {(row["path"], row["sha256"]) for row in rows})

    def append(self, row: dict[str, object]) -> None:
        """Append a row and wait until it is on the disk."""
        text = io.StringIO()
        csv.DictWriter(text, COLUMNS, lineterminator="\n").writerow(row)
        with open(self.path, "ab") as f:
            f.write(text.getvalue().encode())
            f.flush()
            os.fsync(f.fileno())
        self.known.add((str(row["path"]), str(row["sha256"])))


@dataclass
class Arrivals:
    """Files of a folder that are complete and have not been given out as they are now."""

    folder: Path
    settle: float
    _seen: dict[Path, tuple[State, float]] = field(default_factory=dict)
    _given: dict[Path, State] = field(default_factory=dict)

    def new(self) -> Iterator[Path]:
        """Yield files that have not changed for `settle` seconds."""
        now, found = time.monotonic(), find_images([self.folder])
        for file in [*found.images, *found.unread]:
            try:
                stat = file.stat()
            except OSError:  # it has gone
                continue
            state = (stat.st_size, stat.st_mtime_ns)
            before, since = self._seen.get(file, (None, now))
            if before != state:
                self._seen[file] = (state, now)
            elif now - since >= self.settle and self._given.get(file) != state:
                self._given[file] = state
                yield file


@dataclass
class Followed:
    """A model that follows its alias: a new version is loaded beside the old one, and takes its place then."""

    name: str | None
    bundle: Path | None
    current: Model
    say: Callable[[str], None]
    _looked: float = 0.0

    def model(self) -> Model:
        """Return the model in place; where the registry does not answer, the one so far."""
        if self.name is None or "@" not in self.name or time.monotonic() - self._looked < _ALIAS_SECONDS:
            return self.current
        self._looked = time.monotonic()
        try:
            from panda_ad.registry.versions import version_number

            if version_number(self.name) != self.current.version:
                self.current = load_model(self.name, None)
                self.say(f"{self.name}: version {self.current.version} from now on")
        except UserError as e:
            self.say(f"{self.name}: version {self.current.version} goes on ({e})")
        return self.current


def watch(
    folder: Path,
    model: str | None,
    bundle: Path | None,
    out: Path,
    settle: float,
    webhook: str | None,
    once: bool = False,
) -> None:
    """Judge what is in a folder and what arrives in it, until it is told to stop (Ctrl-C, SIGTERM).

    Parameters
    ----------
    model, bundle : as `load_model`.
    out : the table.
    settle : seconds that a file must not have changed.
    webhook : address that rows are sent to; None: none.
    once : end when everything that is there has been judged and sent.

    Raises
    ------
    UserError
        No such folder or model, another process writes the table, or it is none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    followed = Followed(model, bundle, load_model(model, bundle), _say)
    stop = Event()
    with _alone(out), _until_told(stop):
        table, arrivals = Table.opened(out), Arrivals(folder, settle)
        sender = Webhook.started(webhook, out, stop, _say) if webhook else None
        _say(f"watching {folder}; verdicts in {out}; Ctrl-C stops")
        last = time.monotonic()
        while not stop.is_set():
            for file in arrivals.new():
                _judge(file, table, followed.model())
                last = time.monotonic()
                if stop.is_set():
                    break
            if once and time.monotonic() - last > settle + 1 and (sender is None or sender.idle()):
                stop.set()
            stop.wait(_PAUSE)
        if sender is not None:
            sender.join()


def _judge(file: Path, table: Table, model: Model) -> None:
    """Add a file's row, if its content has none under its name."""
    name, digest = printable(str(file)).replace("\n", "\\n"), digest_if_readable(file)
    if (name, digest) in table.known:
        return
    judged = judge(model.detector, file)
    limit = model.detector.threshold().value
    row: dict[str, object] = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"), "path": name, "sha256": digest,
        "decision": "unreadable", "threshold": repr(limit), "model": model.name, "version": model.version,
    }  # fmt: skip
    if judged.verdict is not None:
        found = judged.verdict
        row |= {"decision": "defect" if found.anomalous else "good", "score": repr(found.score)}
        row |= {"p_value": repr(found.p_value)} | dict(zip(("x0", "y0", "x1", "y1"), found.region or (), strict=False))
    table.append(row)
    print(f"{row['decision']:<10} {name}" + (f"  ({judged.problem})" if judged.problem else ""))


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the table. UserError where another process does."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(out.with_name(f".{out.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise UserError(f"--out {out}: another process writes it; stop that one, or name another file") from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _until_told(stop: Event) -> Iterator[None]:
    """Set `stop` at Ctrl-C and SIGTERM, so that a row under way is finished."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: stop.set()) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def _say(line: str) -> None:
    print(f"panda-ad: {line}", file=sys.stderr)
