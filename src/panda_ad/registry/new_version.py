# SPDX-License-Identifier: Apache-2.0
"""A version made from the one in place without training: registered with a run of its own, through the gate.

The new run holds the old one's files, with the parameters and figures that differ. If the gate lets it through, the
version is put in place; the old one stays, and rolling back returns to it.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from panda_ad.errors import UserError
from panda_ad.params import Params, plain_name
from panda_ad.registry import audit, moves, promote, runs
from panda_ad.registry.connection import connect, mlflow_errors
from panda_ad.registry.evidence import artifact
from panda_ad.registry.names import model_name
from panda_ad.registry.run_inputs import TAG, bundle_hash, inputs_hash
from panda_ad.registry.versions import NewVersion, bundle_of, register
from panda_ad.scoring.bundle import save_bundle
from panda_ad.scoring.detector import Detector
from panda_ad.system.files import write_json
from panda_ad.system.lock import repository_lock
from panda_ad.system.paths import BUILD

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

_ALIAS = "staging"
_FILES = ("params.yaml", "dvc.yaml", "dvc.lock", "data.dvc", "requirements.lock")
_EVALUATED = ("metrics.json", "intervals.json", "scores.csv", "roc.csv", "history.csv", "adapt.json")
_OF_A_VERSION = ("gate.", "panda.monitored", "panda.drift")
"""Beginnings of the tags that another version does not take over."""


@dataclass(frozen=True)
class Held:
    """The version in place of a category.

    Attributes
    ----------
    model, version : as MLflow has them.
    number : of the version.
    """

    client: MlflowClient
    params: Params
    category: str
    model: RegisteredModel
    version: ModelVersion

    @property
    def number(self) -> str:
        """The version's number."""
        return str(self.version.version)

    @property
    def bundle(self) -> Path:
        """Folder of its bundle."""
        return bundle_of(self.client, self.version)

    @contextmanager
    def file(self, path: str) -> Iterator[Path]:
        """Give an artifact of its run as a file for a while. UserError where it is gone."""
        content = artifact(self.client, self.version.tags["panda.run"], path)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / Path(path).name
            file.write_bytes(content)
            yield file


@dataclass(frozen=True)
class Successor:
    """A version that differs from the one in place.

    Attributes
    ----------
    detector : its model.
    difference : what differs, in words; part of the new run's inputs hash and of its name.
    command : that makes it.
    about : first line of the version's description.
    why : of the audit record.
    values : parameters of the run that differ.
    tags : of the version that differ.
    """

    detector: Detector
    difference: str
    command: str
    about: str
    why: str
    values: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


Rewrite = Callable[[Path], None]
"""rewrite(folder): change the new run's files, which `folder` holds as the run's artifacts lie there."""


@contextmanager
def version_in_place(params: Params, category: str) -> Iterator[Held]:
    """Give the version at @staging.

    Raises
    ------
    UserError
        Unknown category, no version in place, or MLflow does not answer.
    """
    if category not in params.categories:
        raise UserError(f"{category}: no such category in params.yaml, which has {', '.join(params.categories)}")
    with mlflow_errors():
        client = connect()
        model = moves.settled(client, model_name(params.dataset, category), _ALIAS)
        current = audit.held(model, _ALIAS)
        if current is None:
            raise UserError(f"{model.name}: no version @{_ALIAS}; `panda-ad promote` puts one there")
        yield Held(client, params, category, model, client.get_model_version(model.name, current))


@contextmanager
def version_to_change(params: Params, category: str, what: str) -> Iterator[Held]:
    """Do as `version_in_place` does, and hold the repository's lock. Busy where another run holds it."""
    with repository_lock(what), version_in_place(params, category) as held:
        yield held


def succeed(held: Held, new: Successor, rewrite: Rewrite) -> promote.Decision:
    """Register a version and put it in place if the gate lets it through.

    Returns
    -------
    The gate's decision, 'promoted' or 'refused' with its rules. A refused version stays registered, as any other.
    """
    client, current = held.client, held.number
    version = _registered(held, new, rewrite)
    number = str(version.version)
    known = promote.Decision(held.category, held.model.name, _ALIAS, number, current, "refused", "")
    decision = promote.by_rules(client, held.params, held.model, version, known)
    promote.record(client, decision, version)
    if decision.outcome == "promoted":  # @challenger too: the next promotion would put the former one back
        client.set_registered_model_alias(held.model.name, promote.SOURCE[_ALIAS], version.version)
        moves.move_alias(client, held.model, "promote", _ALIAS, number, f"{new.why}; {decision.reason}")
    write_json(BUILD / "decisions" / f"{held.category}.json", promote.as_json(decision))
    return decision


def _registered(held: Held, new: Successor, rewrite: Rewrite) -> ModelVersion:
    client, old, prefix = held.client, held.version, plain_name(held.category)
    with tempfile.TemporaryDirectory(prefix="panda-version-") as scratch:
        bundle, folder = Path(scratch) / "bundle", Path(scratch) / "run"
        bundle.mkdir()
        save_bundle(new.detector, bundle)
        content = bundle_hash(bundle)
        run = _new_run(held, new)
        _old_files(held, folder)
        rewrite(folder)
        client.log_artifacts(run.info.run_id, str(folder))
        figures = _numbers(json.loads((folder / prefix / "metrics.json").read_text(encoding="utf-8")))
        runs.log_metrics(client, run, {f"{prefix}/{k}": v for k, v in figures.items()})
        run = client.get_run(run.info.run_id)
        tags = {k: v for k, v in old.tags.items() if not k.startswith(_OF_A_VERSION)}
        tags |= {
            "panda.bundle": content, "panda.run": run.info.run_id, TAG: run.data.tags[TAG],
            promote.DERIVED: old.tags.get(promote.DERIVED, old.tags["panda.bundle"]), **new.tags,
        }  # fmt: skip
        tags |= {f"panda.{k}": f"{v:.6g}" for k, v in figures.items() if f"panda.{k}" in old.tags}
        measured = [f"{prefix}/{k}" for k in figures]
        version = register(
            client, run, NewVersion(old.name, prefix, bundle, content, new.detector.thumbnails[0], tags, measured)
        )
        client.set_terminated(run.info.run_id)
    client.update_model_version(old.name, version.version, f"{new.about}\n\n{old.description or ''}".strip())
    return version


def _new_run(held: Held, new: Successor) -> Run:
    """Create a run with the parameters and tags of the old version's run, but for what differs."""
    from mlflow.entities import Param

    client, old = held.client, held.version
    source = client.get_run(old.tags["panda.run"])
    kept = ("mlflow.source.", "mlflow.user", "panda.data", "panda.git_dirty")
    tags = {k: v for k, v in source.data.tags.items() if k.startswith(kept)}
    key = f"{inputs_hash(source.data.tags)} {new.difference}"
    tags |= {TAG: hashlib.sha256(key.encode()).hexdigest(), "mlflow.source.name": new.command}
    name = f"{old.name} version {old.version}, {new.difference}"[:200]
    run = client.create_run(source.info.experiment_id, tags=tags, run_name=name)
    values = {**source.data.params, **{k: json.dumps(v) for k, v in new.values.items()}}
    items = [Param(k, v) for k, v in values.items()]
    for start in range(0, len(items), 100):  # MLflow's limit
        client.log_batch(run.info.run_id, params=items[start : start + 100])
    return run


def _old_files(held: Held, folder: Path) -> None:
    """Copy the files of the old version's run that belong to its category."""
    client, prefix, source = held.client, plain_name(held.category), held.version.tags["panda.run"]
    there = {item.path for place in (None, "data", prefix) for item in client.list_artifacts(source, place)}
    wanted = [name for name in _FILES if name in there]
    wanted += [path for path in there if path.startswith("data/") and not path.endswith("data_docs")]
    wanted += [f"{prefix}/{name}" for name in _EVALUATED if f"{prefix}/{name}" in there]
    for path in wanted:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(artifact(client, source, path))


def _numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in figures.items() if isinstance(v, int | float)}
