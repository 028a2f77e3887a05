"""Who moved which alias, when, from where to where and why: append-only tags of the registered model, one a move."""

from __future__ import annotations

import json
import socket
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from panda_ad.registry.change import prefect_run, user
from panda_ad.registry.versions import registered

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

_PREFIX = "panda.audit."


def now() -> str:
    """UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def record(
    client: MlflowClient, name: str, *, action: str, alias: str, before: str | None, after: str, why: str
) -> None:
    """Append a move of `alias` from version `before` (None: was not set) to `after`. Earlier records are never touched."""
    when = now()
    entry = {
        "action": action, "alias": alias, "from": before, "to": after, "why": why, "when": when,
        "who": f"{user()}@{socket.gethostname()}", "prefect_run": prefect_run() or None,
    }  # fmt: skip
    stamp = when.replace(":", "").replace("+0000", "Z")  # MLflow's tag names allow no '+'
    client.set_registered_model_tag(name, f"{_PREFIX}{stamp}", json.dumps(entry, ensure_ascii=False))


def records(model: RegisteredModel) -> list[dict[str, Any]]:
    """All moves, oldest first: action, alias, from, to, why, when, who, prefect_run."""
    return [json.loads(value) for key, value in sorted(model.tags.items()) if key.startswith(_PREFIX)]


def history(client: MlflowClient, name: str) -> list[dict[str, Any]]:
    """`records` of a registered model by name. UserError where it is not there."""
    return records(registered(client, name))


def predecessor(moves: list[dict[str, Any]], alias: str, version: str) -> str | None:
    """The version that `alias` held before it was last promoted to `version`; None where it held none or nobody knows."""
    found = [m["from"] for m in moves if m["alias"] == alias and m["to"] == version and m["action"] != "rollback"]
    return found[-1] if found else None
