# SPDX-License-Identifier: Apache-2.0
"""What monitoring leaves in MLflow: a run per version with the figures over time, and tags on the version."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from panda_ad.registry import runs
from panda_ad.registry.connection import connect, mlflow_errors
from panda_ad.registry.facts import CONFIRMED, CONFIRMED_ALARMS
from panda_ad.registry.provenance import provenance
from panda_ad.registry.versions import find_version

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


def record_check(dataset: str, model: str, version: str, figures: Mapping[str, Any], files: Sequence[Path]) -> str:
    """Log one check of a version: figures as the next step, files in a folder named by its time, tags on the version.

    The run, in experiment panda-<dataset>-monitoring, carries tags panda.model and panda.version. The version gets
    panda.monitored (when) and panda.drift (the findings of the open alarms, or 'none'). Doing it again for the same
    check logs it once.

    Parameters
    ----------
    figures : `Check.to_dict()` of `panda_ad.monitor.check`.

    Returns
    -------
    The run's id.

    Raises
    ------
    UserError
        There is no such version, or MLflow does not answer.
    """
    with mlflow_errors():
        client = connect()
        find_version(client, f"models:/{model}/{version}")
        run = _run_of(client, runs.experiment_id(client, f"{dataset}-monitoring"), model, version)
        if run.data.tags.get("panda.monitored") != figures["checked"]:
            for file in files:
                client.log_artifact(run.info.run_id, str(file), figures["checked"].replace(":", ""))
            _log_metrics(client, run, figures)
            client.set_tag(run.info.run_id, "panda.monitored", figures["checked"])
        client.set_terminated(run.info.run_id)
        client.set_model_version_tag(model, version, "panda.monitored", figures["checked"])
        known = [finding for alarm in figures["open"] for finding in alarm["findings"]]
        client.set_model_version_tag(model, version, "panda.drift", "; ".join(dict.fromkeys(known)) or "none")
        return str(run.info.run_id)


def record_promise(model: str, version: str, alarms: int, images: int, verdict: str) -> None:
    """Tag a version with what became of its false-alarm budget: the gate's rule and MLflow's page read it there.

    Parameters
    ----------
    alarms, images : on parts that were confirmed good after it had scored them.  verdict : in words.

    Raises
    ------
    UserError
        There is no such version, or MLflow does not answer.
    """
    with mlflow_errors():
        client = connect()
        find_version(client, f"models:/{model}/{version}")
        for key, value in ((CONFIRMED, str(images)), (CONFIRMED_ALARMS, str(alarms)), ("panda.promise", verdict)):
            client.set_model_version_tag(model, version, key, value)


def _run_of(client: MlflowClient, experiment: str, model: str, version: str) -> Run:
    found = client.search_runs(
        [experiment], f"tags.`panda.model` = '{model}' AND tags.`panda.version` = '{version}'", max_results=1
    )
    if found:
        return found[0]
    tags = {**provenance(), "mlflow.source.name": "panda-ad monitor", "panda.model": model, "panda.version": version}
    return client.create_run(experiment, tags=tags, run_name=f"{model} version {version}")


def _log_metrics(client: MlflowClient, run: Run, figures: Mapping[str, Any]) -> None:
    from mlflow.entities import Metric

    known = client.get_metric_history(run.info.run_id, "images") if "images" in run.data.metrics else []
    step = max((m.step for m in known), default=-1) + 1
    values: dict[str, float] = {"images": figures["window"], "drifted": float(figures["drifted"])}
    for test in figures["tests"]:
        name = test["name"]
        values |= {f"shift/{name}": test["shift"], f"p_value/{name}": test["p_value"]}
        if test["after"] is not None:
            values[f"value/{name}"] = test["after"]
    values |= {f"evidence/{name}": value for name, value in figures["evidence"].items()}
    now = int(time.time() * 1000)
    client.log_batch(
        run.info.run_id, metrics=[Metric(k, float(v), now, step) for k, v in values.items() if math.isfinite(v)]
    )
