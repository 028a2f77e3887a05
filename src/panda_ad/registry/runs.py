# SPDX-License-Identifier: Apache-2.0
"""One MLflow run per set of run inputs, written so that doing it again, or again after a kill, adds nothing twice."""

from __future__ import annotations

import csv
import json
import math
import re
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from panda_ad.errors import UserError
from panda_ad.params import Params, plain_name
from panda_ad.registry import connection
from panda_ad.registry.provenance import provenance
from panda_ad.registry.run_inputs import TAG, RunInputs, digest_files
from panda_ad.system.files import digest_file

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

_BATCH = 1000  # metrics per request, MLflow's limit
_PARAMS = 100  # parameters per request, MLflow's limit
RUN_FILES = ("params.yaml", "dvc.lock", "data.dvc")
"""What of a run is put in place of its commit's files: publishing does not wait for a commit."""

_HELD = "panda.artifacts"
_VALUE = 6000  # characters of a parameter, MLflow's limit


def experiment_id(client: MlflowClient, dataset: str) -> str:
    """Id of experiment panda-<dataset>, created where it is not there; a deleted one is restored."""
    from mlflow.exceptions import MlflowException

    name = f"panda-{dataset}"
    found = client.get_experiment_by_name(name)
    if found is None:
        location = f"{connection.artifact_root()}/{name}" if connection.local_store() else None
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException as e:
            if e.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another process was faster
            assert found is not None
    if found.lifecycle_stage == "deleted":
        client.restore_experiment(found.experiment_id)
    return found.experiment_id


def run_of(client: MlflowClient, experiment: str, inputs: RunInputs, name: str) -> Run:
    """Return the inputs' run, created where there is none, and open for writing."""
    found = _find(client, experiment, inputs.hash)
    if found is None:
        tags = {**provenance(), TAG: inputs.hash, "panda.data": inputs.data_hash}
        made = client.create_run(experiment, tags=tags, run_name=name)
        found = _find(client, experiment, inputs.hash) or made
        if found.info.run_id != made.info.run_id:  # two machines at once: all keep to the older run
            client.delete_run(made.info.run_id)
    if found.info.status != "RUNNING":
        client.update_run(found.info.run_id, status="RUNNING")
    return found


def _find(client: MlflowClient, experiment: str, key: str) -> Run | None:
    runs = client.search_runs([experiment], f"tags.`{TAG}` = '{key}'", order_by=["attributes.start_time ASC"])
    return min(runs, key=lambda r: (r.info.start_time, r.info.run_id), default=None)


def log_tags(client: MlflowClient, run: Run, tags: Mapping[str, str]) -> None:
    """Add tags; the first commit stays, unless it was recorded with uncommitted changes."""
    from mlflow.entities import RunTag

    known = run.data.tags
    keep = {"mlflow.source.git.commit", "panda.git_dirty", "mlflow.source.git.branch", "mlflow.user"}
    settled = known.get("panda.git_dirty") == "false"
    new = {k: v for k, v in tags.items() if known.get(k) != v and not (settled and k in keep and k in known)}
    if new:
        client.log_batch(run.info.run_id, tags=[RunTag(k, v) for k, v in new.items()])


def log_params(client: MlflowClient, run: Run, params: Params) -> None:
    """All parameters, flattened: `adapt.method`; what is no single value as JSON."""
    from mlflow.entities import Param

    flat = {k: v for k, v in flatten(params.model_dump()).items() if k not in run.data.params}
    items = [Param(k, v[:_VALUE]) for k, v in flat.items()]
    for start in range(0, len(items), _PARAMS):
        client.log_batch(run.info.run_id, params=items[start : start + _PARAMS])


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested mappings as one: {'a': {'b': [1]}} becomes {'a.b': '[1]'}; an empty mapping stays, as '{}'."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat


def log_dataset(client: MlflowClient, run: Run, name: str, data_hash: str, splits: Mapping[str, int]) -> None:
    """Log the data set as the run's input, by the hash of its validated manifest, with images per split."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    if run.inputs is not None and run.inputs.dataset_inputs:
        return
    profile = {"num_rows": sum(splits.values()), **splits}
    # 36 characters are MLflow's limit
    dataset = Dataset(
        name, data_hash[:36], source_type="dvc", source=json.dumps({"uri": "data.dvc"}), profile=json.dumps(profile)
    )
    client.log_inputs(
        run.info.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training and evaluation")])]
    )


def log_metrics(client: MlflowClient, run: Run, values: Mapping[str, float]) -> None:
    """Single figures; one that the run has already, with this value, is left alone."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    known = run.data.metrics
    changed = [Metric(k, float(v), now, 0) for k, v in values.items() if known.get(k) != float(v)]
    _log(client, run, changed)


def log_history(client: MlflowClient, run: Run, prefix: str, path: Path) -> None:
    """Log the columns of a history.csv as metrics at its column `step`; the timestamp is the file's.

    Steps that the run already has are left alone.
    """
    from mlflow.entities import Metric

    if not path.is_file():
        return
    stamp = int(path.stat().st_mtime * 1000)
    with open(path, newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    new: list[Metric] = []
    for column in [c for c in (rows[0] if rows else {}) if c != "step"]:
        key = f"{prefix}/{column}"
        known = {m.step for m in client.get_metric_history(run.info.run_id, key)} if key in run.data.metrics else set()
        for number, row in enumerate(rows):
            step = int(float(row["step"])) if row.get("step") else number
            value = float(row[column]) if row[column] else math.nan
            if step not in known and math.isfinite(value):
                new.append(Metric(key, value, stamp, step))
    _log(client, run, new)


def _log(client: MlflowClient, run: Run, metrics: list[Metric]) -> None:
    for start in range(0, len(metrics), _BATCH):
        client.log_batch(run.info.run_id, metrics=metrics[start : start + _BATCH])


def log_files(client: MlflowClient, run: Run, files: Mapping[str, Iterable[Path]]) -> None:
    """Log files and folders as artifacts, by artifact folder ('' is the top).

    What the run already holds with this content is left alone. A tag per artifact folder says what it holds,
    {name: hash}: one for all would outgrow MLflow's limit of a tag, which cuts what is longer. The tag is set after
    the upload: a kill between the two costs an upload, never a file.
    """
    for folder, paths in files.items():
        tag = f"{_HELD}.{folder}" if folder else _HELD
        before = _held(run.data.tags.get(tag, ""))
        if before:  # what a hand or a lost disk took away is not there, whatever the tag says
            there = {PurePosixPath(item.path).name for item in client.list_artifacts(run.info.run_id, folder or None)}
            before = {name: content for name, content in before.items() if name in there}
        held = {}
        for path in (p for p in paths if p.exists()):
            content = (
                digest_files(path, (p for p in path.rglob("*") if p.is_file())) if path.is_dir() else digest_file(path)
            )
            held[path.name] = content[:16]
            if before.get(path.name) == content[:16]:
                continue
            if path.is_dir():
                client.log_artifacts(run.info.run_id, str(path), f"{folder}/{path.name}".lstrip("/"))
            else:
                client.log_artifact(run.info.run_id, str(path), folder or None)
        if held != _held(run.data.tags.get(tag, "")):
            client.set_tag(run.info.run_id, tag, json.dumps(held))


def _held(tag: str) -> dict[str, str]:
    """Return what a tag says that a folder holds: nothing if it is missing or was cut, which costs an upload."""
    try:
        return dict(json.loads(tag))
    except ValueError:
        return {}


def run_intervals(client: MlflowClient, run_id: str, category: str) -> dict[str, float]:
    """Return the ends of the figures' intervals, {'image_auroc_low': ...}.

    It is empty for a run that holds them as metrics or not at all.
    """
    folder = plain_name(category)
    if f"{folder}/intervals.json" not in {item.path for item in client.list_artifacts(run_id, folder)}:
        return {}
    with tempfile.TemporaryDirectory() as temporary:  # MLflow's own would stay
        file = Path(client.download_artifacts(run_id, f"{folder}/intervals.json", temporary))
        return interval_ends(json.loads(file.read_text(encoding="utf-8")))


def interval_ends(intervals: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return {'image_auroc': (low, high)} as {'image_auroc_low': low, 'image_auroc_high': high}."""
    return {
        f"{name}_{end}": float(v)
        for name, ends in intervals.items()
        for end, v in zip(("low", "high"), ends, strict=True)
    }


def describe(client: MlflowClient, run: Run, heading: str, text: str) -> None:
    """Put a text under a heading of the run's description, in place of what stood there.

    What a person wrote above the first heading stays.
    """
    note = run.data.tags.get("mlflow.note.content", "")
    parts = re.split(r"(?m)^(?=## )", note)
    kept = [part.rstrip() + "\n" for part in parts if part.strip() and not part.startswith(f"## {heading}\n")]
    parts = sorted((p for p in [*kept, f"## {heading}\n\n{text.strip()}\n"]), key=lambda p: p.startswith("## "))
    if (new := "\n".join(parts)) != note:
        client.set_tag(run.info.run_id, "mlflow.note.content", new)


def download_inputs(run_id: str, folder: Path) -> None:
    """Write what a run was made from, as it logged it, over the files of `folder`, a clone at the run's commit.

    Raises
    ------
    UserError
        The run holds no params.yaml, or MLflow does not answer.
    """
    import mlflow.artifacts

    with connection.mlflow_errors():
        client = connection.connect()
        held = {item.path for item in client.list_artifacts(run_id)}
        for name in RUN_FILES:
            if name in held:
                mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=name, dst_path=str(folder))
    if "params.yaml" not in held:
        raise UserError(f"run {run_id} holds no params.yaml, so its parameters are not known in full")
