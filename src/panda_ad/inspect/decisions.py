# SPDX-License-Identifier: Apache-2.0
"""What people decided of scored images: a table that only grows, in SQLite or in PostgreSQL.

A row names the row of the same image that it replaces, and the database admits one successor of each: of two people who
decide the same image at once, the second is told what the first decided. The last row of an image stands. An undo is a
row too. Rows are ordered by number, never by time: clocks go back.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa

from panda_ad.data.add_request import refuse_kind
from panda_ad.errors import Unavailable, UserError

Label = Literal["good", "defect", "unsure", "undecided"]
LABELS: tuple[Label, ...] = ("good", "defect", "unsure", "undecided")
"""`undecided` is what an undo leaves of an image's first decision."""

VERSION_TABLE = "panda_decisions_version"
"""Alembic's own table; MLflow, which may share the database, has one of the usual name."""

VARIABLE = "PANDA_DECISIONS"
"""Environment variable with the database's address, e.g. postgresql+psycopg://user:password@host/name."""

DEFAULT = Path("monitoring/decisions.db")
_OVERLAP = 256
"""Rows read again: PostgreSQL gives numbers before rows can be seen, so that a lower one may appear later."""
_WAIT = 5.0
"""Seconds that a write waits for another one's."""
_KIND, _WHO = 100, 100

TABLE = sa.table(
    "panda_decisions",
    *(sa.column(name, sa.Integer) for name in ("id", "replaces", "undoes")),
    *(sa.column(name, sa.String) for name in ("category", "sha256", "label", "kind", "who", "at")),
    *(sa.column(name, sa.String) for name in ("path", "model", "version")),
    *(sa.column(name, sa.Float) for name in ("score", "threshold")),
)


@dataclass(frozen=True)
class Subject:
    """The image that is decided, as the verdict log has it.

    Attributes
    ----------
    sha256 : of the file, hex.  path : where the scorer found it.
    model, version : that scored it.  score, threshold : what it said.
    """

    category: str
    sha256: str
    path: str
    model: str
    version: str
    score: float
    threshold: float


@dataclass(frozen=True)
class Decision:
    """A row of the table.

    Attributes
    ----------
    id : its number, from 1.
    label : good, defect, unsure or undecided.  kind : of defect, else ''.
    who : a name.  at : UTC, ISO 8601.
    replaces : number of the row of the same image before it, 0 for none.
    undoes : number of the row that it takes back, 0 for none.
    """

    id: int
    label: Label
    kind: str
    who: str
    at: str
    replaces: int
    undoes: int
    category: str
    sha256: str
    path: str
    model: str
    version: str
    score: float
    threshold: float

    @property
    def subject(self) -> Subject:
        """The image."""
        return Subject(**{name: getattr(self, name) for name in Subject.__dataclass_fields__})


class AlreadyDecided(UserError):
    """Somebody decided the image since it was looked at; `standing` is what stands."""

    def __init__(self, standing: Decision) -> None:
        super().__init__(f"decided meanwhile by {standing.who}: {standing.label} {standing.kind}".strip())
        self.standing = standing


class Decisions:
    """The table, with what stands of each category in memory; for several threads."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._standing: dict[str, dict[str, Decision]] = {}
        self._last: dict[str, int] = {}

    def decide(self, subject: Subject, label: Label, kind: str, who: str, seen: int) -> Decision:
        """Record what `who` decided.

        Parameters
        ----------
        kind : of defect; '' for 'defect', and for what is none.
        seen : number of the decision that stood when the person looked, 0 for none.

        Raises
        ------
        AlreadyDecided
            Another one stands by now.
        UserError
            No such label, a kind that cannot be a folder's name, no name, or the database fails.
        """
        if label not in LABELS or label == "undecided":
            raise UserError(f"label: {label!r} is none of good, defect, unsure")
        kind = " ".join(kind.split()) if label == "defect" else ""
        if kind:
            refuse_kind(kind)
            if kind.casefold() == "good" or len(kind) > _KIND:
                raise UserError(f"kind: {kind[:_KIND]!r} is no kind of defect of at most {_KIND} characters")
        return self._add(subject, label, kind or ("defect" if label == "defect" else ""), who, seen)

    def undo(self, category: str, who: str) -> Decision | None:
        """Take back the last decision of `who` that still stands; None if there is none.

        What stood before it stands again.
        """
        rows = [row for row in self.standing(category).values() if row.who == who and not row.undoes]
        if not rows:
            return None
        last = max(rows, key=lambda row: row.id)
        before = self._row(last.replaces)
        label, kind = (before.label, before.kind) if before else ("undecided", "")
        return self._add(last.subject, label, kind, who, last.id, undoes=last.id)

    def standing(self, category: str) -> dict[str, Decision]:
        """Return the last row of each image of a category by sha256, `undecided` ones too; not to be changed."""
        with self._lock, _database_errors():
            known = self._standing.setdefault(category, {})
            last = self._last.get(category, 0)
            newest = sa.and_(TABLE.c.category == category, TABLE.c.id > last - _OVERLAP)
            with self._engine.connect() as connection:
                rows = connection.execute(sa.select(TABLE).where(newest).order_by(TABLE.c.id)).mappings().all()
            for row in rows:
                if row["sha256"] not in known or known[row["sha256"]].id < row["id"]:
                    known[row["sha256"]] = Decision(**row)
                last = max(last, row["id"])
            self._last[category] = last
            return dict(known)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def _row(self, number: int) -> Decision | None:
        with _database_errors(), self._engine.connect() as connection:
            row = connection.execute(sa.select(TABLE).where(TABLE.c.id == number)).mappings().first()
        return None if row is None else Decision(**row)

    def _add(self, subject: Subject, label: Label, kind: str, who: str, seen: int, undoes: int = 0) -> Decision:
        if not who.strip() or len(who) > _WHO or not who.isprintable():
            raise UserError(f"name: say who decides, in at most {_WHO} characters")
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        values: dict[str, Any] = {
            "label": label,
            "kind": kind,
            "who": who,
            "at": at,
            "replaces": seen,
            "undoes": undoes,
        }
        values |= asdict(subject)
        stands = self.standing(subject.category).get(subject.sha256)
        if (stands.id if stands else 0) != seen:
            raise AlreadyDecided(stands) if stands else UserError("decision: looked at one that is not there")
        try:
            with _database_errors(), self._engine.begin() as connection:
                number = connection.execute(sa.insert(TABLE).values(values).returning(TABLE.c.id)).scalar_one()
        except sa.exc.IntegrityError:  # another process was faster
            raise AlreadyDecided(self.standing(subject.category)[subject.sha256]) from None
        return Decision(id=number, **values)


def open_decisions(address: str | None = None) -> Decisions:
    """Open the table at an address, by default that of `VARIABLE` or the SQLite file; create or update it.

    Raises
    ------
    UserError
        No such database, no driver for it, or it is of a newer version of this package.
    """
    address = address or os.environ.get(VARIABLE) or f"sqlite:///{DEFAULT}"
    try:
        url = sa.make_url(address)
        if url.get_backend_name() == "sqlite":
            if url.database:
                Path(url.database).parent.mkdir(parents=True, exist_ok=True)
            engine = sa.create_engine(url, connect_args={"timeout": _WAIT})
        else:
            engine = sa.create_engine(url, pool_pre_ping=True)
    except (sa.exc.ArgumentError, sa.exc.NoSuchModuleError, ModuleNotFoundError) as e:
        why = f"install its driver ({e})" if isinstance(e, ModuleNotFoundError) else "not a database's address"
        raise UserError(f"{VARIABLE}: {why}") from None  # the address itself may hold a password
    with _database_errors():
        _upgrade(engine)
    return Decisions(engine)


def _upgrade(engine: sa.Engine) -> None:
    """Bring the table up to date, in one transaction."""
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    config = Config()
    config.set_main_option("script_location", str(files("panda_ad.inspect") / "migrations").replace("%", "%%"))
    with engine.begin() as connection:
        if engine.dialect.name == "sqlite":  # two processes may start at once
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        elif engine.dialect.name == "postgresql":
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(5713401)")
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError:
            raise UserError("decisions: the table is of a newer panda-ad; update panda-ad") from None


@contextmanager
def _database_errors() -> Iterator[None]:
    """Raise what the database says as one line, without its address. IntegrityError passes."""
    try:
        yield
    except sa.exc.IntegrityError:
        raise
    except sa.exc.DBAPIError as e:
        text = " ".join(str(e.orig).split())[:200]
        raise Unavailable(f"decisions: the database does not take it ({text}); nothing was recorded") from None
