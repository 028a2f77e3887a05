# SPDX-License-Identifier: Apache-2.0
"""What waits for a decision: the verdict log of a category in the order in which it is worth looking at."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Literal

from panda_ad.errors import UserError
from panda_ad.inspect.decisions import Decision, Subject
from panda_ad.monitor.log import LOG, read_verdicts, verdict_files

Show = Literal["undecided", "unsure", "decided"]
SHOWS: tuple[Show, ...] = ("undecided", "unsure", "decided")
_SETTLED = 2.0
"""Seconds after which a folder's time of change tells all changes apart; file systems count in ticks."""


@dataclass(frozen=True, slots=True)
class Row:
    """The newest verdict on one image, as `monitor.log.Entry` has it."""

    sha256: str
    path: str
    time: datetime
    model: str
    version: str
    score: float
    p_value: float
    threshold: float
    alarm: bool

    @property
    def name(self) -> str:
        """The file's name."""
        return self.path.rpartition("/")[2]

    def subject(self, category: str) -> Subject:
        """Return it as what is decided."""
        return Subject(category, self.sha256, self.path, self.model, self.version, self.score, self.threshold)


class Queue:
    """A category's scored images, each once; reads what the log has gained at each look.

    Order: alarms, newest first; then the others, those that look least normal first.
    """

    def __init__(self, category: str, log: Path = LOG) -> None:
        self.category, self.log = category, log
        self.problems: dict[str, str] = {}
        self._lock = threading.Lock()
        self._changed = -1
        self._read: set[Path] = set()
        self._rows: dict[str, Row] = {}
        self._order: tuple[str, ...] = ()

    def rows(self) -> Mapping[str, Row]:
        """Return the newest verdict of each image by sha256, not to be changed."""
        with self._lock:
            self._refresh()
            return self._rows

    def order(self) -> tuple[str, ...]:
        """Return all images (sha256), what is worth looking at first."""
        with self._lock:
            self._refresh()
            return self._order

    def find(self, sha256: str) -> Row:
        """Return the verdict on an image. UserError if the log has none."""
        row = self.rows().get(sha256)
        if row is None:
            raise UserError(f"{sha256[:64]}: the log of {self.category} has no such image")
        return row

    def _refresh(self) -> None:
        folder = self.log / self.category
        try:
            changed = folder.stat().st_mtime_ns
        except OSError:
            return
        if changed == self._changed:
            return
        listed = time.time()
        fresh = [path for path in verdict_files(self.category, self.log) if path not in self._read]
        if fresh:
            rows = dict(self._rows)  # a page that is being made keeps the former ones
            for path in fresh:
                self._take(path, rows)
            self._order = tuple(row.sha256 for row in sorted(rows.values(), key=_urgency))
            self._rows = rows
        self._changed = changed if listed - changed / 1e9 > _SETTLED else -1

    def _take(self, path: Path, rows: dict[str, Row]) -> None:
        self._read.add(path)
        try:
            found = read_verdicts(path)
        except UserError as e:
            self.problems[path.name] = str(e)
            return
        for entry in found:
            alarm = entry.pop("decision") == "defect"
            known = rows.get(entry["sha256"])
            if known is None or known.time <= entry["time"]:
                rows[entry["sha256"]] = Row(alarm=alarm, **entry)


def _urgency(row: Row) -> tuple[bool, float, float]:
    return not row.alarm, 0.0 if row.alarm else row.p_value, -row.time.timestamp()


def shown(decision: Decision | None) -> Show:
    """Return the list that an image belongs to."""
    if decision is None or decision.label == "undecided":
        return "undecided"
    return "unsure" if decision.label == "unsure" else "decided"


def select(order: tuple[str, ...], standing: Mapping[str, Decision], show: Show) -> list[str]:
    """Return the images of one list in the queue's order; decided ones newest decision first."""
    if show == "decided":
        known = set(order)
        found = [d for d in standing.values() if d.sha256 in known and shown(d) == show]
        return [d.sha256 for d in sorted(found, key=lambda d: -d.id)]
    return [sha256 for sha256 in order if shown(standing.get(sha256)) == show]
