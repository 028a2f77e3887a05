# SPDX-License-Identifier: Apache-2.0
"""Alarms of a category and what became of them: an append-only record under monitoring/alarms/<category>/.

One file a record, written whole and never changed; their order is that of their numbers. From them follows which
images the next ones are compared with: after an alarm, those since the change.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from panda_ad.errors import UserError
from panda_ad.registry.provenance import user
from panda_ad.system.files import write_json

ALARMS = Path("monitoring/alarms")
PROMISE = "the promise is broken"
"""Finding of an alarm about a version's false-alarm rate; it changes nothing in what images are compared with."""


@dataclass(frozen=True)
class State:
    """Which images are the reference, and from when on images are tested against them.

    Attributes
    ----------
    since, until : the reference is the images first logged in this time; None: the calibration images.
    start : images first logged from then on are tested; None: those after the reference, or with the calibration
        images those from the first on that the version has scored.
    """

    since: np.datetime64 | None = None
    until: np.datetime64 | None = None
    start: np.datetime64 | None = None


@dataclass(frozen=True)
class Alarm:
    """A change that was found, and what became of it.

    Attributes
    ----------
    number : of its record.  when : it was found.  since : when the first of the changed images was logged.
    findings : in plain words.  model, version : in place when it was found.
    shifts : how large the change is, by what changed; as in `drift.Test`.
    end : '' while it is open, else in words how it ended.
    told : whether Prefect has had its event.
    """

    number: int
    when: str
    since: str
    findings: tuple[str, ...]
    model: str
    version: str
    alias: str
    shifts: Mapping[str, float] = field(default_factory=dict)
    end: str = ""
    told: bool = False

    @property
    def about_promise(self) -> bool:
        """Whether it is about a version's false-alarm rate, not about what images are like."""
        return self.findings == (PROMISE,)

    def __str__(self) -> str:
        return f"{'; '.join(self.findings)} since {day_and_time(self.since)}"


@dataclass
class Status:
    """What the records of a category come to.

    Attributes
    ----------
    state : the reference now.  before : the one before the last alarm about images.
    alarms : all, oldest first.
    """

    state: State = field(default_factory=State)
    before: State = field(default_factory=State)
    alarms: list[Alarm] = field(default_factory=list)

    @property
    def open(self) -> list[Alarm]:
        """Alarms that have not ended, oldest first."""
        return [a for a in self.alarms if not a.end]

    @property
    def open_change(self) -> Alarm | None:
        """Return the open alarm about what images are like; None if there is none."""
        return next((a for a in reversed(self.open) if not a.about_promise), None)


@contextmanager
def recording(category: str, folder: Path = ALARMS) -> Iterator[None]:
    """Keep other processes from adding records of a category: whoever finds a change adds it once."""
    (folder / category).mkdir(parents=True, exist_ok=True)
    with FileLock(folder / category / ".lock"):
        yield


def add(category: str, kind: str, facts: Mapping[str, Any], folder: Path = ALARMS) -> None:
    """Append a record, under `recording`.

    Parameters
    ----------
    kind : 'alarm', 'told' (Prefect has had its event), 'acknowledged', 'retrained' (the version in place was trained
        on images since the change), 'as before' (images are again as before the alarm), 'replaced' (another version).
    facts : of an alarm since, findings, model, version and more; of the others `alarm`, the number of the one meant.
    """
    number = len(_files(category, folder)) + 1
    when = datetime.now(UTC).isoformat(timespec="microseconds")
    path = folder / category / f"{number:06d}-{kind.replace(' ', '-')}.json"
    write_json(path, {"number": number, "kind": kind, "when": when, **facts})


def read_status(category: str, folder: Path = ALARMS) -> Status:
    """Return what the records of a category come to; UserError if one is damaged."""
    status = Status()
    for path in _files(category, folder):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            _apply(status, record)
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}: damaged record of an alarm; move it away, with those that have a higher number"
            ) from None
    return status


def acknowledge(category: str, reason: str = "", folder: Path = ALARMS) -> list[Alarm]:
    """Record that a person knows of a category's open alarms; return them, ended.

    Raises
    ------
    UserError
        None is open.
    """
    with recording(category, folder):
        found = read_status(category, folder).open
        if not found:
            raise UserError(f"category {category}: no alarm is open, nothing to acknowledge")
        for alarm in found:
            facts = {"alarm": alarm.number, "who": f"{user()}@{socket.gethostname()}", "reason": reason}
            add(category, "acknowledged", facts, folder)
        numbers = {alarm.number for alarm in found}
        return [a for a in read_status(category, folder).alarms if a.number in numbers]


def tell(category: str, alarm: Alarm, folder: Path = ALARMS) -> None:
    """Record that Prefect has had the event of an alarm."""
    with recording(category, folder):
        add(category, "told", {"alarm": alarm.number}, folder)


def moment(text: str) -> np.datetime64:
    """Return a record's time as datetime64[us], UTC."""
    return np.datetime64(datetime.fromisoformat(text).astimezone(UTC).replace(tzinfo=None), "us")


def day_and_time(text: str) -> str:
    """Return a record's time for people, e.g. '2026-11-26 14:05 UTC'."""
    return f"{datetime.fromisoformat(text).astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def _files(category: str, folder: Path) -> list[Path]:
    return sorted(p for p in (folder / category).glob("*.json") if not p.name.startswith("."))


def _apply(status: Status, record: Mapping[str, Any]) -> None:
    kind, when = record["kind"], record["when"]
    if kind == "alarm":
        facts = {key: record[key] for key in ("number", "when", "since", "model", "version", "alias")}
        alarm = Alarm(**facts, findings=tuple(record["findings"]), shifts=record.get("shifts", {}))
        if not alarm.about_promise:
            if (last := status.open_change) is not None:
                _end(status, last.number, f"another change was found {day_and_time(when)}")
            status.before, status.state = status.state, State(moment(alarm.since), moment(when))
        status.alarms.append(alarm)
        return
    number = int(record["alarm"])
    if kind == "told":
        _change(status, number, told=True)
    elif kind == "acknowledged":
        why = f": {record['reason']}" if record["reason"] else ""
        _end(status, number, f"acknowledged by {record['who']} {day_and_time(when)}{why}")
    elif kind == "retrained":
        _end(status, number, f"version {record['version']} was trained on {record['images']} images since then")
    elif kind == "replaced":
        _end(status, number, f"version {record['version']} took its place")
    else:
        _end(status, number, f"images are as before again since {day_and_time(record['since'])}")
        status.state = State(status.before.since, status.before.until, moment(record["since"]))


def _end(status: Status, number: int, how: str) -> None:
    _change(status, number, end=how)


def _change(status: Status, number: int, **changes: Any) -> None:
    status.alarms = [replace(a, **changes) if a.number == number else a for a in status.alarms]
