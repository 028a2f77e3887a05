# SPDX-License-Identifier: Apache-2.0
"""Where a category stands in the registry, in words: what the gate said of a version, and what is in place instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from panda_ad.registry import audit
from panda_ad.registry.standing import standing

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

_ALIAS = "staging"
_GATE = f"gate.{_ALIAS}"


def overview(client: MlflowClient, model: RegisteredModel, category: str, version: str) -> list[str]:
    """Return what the gate said of a version and, where another one is at @staging or none is, a line on that one."""
    found = client.get_model_version(model.name, version)
    current = audit.held(model, _ALIAS)
    lines = [f"version {version} {_verdict(client, model, category, found)}"]
    if current is None:
        lines.append(f"nothing is @{_ALIAS}")
    elif current != version:
        lines.append(_in_place(client, model, current, found))
    return lines


def _verdict(client: MlflowClient, model: RegisteredModel, category: str, version: ModelVersion) -> str:
    """Return what became of a version, as its tags and the audit records have it."""
    number, tags = str(version.version), version.tags
    outcome, _, when = tags.get(_GATE, "").partition(" ")
    day = when[:10]
    if number == audit.held(model, _ALIAS):
        if note := standing(client, model, _ALIAS):
            return f"is @{_ALIAS}: {note}; `panda-ad promote -c {category} --in-place` evaluates its rules"
        last = [m for m in audit.history(model) if m["alias"] == _ALIAS and m["done"]][-1]
        return f"is @{_ALIAS} since {last['when'][:10]} ({last['why']})"
    if back := audit.held_back(model, _ALIAS).get(number):
        again = f"`panda-ad rollback {category} --to-version {number}` puts it back"
        return f"is held back: it was rolled back on {back[:10]}; {again}"
    if not outcome or tags.get(f"{_GATE}.run", tags["panda.run"]) != tags["panda.run"]:
        return f"was not put to the gate yet: `panda-ad promote -c {category}`"
    if outcome == "promoted":
        return f"passed the gate on {day}, and another one took its place"
    failed = [
        f"{key.removeprefix(f'{_GATE}.')}: {text.removeprefix('FAILED: ')}" for key, text in failures(tags).items()
    ]
    return f"was refused on {day}: {'; '.join(failed)}"


def failures(tags: Mapping[str, str]) -> dict[str, str]:
    """Return a version's tags of the rules that it failed."""
    return {
        key: text for key, text in sorted(tags.items()) if key.startswith(f"{_GATE}.") and text.startswith("FAILED")
    }


def _in_place(client: MlflowClient, model: RegisteredModel, number: str, other: ModelVersion) -> str:
    """Return which version is in place, and how good it was when it was evaluated."""
    tags = client.get_model_version(model.name, number).tags
    figures = {k: float(v) for k in _SHOWN if (v := tags.get(f"panda.{k}")) is not None}
    said = [f"version {number} is @{_ALIAS}"]
    if "image_auroc" in figures:
        ends = [f"{figures[k]:.4f}" for k in ("image_auroc_low", "image_auroc_high") if k in figures]
        said.append(f"image AUROC {figures['image_auroc']:.4f}" + (f" [{', '.join(ends)}]" if len(ends) == 2 else ""))
    if "recall" in figures:
        said.append(f"caught {100 * figures['recall']:.0f} %")
    if "false_alarm_rate" in figures:
        said.append(f"false alarms {100 * figures['false_alarm_rate']:.0f} %")
    if tags.get("panda.test_images") != other.tags.get("panda.test_images"):
        said.append("measured on other test images")
    if (caution := tags.get(f"{_GATE}.caution", "none")) != "none":
        said.append(f"caution: {caution}")
    if note := standing(client, model, _ALIAS):
        said.append(note)
    return ", ".join(said)


_SHOWN = ("image_auroc", "image_auroc_low", "image_auroc_high", "recall", "false_alarm_rate")
