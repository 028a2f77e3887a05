# SPDX-License-Identifier: Apache-2.0
"""From a registered version back to what made it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from panda_ad.params import plain_name
from panda_ad.registry import audit
from panda_ad.registry.connection import connect, mlflow_errors, tracking_uri, without_credentials
from panda_ad.registry.run_inputs import inputs_hash
from panda_ad.registry.runs import run_intervals
from panda_ad.registry.standing import standing
from panda_ad.registry.versions import bundle_of, find_version, registered

CHANGED = "panda.gallery"
"""Tag of a version whose gallery was changed since it was trained: how many changes its bundle keeps."""


@dataclass(frozen=True)
class Origin:
    """What a version was made from.

    Attributes
    ----------
    run_id : the MLflow run that holds its parameters, data and lock file.
    commit : of the code, '' if none was recorded; `dirty` if the inputs differed from it.
    """

    run_id: str
    commit: str
    dirty: bool
    category: str
    inputs_hash: str
    data_hash: str


def origin_of(run_id: str, tags: Mapping[str, str]) -> Origin:
    """Return a version's origin from its tags."""
    dirty, commit = tags.get("panda.git_dirty") == "true", tags.get("panda.commit", "")
    return Origin(run_id, commit, dirty, tags["panda.category"], inputs_hash(tags), tags["panda.data"])


def explain_version(name: str, version: int | str = "staging") -> dict[str, Any]:
    """Return data version, commit, parameters, run, metrics, decisions and moves of a version.

    The commands that reproduce it are among them.

    Parameters
    ----------
    version : a number, or an alias as '@staging' or 'staging'.

    Raises
    ------
    UserError
        There is no such version, or MLflow does not answer.
    """
    number = str(version).removeprefix("@")
    with mlflow_errors():
        client = connect()
        found = find_version(client, f"{name}/{number}" if number.isdigit() else f"{name}@{number}")
        run = client.get_run(found.run_id)
        tags, run_tags = found.tags, run.data.tags
        origin = origin_of(found.run_id, tags)
        model = registered(client, name)
        aliases = sorted(a for a, v in model.aliases.items() if str(v) == str(found.version))
        prefix = f"{plain_name(origin.category)}/"
        metrics = {k.removeprefix(prefix): v for k, v in run.data.metrics.items() if k.startswith(prefix)}
        return {
            "model": name,
            "version": int(found.version),
            "aliases": aliases,
            "set_by_hand": [note for a in aliases if a in audit.ALIASES and (note := standing(client, model, a))],
            "category": origin.category,
            "bundle": tags["panda.bundle"],
            "data_hash": origin.data_hash,
            "inputs_hash": origin.inputs_hash,
            "commit": origin.commit,
            "uncommitted_changes": origin.dirty,
            "tracking_uri": without_credentials(tracking_uri()),
            "run_id": found.run_id,
            "evaluated_in": tags["panda.run"],
            "dvc_experiment": run_tags.get("panda.dvc_experiment"),
            "prefect_run": run_tags.get("panda.prefect_run"),
            "params": dict(run.data.params),
            "metrics": metrics | run_intervals(client, found.run_id, origin.category),
            "gallery_changes": _gallery_changes(bundle_of(client, found)) if CHANGED in tags else [],
            "gate": {k.removeprefix("gate."): v for k, v in tags.items() if k.startswith("gate.")},
            "moves": [
                {k: v for k, v in m.items() if k != "key"}
                for m in audit.history(model)
                if str(found.version) in (m["from"], m["to"])
            ],
            "reproduce": commands(name, str(found.version), origin),
        }


def _gallery_changes(bundle: Path) -> list[dict[str, Any]]:
    """Return the images added to and removed from a version's gallery since it was trained, oldest change first."""
    about = json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))
    return list(about.get("provenance", {}).get("gallery", []))


def commands(name: str, version: str, origin: Origin) -> list[str]:
    """Return shell commands that make a version's bundle and figures again.

    The first does all at once, the others do each step in a fresh clone. Parameters and data version come from the run,
    since publishing does not wait for a commit.
    """
    uri = shlex.quote(without_credentials(tracking_uri()))
    download = f"MLFLOW_TRACKING_URI={uri} mlflow artifacts download --run-id {origin.run_id}"
    return [
        f"panda-ad reproduce {shlex.quote(name)} {version}",
        f"git checkout {origin.commit or 'COMMIT'}",
        *(f"{download} --artifact-path {file} --dst-path ." for file in ("params.yaml", "data.dvc")),
        "dvc pull data.dvc",
        f"dvc repro --pull {shlex.quote(f'evaluate@{origin.category}')}",
    ]
