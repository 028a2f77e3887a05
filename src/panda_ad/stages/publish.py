"""Stage `publish`: the change's MLflow run, and the category's bundle as a registered version @challenger.

The only stage that logs. It reads what the others left under build/, so a server that is down fails this stage alone.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from panda_ad.errors import UserError
from panda_ad.params import Params, load_params
from panda_ad.registry import runs, versions
from panda_ad.registry.card import model_card
from panda_ad.registry.change import VALIDATION, bundle_hash, current_change, model_name, plain, provenance, size_mb
from panda_ad.registry.connection import connect, mlflow_errors, root
from panda_ad.system.files import write_json
from panda_ad.system.paths import BUILD, MANIFEST
from panda_ad.system.stage import run_stage

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

CHALLENGER = "challenger"
_HEADLINE = ("image_auroc", "average_precision", "pixel_auroc", "au_pro", "recall", "false_alarm_rate", "threshold")
_EXAMPLE_BYTES = 100_000


def main(category: str) -> None:
    """Write build/publish/<category>.json: run_id, experiment_id, model_name, version, bundle, metrics."""
    params = load_params()
    change = current_change()
    metrics = _metrics(category)
    with mlflow_errors():
        client = connect()
        # the list of runs cuts names off at the right: what tells them apart comes first
        name = f"{params.adapt.method} {change.key[:8]}, {params.backbone.name}, {' x '.join(map(str, params.backbone.size))}"
        if root() != Path.cwd():  # a copy: @challenger leaves what the repository published, which then publishes again
            (root() / BUILD / "publish" / f"{category}.json").unlink(missing_ok=True)
        run = runs.run_of(client, runs.experiment_id(client, params.dataset), change, name)
        runs.log_dataset(client, run, params.dataset, change.data_hash, Counter(row["split"] for row in _rows()))
        log(client, run, params, category, metrics)
        version = publish_version(client, run, params, category, metrics)
        client.set_terminated(run.info.run_id)
    write_json(
        BUILD / "publish" / f"{category}.json",
        {
            "run_id": run.info.run_id,
            "experiment_id": run.info.experiment_id,
            "model_name": version.name,
            "version": int(version.version),
            "bundle": version.tags["panda.bundle"],
            "metrics": metrics,
        },
    )
    print(f"{category}: run {run.info.run_id}, {version.name} version {version.version} @{CHALLENGER}")


def log(client: MlflowClient, run: Run, params: Params, category: str, metrics: Mapping[str, float]) -> None:
    """Parameters, figures, histories and files; what the run holds already is not sent again."""
    prefix = plain(category)
    runs.log_tags(client, run, provenance())
    runs.log_params(client, run, params)
    runs.log_metrics(client, run, {f"{prefix}/{k}": v for k, v in metrics.items()} | _timings(category))
    runs.log_history(client, run, f"{prefix}/adapt", BUILD / "adapt" / category / "history.csv")
    evaluation = BUILD / "evaluation" / category
    runs.log_files(
        client,
        run,
        {
            "": [Path(name) for name in ("params.yaml", "dvc.yaml", "dvc.lock", "data.dvc", "requirements.lock")],
            "data": [MANIFEST, *(VALIDATION / name for name in ("problems.csv", "report.json", "data_docs"))],
            prefix: [
                *(
                    evaluation / name
                    for name in (
                        "report.html",
                        "metrics.json",
                        "intervals.json",
                        "scores.csv",
                        "roc.csv",
                        "histogram.csv",
                    )
                ),
                *(BUILD / "adapt" / category / name for name in ("history.csv", "adapt.json")),
            ],
        },
    )


def publish_version(
    client: MlflowClient, run: Run, params: Params, category: str, metrics: Mapping[str, float]
) -> ModelVersion:
    """The version that holds the bundle, @challenger; a new one only where none holds it.

    A bundle that returns is its old version again: one that was rolled back stays held back.
    """
    bundle = BUILD / "bundle" / category
    name, content = model_name(params.dataset, category), bundle_hash(bundle)
    headline = {f"panda.{k}": f"{metrics[k]:.6g}" for k in _HEADLINE if k in metrics}
    # panda.run: the run whose test scores speak for the version; a new test set gives the same bundle a new one
    evaluated = {**headline, "panda.run": run.info.run_id, "panda.test_images": _test_images(category)}
    versions.ensure_model(
        client, name, f"Visual anomaly detector for {category} (data set {params.dataset}); each version has its card."
    )
    version = versions.holding(client, name, content)
    if version is None:
        fresh = client.get_run(run.info.run_id).data
        config = _json(bundle / "bundle.json")
        origin = {
            "panda.budget": repr(config["false_alarm_rate"]),
            "panda.calibration_images": str(len(_json(bundle / "calibration.json")["scores"])),
            "panda.bundle": content,
            "panda.bundle_mb": f"{size_mb(bundle):.2f}",
            "panda.category": category,
            "panda.change": fresh.tags["panda.change"],
            "panda.data": fresh.tags["panda.data"],
            "panda.commit": fresh.tags.get("mlflow.source.git.commit", ""),
            "panda.git_dirty": fresh.tags.get("panda.git_dirty", ""),
        }
        card = model_card(
            name=name,
            bundle=config,
            metrics=metrics,
            intervals=_json(BUILD / "evaluation" / category / "intervals.json"),
            counts=_counts(category),
            tags=fresh.tags,
            size_mb=size_mb(bundle),
            confidence=params.evaluate.confidence,
        )
        version = versions.register(
            client,
            run,
            name,
            label=plain(category),
            bundle=bundle,
            content=content,
            example=_example(category, params),
            tags={**origin, **evaluated},
            card=card,
            metrics=[f"{plain(category)}/{k}" for k in metrics],
        )
    for key, value in evaluated.items():
        if version.tags.get(key) != value:
            client.set_model_version_tag(name, version.version, key, value)
    if CHALLENGER not in version.aliases:
        client.set_registered_model_alias(name, CHALLENGER, version.version)
    return version


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{path}: missing or unreadable; run `dvc repro`") from None


def _metrics(category: str) -> dict[str, float]:
    return {
        k: v for k, v in _json(BUILD / "evaluation" / category / "metrics.json").items() if isinstance(v, int | float)
    }


def _timings(category: str) -> dict[str, float]:
    """Seconds and peak memory of this category's stages and of those that ran once for all."""
    figures: dict[str, float] = {}
    for path in sorted((BUILD / "timings").glob("*.json")):
        t = _json(path)
        if t["category"] in (None, category) and t["stage"] != "publish":
            prefix = f"{plain(category)}/" if t["category"] else ""
            figures |= {f"{prefix}seconds/{t['stage']}": t["seconds"], f"{prefix}peak_mb/{t['stage']}": t["peak_mb"]}
    return figures


def _rows(category: str | None = None) -> list[dict[str, str]]:
    """The manifest's rows, of one category or of all."""
    with open(MANIFEST, newline="", encoding="utf-8") as f:
        return [row for row in csv.DictReader(f) if category in (None, row["category"])]


def _test_images(category: str) -> str:
    """Hash of the category's test images and their labels, hex: figures of versions with the same one can be compared."""
    lines = sorted(f"{row['sha256']} {row['label']}\n" for row in _rows(category) if row["split"] == "test")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _counts(category: str) -> dict[str, int]:
    """Images per split, those of the test set by kind."""
    kinds = Counter(row["split"] if row["split"] != "test" else f"test {row['defect']}" for row in _rows(category))
    order = {"train": 0, "calibration": 1, "test good": 2}
    return dict(sorted(kinds.items(), key=lambda kind: (order.get(kind[0], 3), kind[0])))


def _example(category: str, params: Params) -> bytes:
    """A good image as a file's bytes, for the model's input example: as it is if small, else reduced."""
    from panda_ad.data.images import Decoding, read_image
    from panda_ad.data.layouts import image_root

    path = image_root(params) / next(row["path"] for row in _rows(category) if row["split"] == "train")
    if path.stat().st_size <= _EXAMPLE_BYTES:
        return path.read_bytes()
    from PIL import Image

    image = Image.fromarray(read_image(path, decoding=Decoding.of(params.data)))
    image.thumbnail((256, 256))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=90)
    return out.getvalue()


if __name__ == "__main__":
    run_stage("publish", main)
