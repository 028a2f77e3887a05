"""Registered versions: a bundle saved as an MLflow model, registered once per content."""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from panda_ad.errors import UserError
from panda_ad.registry.change import PACKAGE, source_files

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel
    from mlflow.models import Model

SERVING = (
    "faiss-cpu", "mlflow", "numpy", "pandas", "pillow", "pydantic", "pyyaml", "safetensors", "scikit-learn", "scipy", "torch", "tqdm",
)  # fmt: skip
"""Distributions that a served model needs; pinned as installed where it was made."""

MODEL_CODE = Path(__file__).with_name("model.py")


def requirements() -> list[str]:
    """`name==version` for serving, without local version labels (a build `+cpu` exists on one index only)."""
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in SERVING]


def holding(client: MlflowClient, name: str, content: str) -> ModelVersion | None:
    """The version of a registered model that holds the bundle of hash `content` (the newest of several); None where there is none."""
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


def register(
    client: MlflowClient,
    run: Run,
    name: str,
    *,
    label: str,
    bundle: Path,
    content: str,
    example: bytes,
    tags: Mapping[str, str],
    card: str,
    metrics: Sequence[str],
) -> ModelVersion:
    """Log the bundle as a model of `run` and register it as a new version of `name`.

    The version is created last, in one call with all its tags, from files that are complete: a kill before leaves no version.
    What it leaves, a logged model that is not ready, is taken up by the next call.

    Parameters
    ----------
    label : name of the logged model within the run.  content : the bundle's hash.  example : an image file.
    metrics : names of the run's figures that the version's page shows too.
    """
    from mlflow.entities import LoggedModelOutput, Metric

    experiment, run_id = run.info.experiment_id, run.info.run_id
    known = client.search_logged_models(
        [experiment], filter_string=f"source_run_id = '{run_id}' AND tags.`panda.bundle` = '{content}'"
    )
    model = next(iter(known), None)
    if model is None:
        model = client.create_logged_model(
            experiment, label, run_id, tags={"panda.bundle": content}, model_type="anomaly detector"
        )
    if str(model.status) != "READY":
        with tempfile.TemporaryDirectory(prefix="panda-model-") as folder:
            save(Path(folder) / "model", bundle, example, model.artifact_location, run_id, model.model_id)
            client.log_model_artifacts(model.model_id, str(Path(folder) / "model"))
        outputs = client.get_run(run_id).outputs
        if model.model_id not in {o.model_id for o in (outputs.model_outputs if outputs else [])}:  # twice is an error
            client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
        latest = [client.get_metric_history(run_id, key)[-1] for key in metrics]
        # equal to what the run has in every part, so that the run keeps one value of each
        linked = [Metric(m.key, m.value, m.timestamp, m.step, model_id=model.model_id, run_id=run_id) for m in latest]
        client.log_batch(run_id, metrics=linked)
        client.finalize_logged_model(model.model_id, "READY")
    return client.create_model_version(
        name, f"models:/{model.model_id}", run_id, tags=dict(tags), description=card, model_id=model.model_id
    )


def save(folder: Path, bundle: Path, example: bytes, location: str, run_id: str, model_id: str) -> Model:
    """Write the MLflow model: code of `model.py`, the bundle, the package's own source, signature, example, requirements."""
    import mlflow.pyfunc
    import pandas as pd
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    signature = ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")]),
        outputs=Schema(
            [
                ColSpec(DataType.double, "score"),
                ColSpec(DataType.double, "p_value"),
                ColSpec(DataType.string, "decision"),
                ColSpec(DataType.boolean, "anomalous"),
            ]
        ),
        params=ParamSchema([ParamSpec("heatmap", DataType.boolean, False)]),
    )
    model = Model(artifact_path=location, run_id=run_id, model_uuid=model_id, model_id=model_id)
    with tempfile.TemporaryDirectory(prefix="panda-code-") as code:
        for path in (p for p in source_files() if p.suffix == ".py"):
            target = Path(code) / PACKAGE.name / path.relative_to(PACKAGE)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        shutil.copytree(
            bundle, Path(code) / "bundle"
        )  # MLflow keeps a folder's name and refuses links: one path for every category
        mlflow.pyfunc.save_model(
            str(folder),
            mlflow_model=model,
            python_model=str(MODEL_CODE),
            artifacts={"bundle": str(Path(code) / "bundle")},
            code_paths=[str(Path(code) / PACKAGE.name)],
            signature=signature,
            input_example=pd.DataFrame({"image": [example]}),
            pip_requirements=requirements(),
        )
    for cache in folder.rglob("__pycache__"):
        shutil.rmtree(cache, ignore_errors=True)
    return model


def registered(client: MlflowClient, name: str) -> RegisteredModel:
    """A registered model, with aliases and tags. UserError where it is not there."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as e:
        if e.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        raise UserError(f"{name}: no such registered model; run `dvc repro` to publish one") from None
