# SPDX-License-Identifier: Apache-2.0
"""A bundle as the files of an MLflow model: `model.py`, the bundle, the package's own source, and its requirements."""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from panda_ad.registry.run_inputs import PACKAGE, source_files

if TYPE_CHECKING:
    from mlflow.models import Model

SERVING = (
    "faiss-cpu", "mlflow", "numpy", "onnxruntime", "pandas", "pillow", "pydantic", "pyyaml", "safetensors",
    "scipy", "tqdm",
)  # fmt: skip
"""Distributions that a served model needs; pinned as installed where it was made."""

MODEL_CODE = Path(__file__).with_name("model.py")


def requirements() -> list[str]:
    """`name==version` for serving, without local version labels (a build `+cpu` exists on one index only)."""
    return [f"{name}=={importlib.metadata.version(name).partition('+')[0]}" for name in SERVING]


def save(folder: Path, bundle: Path, example: bytes, location: str, run_id: str, model_id: str) -> Model:
    """Write the MLflow model: `model.py`, the bundle, the package's own source, signature, example, requirements."""
    import mlflow.pyfunc
    import pandas as pd
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
    from mlflow.types.schema import AnyType

    # any: MLflow would decode base64 by itself in two of its four formats, and refuse a request for one row
    columns = {
        "score": "double",
        "p_value": "double",
        "threshold": "double",
        "decision": "string",
        "anomalous": "boolean",
    }
    columns |= {"version": "string", "error": "string"}
    signature = ModelSignature(
        inputs=Schema([ColSpec(AnyType(), "image")]),
        outputs=Schema([ColSpec(DataType[kind], name) for name, kind in columns.items()]),
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
