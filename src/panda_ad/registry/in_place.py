# SPDX-License-Identifier: Apache-2.0
"""What is in place of a category, where it comes from, and what happened to the alias; for people to look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from panda_ad.registry import audit
from panda_ad.registry.connection import connect, mlflow_errors, tracking_uri, without_credentials
from panda_ad.registry.lineage import explain_version
from panda_ad.registry.overview import overview
from panda_ad.registry.versions import registered

_ALIAS = "staging"
_LEARNING = "?workflowType=machine_learning"
"""MLflow's pages open among its tools for language models without it."""


@dataclass(frozen=True)
class InPlace:
    """A category in the registry.

    Attributes
    ----------
    model : registered name.  version : at @staging, None if none is.
    facts : of that version, as `explain_version` gives them; empty without one.
    trained : when it was registered, UTC, ISO 8601; '' without one.
    challenger : number of the newest version, None if there is none.
    said : lines on the newest version and what is in place instead.
    rules : of the newest decision on the newest version: name -> (passed, in words).
    decided : outcome and time of that decision; '' if there was none.
    moves : what happened to the alias, newest first.
    before : versions that rolling back leads to, nearest first.
    url : of the version's run in MLflow; '' without a server.
    """

    model: str
    version: str | None
    facts: Mapping[str, Any]
    trained: str
    challenger: str | None
    said: list[str]
    rules: dict[str, tuple[bool, str]]
    decided: str
    moves: list[audit.Move]
    before: list[str]
    url: str


def in_place(name: str, category: str, server: str = "") -> InPlace:
    """Look a category up.

    Parameters
    ----------
    name : of the registered model.
    server : address of an MLflow server for people; '' for that of the tracking store, if it is one.

    Raises
    ------
    UserError
        There is no such model, or MLflow does not answer.
    """
    with mlflow_errors():
        client = connect()
        model = registered(client, name)
        current, newest = audit.held(model, _ALIAS), audit.held(model, "challenger")
        facts = explain_version(name, current) if current else {}
        tags = client.get_model_version(name, newest).tags if newest else {}
        prefix = f"gate.{_ALIAS}."
        rules = {
            key.removeprefix(prefix): (text.startswith("passed"), text.partition(": ")[2])
            for key, text in sorted(tags.items())
            if key.startswith(prefix) and text.startswith(("passed: ", "FAILED: "))
        }
        version = client.get_model_version(name, current) if current else None
        made = "" if version is None else datetime.fromtimestamp(version.creation_timestamp / 1000, UTC).isoformat()
        where = server or _server()
        experiment = client.get_run(facts["run_id"]).info.experiment_id if where and facts else ""
        return InPlace(
            name, current, facts, made, newest,
            overview(client, model, category, newest) if newest else [],
            rules, tags.get(f"gate.{_ALIAS}", ""),
            [m for m in reversed(audit.history(model)) if m["alias"] == _ALIAS and m["done"]],
            audit.versions_before(model, _ALIAS),
            f"{where}/{_LEARNING}#/experiments/{experiment}/runs/{facts['run_id']}" if experiment else "",
        )  # fmt: skip


def _server() -> str:
    address = without_credentials(tracking_uri())
    return address.rstrip("/") if address.startswith(("http://", "https://")) else ""
