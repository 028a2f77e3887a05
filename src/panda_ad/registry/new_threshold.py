# SPDX-License-Identifier: Apache-2.0
"""The version in place with another threshold: a version of its own, through the gate, with a run that reproduces it.

Scores stay as they are. The new bundle differs in the false-alarm rate and the threshold that follows from it. The new
run holds the old one's files, with the parameter and the figures that depend on the threshold changed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from panda_ad.errors import UserError
from panda_ad.evaluation.image_metrics import binomial_interval
from panda_ad.params import Params, load_params, plain_name
from panda_ad.registry import audit, moves, promote, runs
from panda_ad.registry.connection import connect, mlflow_errors
from panda_ad.registry.evidence import artifact, score_table
from panda_ad.registry.names import model_name
from panda_ad.registry.run_inputs import TAG, bundle_hash, inputs_hash
from panda_ad.registry.versions import NewVersion, bundle_of, register
from panda_ad.scoring.bundle import load_bundle, save_bundle
from panda_ad.scoring.detector import Detector
from panda_ad.system.files import write_json
from panda_ad.system.lock import repository_lock
from panda_ad.system.paths import BUILD

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

_ALIAS = "staging"
_FILES = ("params.yaml", "dvc.yaml", "dvc.lock", "data.dvc", "requirements.lock")
_EVALUATED = ("metrics.json", "intervals.json", "scores.csv", "roc.csv", "history.csv", "adapt.json")
_OF_A_VERSION = ("gate.", "panda.monitored", "panda.drift")
"""Beginnings of the tags that another version does not take over."""


def set_threshold(category: str, rate: float) -> promote.Decision:
    """Register the version at @staging with another false-alarm rate, and put it there if the gate lets it through.

    Parameters
    ----------
    rate : share of good parts that may raise an alarm, in (0, 1).

    Returns
    -------
    The gate's decision, 'promoted' or 'refused' with its rules. A refused version stays registered, as any other.

    Raises
    ------
    UserError
        Unknown category, no version in place, it has that rate already, or MLflow does not answer.
    """
    params = load_params()
    if category not in params.categories or not 0 < rate < 1:
        raise UserError(f"{category}: a category of params.yaml and a rate between 0 and 1 are expected, found {rate}")
    with repository_lock(f"set threshold of {category}"), mlflow_errors():
        client = connect()
        model = moves.settled(client, model_name(params.dataset, category), _ALIAS)
        current = audit.held(model, _ALIAS)
        if current is None:
            raise UserError(f"{model.name}: no version @{_ALIAS}; `panda-ad promote` puts one there")
        old = client.get_model_version(model.name, current)
        before = float(old.tags["panda.budget"])
        if before == rate:
            raise UserError(f"{model.name} version {current}: its false-alarm rate is {rate:.4g} already")
        version = _registered(client, params, category, old, rate)
        known = promote.Decision(category, model.name, _ALIAS, str(version.version), current, "refused", "")
        decision = promote.by_rules(client, params, model, version, known)
        promote.record(client, decision, version)
        if decision.outcome == "promoted":  # @challenger too: the next promotion would put the former one back
            client.set_registered_model_alias(model.name, promote.SOURCE[_ALIAS], version.version)
            why = f"false-alarm rate {before:.4g} to {rate:.4g}; {decision.reason}"
            moves.move_alias(client, model, "promote", _ALIAS, str(version.version), why)
    write_json(BUILD / "decisions" / f"{category}.json", promote.as_json(decision))
    return decision


def _registered(client: MlflowClient, params: Params, category: str, old: ModelVersion, rate: float) -> ModelVersion:
    """Register a copy of a version with another rate."""
    with tempfile.TemporaryDirectory(prefix="panda-threshold-") as scratch:
        bundle = Path(scratch) / "bundle"
        bundle.mkdir()
        detector = _changed(load_bundle(bundle_of(client, old), rate), str(old.version))
        save_bundle(detector, bundle)
        limit, content = detector.threshold().value, bundle_hash(bundle)
        run = _run_with(client, old, rate)
        figures = _copy_files(client, params, old, run, Path(scratch) / "run", limit)
        prefix = plain_name(category)
        runs.log_metrics(client, run, {f"{prefix}/{k}": v for k, v in figures.items()})
        run = client.get_run(run.info.run_id)
        tags = {k: v for k, v in old.tags.items() if not k.startswith(_OF_A_VERSION)}
        tags |= {
            "panda.bundle": content, "panda.budget": repr(rate), "panda.run": run.info.run_id, TAG: run.data.tags[TAG],
            promote.DERIVED: old.tags.get(promote.DERIVED, old.tags["panda.bundle"]),
        }  # fmt: skip
        tags |= {f"panda.{k}": f"{v:.6g}" for k, v in figures.items() if f"panda.{k}" in old.tags}
        measured = [f"{prefix}/{k}" for k in figures]
        new = NewVersion(old.name, prefix, bundle, content, detector.thumbnails[0], tags, measured)
        version = register(client, run, new)
        client.set_terminated(run.info.run_id)
    about = f"Version {old.version} with false-alarm rate {rate:.4g} in place of {float(old.tags['panda.budget']):.4g}."
    client.update_model_version(old.name, version.version, f"{about}\n\n{old.description or ''}".strip())
    return version


def _changed(detector: Detector, version: str) -> Detector:
    """Return a detector whose provenance names the versions that score as it does."""
    provenance = dict(detector.config.provenance)
    provenance["scores_of_versions"] = [*provenance.get("scores_of_versions", []), version]
    return replace(detector, config=detector.config.model_copy(update={"provenance": provenance}))


def _run_with(client: MlflowClient, old: ModelVersion, rate: float) -> Run:
    """Create a run with the parameters and tags of a version's run, but for the rate."""
    from mlflow.entities import Param

    source = client.get_run(old.tags["panda.run"])
    kept = ("mlflow.source.", "mlflow.user", "panda.data", "panda.git_dirty")
    tags = {k: v for k, v in source.data.tags.items() if k.startswith(kept)}
    key = f"{inputs_hash(source.data.tags)} verdict.false_alarm_rate={rate!r}"
    tags |= {TAG: hashlib.sha256(key.encode()).hexdigest(), "mlflow.source.name": "panda-ad inspect"}
    name = f"{old.name} version {old.version}, false-alarm rate {rate:.4g}"
    run = client.create_run(source.info.experiment_id, tags=tags, run_name=name)
    values = {**source.data.params, "verdict.false_alarm_rate": json.dumps(rate)}
    items = [Param(k, v) for k, v in values.items()]
    for start in range(0, len(items), 100):  # MLflow's limit
        client.log_batch(run.info.run_id, params=items[start : start + 100])
    return run


def _copy_files(
    client: MlflowClient, params: Params, old: ModelVersion, run: Run, folder: Path, limit: float
) -> dict[str, float]:
    """Log the old run's files of a category as those of the new run; return the category's figures at `limit`."""
    prefix, source = plain_name(old.tags["panda.category"]), old.tags["panda.run"]
    held = {item.path for place in (None, "data", prefix) for item in client.list_artifacts(source, place)}
    wanted = [name for name in _FILES if name in held]
    wanted += [path for path in held if path.startswith("data/") and not path.endswith("data_docs")]
    wanted += [f"{prefix}/{name}" for name in _EVALUATED if f"{prefix}/{name}" in held]
    for path in wanted:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifact(client, source, path), folder / path)
    rate = json.loads(client.get_run(run.info.run_id).data.params["verdict.false_alarm_rate"])
    _change_params(folder / "params.yaml", rate)
    figures = _change_figures(folder / prefix, limit, params.evaluate.confidence)
    client.log_artifacts(run.info.run_id, str(folder))
    return figures


def _change_params(path: Path, rate: float) -> None:
    values = yaml.safe_load(path.read_text(encoding="utf-8")) or {} if path.exists() else {}
    if "verdict" in values:
        values["verdict"]["false_alarm_rate"] = rate
        path.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")


def _change_figures(folder: Path, limit: float, confidence: float) -> dict[str, float]:
    """Compute recall and false alarms at another threshold, with their intervals, as `evaluation.figures` does."""
    table = score_table(folder / "scores.csv")
    table["anomalous"] = table["score"] > limit
    table.to_csv(folder / "scores.csv", index=False)
    figures: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    intervals: dict[str, Any] = {}
    if (folder / "intervals.json").exists():
        intervals = json.loads((folder / "intervals.json").read_text(encoding="utf-8"))
    figures["threshold"] = limit
    for name, label in (("false_alarm_rate", 0), ("recall", 1)):
        chosen = table["score"][table["label"] == label]
        if len(chosen):
            alarms = int((chosen > limit).sum())
            figures[name] = alarms / len(chosen)
            intervals[name] = binomial_interval(alarms, len(chosen), confidence)
    write_json(folder / "metrics.json", figures)
    write_json(folder / "intervals.json", intervals)
    return _numbers(figures)


def _numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in figures.items() if isinstance(v, int | float)}
