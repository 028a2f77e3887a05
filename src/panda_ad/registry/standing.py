# SPDX-License-Identifier: Apache-2.0
"""How the version at an alias came there, in words: said by promotion, summary, monitoring and scoring alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from panda_ad.registry import audit

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel


def standing(client: MlflowClient, model: RegisteredModel, alias: str) -> str:
    """Return '' if the version at an alias was put there by `promote` or `rollback`.

    Otherwise say that it was moved by hand, and what the gate had said.
    """
    if not audit.set_by_hand(model, alias):
        return ""
    version = audit.held(model, alias)
    assert version is not None
    outcome, _, when = client.get_model_version(model.name, version).tags.get(f"gate.{alias}", "").partition(" ")
    decided = {"promoted": "the rules had passed it", "refused": "the gate had refused it"}.get(outcome)
    return f"version {version} was set by hand, {f'{decided} on {when[:10]}' if decided else 'never judged'}"
