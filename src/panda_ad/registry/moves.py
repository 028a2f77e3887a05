# SPDX-License-Identifier: Apache-2.0
"""An alias moves in an order that survives a crash at any point: recorded, made, and marked as made.

MLflow can compare nothing before it sets. So whoever has recorded a move looks once more: of two checkouts that move an
alias at once, the one whose record is written later sees the other's. It takes its own back, unless its name is the
earlier one: then the other one, which may not have seen it, either gives way or finishes, and is waited for.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from panda_ad.errors import Unavailable
from panda_ad.registry import audit
from panda_ad.registry.versions import existing, registered

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

_GIVE_WAY = 30.0
"""Seconds that another checkout has to finish its move or to take it back."""

_STORED_PREVIOUS = {"staging": "previous", "champion": "previous-champion"}
"""Aliases that earlier versions of this package kept; they are computed now, and one that stayed would be wrong."""


def move_alias(client: MlflowClient, model: RegisteredModel, action: str, alias: str, version: str, why: str) -> None:
    """Record the move, make it, and mark it as made.

    Raises
    ------
    Unavailable
        The alias was moved since `model` was read, or is just being moved. Nothing moves, and no record stays.
    """
    move = audit.record(client, model, action, alias, (audit.held(model, alias), version), why)
    if other := _other(client, model, move):
        client.delete_registered_model_tag(model.name, move["key"])
        raise Unavailable(f"{model.name}: @{alias} is moved at the same time {other}; nothing was moved, try again")
    if _STORED_PREVIOUS[alias] in model.aliases:
        client.delete_registered_model_alias(model.name, _STORED_PREVIOUS[alias])
    client.set_registered_model_alias(model.name, alias, version)
    audit.mark_done(client, model.name, move)


def _other(client: MlflowClient, model: RegisteredModel, move: audit.Move) -> str:
    """Return who else moves the alias of a recorded move, or has moved it since `model` was read; '' if nobody."""
    limit = time.monotonic() + _GIVE_WAY
    while True:
        present = registered(client, model.name)
        others = audit.meanwhile(model, present, move)
        if not others:
            return "" if audit.held(present, move["alias"]) == move["from"] else "in MLflow, past the gate"
        first = others[0]
        if first["key"] < move["key"] or any(other["done"] for other in others) or time.monotonic() > limit:
            return f"by {first['who']}, to version {first['to']}"
        time.sleep(0.1)


def settled(client: MlflowClient, name: str, alias: str) -> RegisteredModel:
    """Return the registered model, after marking a move that was made just before a crash."""
    model = registered(client, name)
    if move := audit.unfinished(model, alias):
        audit.mark_done(client, name, move)
    return registered(client, name) if move else model


def version_before(client: MlflowClient, model: RegisteredModel, alias: str) -> str | None:
    """Return the nearest version that rolling back leads to and that was not deleted; None if there is none."""
    return next((v for v in audit.versions_before(model, alias) if existing(client, model.name, v)), None)
