# SPDX-License-Identifier: Apache-2.0
"""An alias moves in an order that survives a crash at any point: recorded, made, and marked as made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from panda_ad.registry import audit
from panda_ad.registry.versions import existing, registered

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

_STORED_PREVIOUS = {"staging": "previous", "champion": "previous-champion"}
"""Aliases that earlier versions of this package kept; they are computed now, and one that stayed would be wrong."""


def move_alias(client: MlflowClient, model: RegisteredModel, action: str, alias: str, version: str, why: str) -> None:
    """Record the move, make it, and mark it as made."""
    move = audit.record(client, model, action, alias, (audit.held(model, alias), version), why)
    if _STORED_PREVIOUS[alias] in model.aliases:
        client.delete_registered_model_alias(model.name, _STORED_PREVIOUS[alias])
    client.set_registered_model_alias(model.name, alias, version)
    audit.mark_done(client, model.name, move)


def settled(client: MlflowClient, name: str, alias: str) -> RegisteredModel:
    """Return the registered model, after marking a move that was made just before a crash."""
    model = registered(client, name)
    if move := audit.unfinished(model, alias):
        audit.mark_done(client, name, move)
    return registered(client, name) if move else model


def version_before(client: MlflowClient, model: RegisteredModel, alias: str) -> str | None:
    """Return the nearest version that rolling back leads to and that was not deleted; None if there is none."""
    return next((v for v in audit.versions_before(model, alias) if existing(client, model.name, v)), None)
