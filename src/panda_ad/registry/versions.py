# SPDX-License-Identifier: Apache-2.0
"""Registered versions: found by name, downloaded, and registered once per content."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from panda_ad.errors import UserError
from panda_ad.registry import audit
from panda_ad.registry.connection import connect, first_line, mlflow_errors, tracking_uri, without_credentials
from panda_ad.registry.model_files import save
from panda_ad.registry.standing import standing
from panda_ad.scoring.checksums import damage
from panda_ad.system.files import atomic_folder

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

_MODELS = Path(".cache/models")


def find_version(client: MlflowClient, model: str) -> ModelVersion:
    """Return the registered version that `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `NAME/VERSION` names.

    Raises
    ------
    UserError
        It is not written like that, or there is no such model, alias or version.
    """
    from mlflow.exceptions import MlflowException

    text = unquote(model.removeprefix("models:").strip("/"))
    name, at, alias = text.partition("@")
    number = ""
    if not at:
        name, _, number = text.rpartition("/")
    if not name or not (alias if at else number.isdigit()):
        raise UserError(f"{model}: write models:/NAME@staging or models:/NAME/VERSION")
    try:
        return client.get_model_version_by_alias(name, alias) if at else client.get_model_version(name, number)
    except MlflowException as e:
        if e.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        there = f"{model}: no such model, version or alias at {without_credentials(tracking_uri())}"
        raise UserError(f"{there}{_aliases(client, name)} ({first_line(e)})") from None


def _aliases(client: MlflowClient, name: str) -> str:
    """'; NAME has @a, @b' for a model that there is, else ''."""
    from mlflow.exceptions import MlflowException

    try:
        aliases = sorted(client.get_registered_model(name).aliases)
    except MlflowException:
        return ""
    return f"; {name} has {', '.join(f'@{alias}' for alias in aliases) or 'no aliases'}"


def download_version(model: str) -> tuple[str, str, Path]:
    """Name, version number and bundle folder of a registered version, e.g. 'models:/panda-sample-fabric@staging'.

    The folder is its own place where that is on this machine, else a copy in .cache/models.

    Raises
    ------
    UserError
        There is no such version, its server does not answer, or its files are gone.
    """
    with mlflow_errors():
        client = connect()
        version = find_version(client, model)
        return version.name, str(version.version), bundle_of(client, version)


def version_number(model: str) -> str:
    """Return which version an address names now, e.g. 'models:/panda-sample-fabric@staging'; UserError if none."""
    with mlflow_errors():
        return str(find_version(connect(), model).version)


def note_on(model: str) -> str:
    """Return '' or, where `models:/NAME@ALIAS` is asked for and a hand put the alias there, a line that says so."""
    name, _, alias = unquote(model.removeprefix("models:").strip("/")).partition("@")
    if alias not in audit.ALIASES:
        return ""
    with mlflow_errors():
        client = connect()
        return standing(client, registered(client, name), alias)


def bundle_of(client: MlflowClient, version: ModelVersion) -> Path:
    """Return the bundle folder of a version already looked up; see `download_version`."""
    import mlflow.artifacts

    if (folder := _local_folder(client, version)) is not None:
        category = version.tags["panda.category"]
        again = f"`dvc repro --force --single-item publish@{category}` puts them back where the bundle is the same"
        if not folder.is_dir():
            raise UserError(f"{version.name} version {version.version}: its files are gone from {folder}; {again}")
        if found := damage(folder):
            raise UserError(f"{version.name} version {version.version}: damaged, {found} in {folder}; {again}")
        return folder
    uri = _bundle_uri(client, version)
    kept = _MODELS / version.tags["panda.bundle"]
    if not kept.is_dir() or damage(kept):
        with atomic_folder(kept) as folder:
            mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder))
            if (folder / "bundle").is_dir():  # MLflow puts the folder itself below dst_path
                for item in (folder / "bundle").iterdir():
                    item.rename(folder / item.name)
                (folder / "bundle").rmdir()
    return kept


def _bundle_uri(client: MlflowClient, version: ModelVersion) -> str:
    return client.get_model_version_download_uri(version.name, version.version) + "/artifacts/bundle"


def _local_folder(client: MlflowClient, version: ModelVersion) -> Path | None:
    """Return a version's bundle folder, there or gone, where its own place is on this machine; else None."""
    uri = _bundle_uri(client, version)
    return Path(unquote(urlsplit(uri).path)) if uri.startswith(("file:", "/")) else None


def holding(client: MlflowClient, name: str, content: str) -> ModelVersion | None:
    """Return the version of a registered model that holds the bundle of hash `content`, the newest of several.

    None if there is none.
    """
    found = client.search_model_versions(f"name = '{name}' AND tags.`panda.bundle` = '{content}'")
    return max(found, key=lambda v: int(v.version), default=None)


def ensure_model(client: MlflowClient, name: str, description: str) -> None:
    """Create the registered model where it is not there."""
    from mlflow.exceptions import MlflowException

    try:
        client.get_registered_model(name)
    except MlflowException as e:
        if e.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        try:
            client.create_registered_model(name, description=description)
        except MlflowException as again:
            if again.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


@dataclass(frozen=True)
class NewVersion:
    """A version to be registered.

    Attributes
    ----------
    name : of the registered model.  label : of the logged model within the run.
    bundle, content : the bundle's folder, and its hash.  example : an image file, for the model's input example.
    tags : of the version.  metrics : names of the run's figures that the version's page shows too.
    """

    name: str
    label: str
    bundle: Path
    content: str
    example: bytes
    tags: Mapping[str, str]
    metrics: Sequence[str]


def register(client: MlflowClient, run: Run, new: NewVersion) -> ModelVersion:
    """Log a bundle as a model of `run` and register it as a new version.

    The version is created last, in one call with all its tags, from files that are complete: a kill before that leaves
    no version. A logged model that is not ready, which such a kill leaves, is taken up by the next call.
    """
    from mlflow.entities import LoggedModelOutput, Metric

    experiment, run_id = run.info.experiment_id, run.info.run_id
    query = f"source_run_id = '{run_id}' AND tags.`panda.bundle` = '{new.content}'"
    model = next(iter(client.search_logged_models([experiment], filter_string=query)), None)
    if model is None:
        tags = {"panda.bundle": new.content}
        model = client.create_logged_model(experiment, new.label, run_id, tags=tags, model_type="anomaly detector")
    if str(model.status) != "READY":
        _upload(client, model.model_id, new.bundle, new.example)
        outputs = client.get_run(run_id).outputs
        if model.model_id not in {o.model_id for o in (outputs.model_outputs if outputs else [])}:  # twice is an error
            client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        latest = [client.get_metric_history(run_id, key)[-1] for key in new.metrics]
        # equal to what the run has in every part, so that the run keeps one value of each
        linked = [Metric(m.key, m.value, m.timestamp, m.step, model_id=model.model_id, run_id=run_id) for m in latest]
        client.log_batch(run_id, metrics=linked)
        client.finalize_logged_model(model.model_id, "READY")
    source = f"models:/{model.model_id}"
    return client.create_model_version(new.name, source, run_id, tags=dict(new.tags), model_id=model.model_id)


def _upload(client: MlflowClient, model_id: str, bundle: Path, example: bytes) -> None:
    """Upload a bundle as the files of a logged model."""
    model = client.get_logged_model(model_id)
    with tempfile.TemporaryDirectory(prefix="panda-model-") as folder:
        save(Path(folder) / "model", bundle, example, model.artifact_location, str(model.source_run_id), model_id)
        client.log_model_artifacts(model_id, str(Path(folder) / "model"))


def restore_files(client: MlflowClient, version: ModelVersion, bundle: Path, example: bytes) -> None:
    """Upload a version's files again where its own place on this machine has lost them, or they are damaged."""
    folder = _local_folder(client, version)
    if folder is not None and (not folder.is_dir() or damage(folder)):
        _upload(client, str(version.source).rpartition("/")[2], bundle, example)


def existing(client: MlflowClient, name: str, number: str) -> ModelVersion | None:
    """Return a version; None if it was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(name, number)
    except MlflowException as e:
        if e.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def registered(client: MlflowClient, name: str) -> RegisteredModel:
    """Return a registered model, with aliases and tags; raise UserError if it is not there."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as e:
        if e.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise UserError(f"{name}: no such registered model; run `dvc repro` to publish one") from None
