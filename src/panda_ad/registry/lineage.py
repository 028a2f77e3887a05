"""From a registered version back to what made it."""

from __future__ import annotations

import shlex
from typing import Any

from panda_ad.registry import audit
from panda_ad.registry.change import plain
from panda_ad.registry.connection import connect, find_version, mlflow_errors, tracking_uri, without_credentials
from panda_ad.registry.versions import registered


def explain_version(name: str, version: int | str = "staging") -> dict[str, Any]:
    """Data version, commit, parameters, run, metrics, decisions and moves of a version, and the commands that reproduce it.

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
        category = tags["panda.category"]
        moves = [m for m in audit.history(client, name) if str(found.version) in (m["from"], m["to"])]
        model = registered(client, name)
        prefix = f"{plain(category)}/"
    commit, dirty = tags.get("panda.commit", ""), tags.get("panda.git_dirty") == "true"
    return {
        "model": name,
        "version": int(found.version),
        "aliases": sorted(a for a, v in model.aliases.items() if str(v) == str(found.version)),
        "category": category,
        "bundle": tags["panda.bundle"],
        "data_hash": tags["panda.data"],
        "change": tags["panda.change"],
        "commit": commit,
        "uncommitted_changes": dirty,
        "tracking_uri": without_credentials(tracking_uri()),
        "run_id": found.run_id,
        "evaluated_in": tags["panda.run"],
        "dvc_experiment": run_tags.get("panda.dvc_experiment"),
        "prefect_run": run_tags.get("panda.prefect_run"),
        "params": dict(run.data.params),
        "metrics": {k.removeprefix(prefix): v for k, v in run.data.metrics.items() if k.startswith(prefix)},
        "gate": {k.removeprefix("gate."): v for k, v in tags.items() if k.startswith("gate.")},
        "moves": moves,
        "reproduce": commands(found.run_id, commit, category),
    }


def commands(run_id: str, commit: str, category: str) -> list[str]:
    """Shell commands that make a version's bundle and figures again, in a fresh clone; parameters and lock file come from the run."""
    uri = shlex.quote(without_credentials(tracking_uri()))
    files = [
        f"MLFLOW_TRACKING_URI={uri} mlflow artifacts download --run-id {run_id} --artifact-path {name} --dst-path ."
        for name in ("params.yaml", "data.dvc")
    ]
    return [
        f"git checkout {commit or 'COMMIT'}",
        *files,
        "dvc pull data.dvc",
        f"dvc repro --pull {shlex.quote(f'evaluate@{category}')}",
    ]
