# SPDX-License-Identifier: Apache-2.0
"""Who moved which alias, when, from where to where and why: append-only tags of the registered model, one per move.

A move is recorded before it is made, and its record is marked as done afterwards. So the records say at any time what
happened. If a record is not marked, those that follow it show whether the alias moved. If the alias is elsewhere than
the records say, someone moved it by hand in MLflow. The version before, and which versions are held back, are computed
from the records and stored nowhere.
"""

from __future__ import annotations

import json
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from panda_ad.registry.provenance import prefect_run, user

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

Move = dict[str, Any]
"""A record: action (promote, rollback, confirm, by hand), alias, from, to, why, when, who, prefect_run, done.

`key` is the name of its tag.
"""

ALIASES = ("staging", "champion")
BY_HAND = "by hand"
_PREFIX = "panda.audit."
_NAMED = "asked for version "
_BEHALF: ContextVar[tuple[str, str]] = ContextVar("behalf", default=("", ""))


@contextmanager
def on_behalf(who: str, why: str = "") -> Iterator[None]:
    """Let the records within name a person, such as one at the inspector's page, and that person's reason."""
    token = _BEHALF.set((who, " ".join(why.split())[:500]))
    try:
        yield
    finally:
        _BEHALF.reset(token)


def acting() -> tuple[str, str]:
    """Return who acts, the person named if one is, with the account; and that person's reason, '' if none was given."""
    person, reason = _BEHALF.get()
    account = f"{user()}@{socket.gethostname()}"
    return f"{person} ({account})" if person else account, reason


def now() -> str:
    """Return the time, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def record(
    client: MlflowClient, model: RegisteredModel, action: str, alias: str, moved: tuple[str | None, str], why: str
) -> Move:
    """Record the intent to move `alias` from one version (None: it is not set) to another.

    `mark_done` follows the move itself.
    """
    when = now()
    key = f"{_PREFIX}{when.replace(':', '').replace('+0000', 'Z')}"  # MLflow's tag names allow no '+'
    own = secrets.token_hex(4)  # two machines whose clocks are behind would take the same name
    last = max((k for k in model.tags if k.startswith(_PREFIX)), default="")
    who, reason = acting()
    why = f"{why}; {reason}" if reason else why
    move = {
        "action": action, "alias": alias, "from": moved[0], "to": moved[1], "why": why, "when": when,
        "who": who, "prefect_run": prefect_run() or None, "done": False,
        # where another machine's clock is ahead: the order is that of the moves
        "key": f"{key}-{own}" if key > last else f"{last}z{own}",
    }  # fmt: skip
    _write(client, model.name, move)
    return move


def meanwhile(before: RegisteredModel, after: RegisteredModel, move: Move) -> list[Move]:
    """Return the records of the alias of `move` that were written between two looks, but for `move`; oldest first."""
    known = {*before.tags, move["key"]}
    return [m for m in records(after) if m["alias"] == move["alias"] and m["key"] not in known]


def mark_done(client: MlflowClient, name: str, move: Move) -> None:
    """Mark a recorded move as made."""
    move["done"] = True
    _write(client, name, move)


def _write(client: MlflowClient, name: str, move: Move) -> None:
    client.set_registered_model_tag(name, move["key"], _text(move) + json.dumps(_public(move), ensure_ascii=False))


def _text(move: Move) -> str:
    """Return a move in words, for readers of MLflow's pages; the record itself follows it."""
    came = f"from version {move['from']} " if move["from"] is not None else ""
    return f"{move['action']} @{move['alias']} {came}to version {move['to']}: {move['why']}\n"


def _public(move: Move) -> Move:
    return {k: v for k, v in move.items() if k != "key"}


def records(model: RegisteredModel) -> list[Move]:
    """Return the records as they are stored, oldest first.

    Records from before moves were recorded ahead are of moves that were made.
    """
    tags = sorted((key, value) for key, value in model.tags.items() if key.startswith(_PREFIX))
    return [{"done": True, **json.loads(value.rpartition("\n")[2]), "key": key} for key, value in tags]


def history(model: RegisteredModel) -> list[Move]:
    """Return what happened to the aliases, oldest first: the records, and between them the moves made by hand.

    Each record is `done` or not. One that is not was made if the alias went on from where it led to. A move by hand
    that puts the alias back where it came from cannot be distinguished from a move that was never made.
    """
    found: list[Move] = []
    latest: dict[str, Move] = {}
    present = {alias: held(model, alias) for alias in ALIASES}
    ends: list[Move] = [{"alias": alias, "from": version} for alias, version in present.items()]
    for move in [*records(model), *ends]:
        alias, start = move["alias"], move["from"]
        last = latest.get(alias)
        place = None if last is None else last["to"]
        if last is not None and start == place:
            last["done"] = True
        elif last is not None and not last["done"] and start == last["from"]:
            pass  # recorded, and never made
        elif start != place:
            found.append(_by_hand(alias, place, start))
        if "to" in move:
            found.append(move)
            latest[alias] = move
    return found


def _by_hand(alias: str, before: str | None, after: str | None) -> Move:
    why = "moved in MLflow, past the gate"
    return {
        "action": BY_HAND, "alias": alias, "from": before, "to": after,
        "why": why, "when": None, "who": None, "prefect_run": None, "done": True,
    }  # fmt: skip


def held(model: RegisteredModel, alias: str) -> str | None:
    """Return the version that an alias points at; None if it is not set."""
    version = model.aliases.get(alias)
    return None if version is None else str(version)


def versions_before(model: RegisteredModel, alias: str) -> list[str]:
    """Return the versions that rolling back leads to, one after the other, nearest first.

    Promotions, moves by hand and rollbacks to a version that was named lead on. A rollback to the version before undoes
    the last of them.
    """
    way: list[str] = []
    for move in history(model):
        if move["alias"] != alias or not move["done"] or move["to"] is None or way[-1:] == [move["to"]]:
            continue
        if move["action"] == "rollback" and not move["why"].startswith(_NAMED) and move["to"] in way:
            del way[len(way) - way[::-1].index(move["to"]) :]
        else:
            way.append(move["to"])
    current = held(model, alias)
    return [version for version in reversed(way) if version != current]


def held_back(model: RegisteredModel, alias: str) -> dict[str, str]:
    """Return the versions that a rollback left and nothing brought back, with the time: promotion passes them over."""
    found: dict[str, str] = {}
    for move in history(model):
        if move["alias"] == alias and move["done"]:
            found.pop(move["to"], None)
            if move["action"] == "rollback" and move["from"] is not None:
                found[move["from"]] = move["when"]
    return found


def set_by_hand(model: RegisteredModel, alias: str) -> bool:
    """Return whether the version that an alias points at was put there past `promote` and `rollback`."""
    moves = [m for m in history(model) if m["alias"] == alias and m["done"]]
    return held(model, alias) is not None and bool(moves) and moves[-1]["action"] == BY_HAND


def unfinished(model: RegisteredModel, alias: str) -> Move | None:
    """Return the last record of an alias, where the move was made and the record not marked; else None."""
    recorded = [m for m in records(model) if m["alias"] == alias]
    last = recorded[-1] if recorded else None
    return last if last is not None and not last["done"] and last["to"] == held(model, alias) else None


def named(version: str) -> str:
    """Return the reason of a rollback to a version that was named."""
    return f"{_NAMED}{version}"
