# SPDX-License-Identifier: Apache-2.0
"""Stage `publish`: the MLflow run of these run inputs, and the category's bundle as a registered version @challenger.

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
from panda_ad.params import Params, plain_name
from panda_ad.params_file import load_params
from panda_ad.registry import runs, versions
from panda_ad.registry.card import TITLES, CardFacts, model_card
from panda_ad.registry.connection import connect, mlflow_errors, root
from panda_ad.registry.lineage import origin_of
from panda_ad.registry.names import model_name
from panda_ad.registry.provenance import provenance
from panda_ad.registry.run_inputs import TAG, VALIDATION, bundle_hash, current_inputs, inputs_hash, size_mb
from panda_ad.system.files import write_json
from panda_ad.system.paths import BUILD, MANIFEST
from panda_ad.system.stage import run_stage

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

CHALLENGER = "challenger"
_HEADLINE = (
    "image_auroc",
    "image_auroc_low",
    "image_auroc_high",
    "average_precision",
    "pixel_auroc",
    "au_pro",
    "recall",
    "false_alarm_rate",
    "threshold",
)
_EXAMPLE_BYTES = 100_000
_EVALUATED = ("report.html", "metrics.json", "intervals.json", "scores.csv", "roc.csv", "histogram.csv")
Figures = Mapping[str, float]


def main(category: str) -> None:
    """Write build/publish/<category>.json: run_id, experiment_id, model_name, version, bundle, metrics."""
    params = load_params()
    inputs = current_inputs()
    metrics, intervals = _metrics(category), _intervals(category)
    with mlflow_errors():
        client = connect()
        # the list of runs cuts names off at the right: what tells them apart comes first
        size = " x ".join(map(str, params.backbone.size))
        name = f"{params.adapt.method} {inputs.hash[:8]}, {params.backbone.name}, {size}"
        if root() != Path.cwd():  # a copy: @challenger leaves what the repository published, which then publishes again
            (root() / BUILD / "publish" / f"{category}.json").unlink(missing_ok=True)
        run = runs.run_of(client, runs.experiment_id(client, params.dataset), inputs, name)
        runs.log_dataset(client, run, params.dataset, inputs.data_hash, Counter(row["split"] for row in _rows()))
        log(client, run, params, category, metrics)
        version = publish_version(client, run, params, category, metrics, intervals)
        runs.describe(client, run, category, _description(version, category, metrics | intervals))
        client.set_terminated(run.info.run_id)
    write_json(
        BUILD / "publish" / f"{category}.json",
        {
            "run_id": run.info.run_id,
            "experiment_id": run.info.experiment_id,
            "model_name": version.name,
            "version": int(version.version),
            "bundle": version.tags["panda.bundle"],
            "metrics": metrics | intervals,
        },
    )
    print(f"{category}: run {run.info.run_id}, {version.name} version {version.version} @{CHALLENGER}")


def log(client: MlflowClient, run: Run, params: Params, category: str, metrics: Mapping[str, float]) -> None:
    """Parameters, figures, histories and files; what the run holds already is not sent again."""
    prefix = plain_name(category)
    runs.log_tags(client, run, provenance())
    runs.log_params(client, run, params)
    runs.log_metrics(client, run, {f"{prefix}/{k}": v for k, v in metrics.items()} | _timings(category))
    runs.log_history(client, run, f"{prefix}/adapt", BUILD / "adapt" / category / "history.csv")
    evaluation, adapt = BUILD / "evaluation" / category, BUILD / "adapt" / category
    runs.log_files(
        client,
        run,
        {
            "": [Path(name) for name in ("params.yaml", "dvc.yaml", "dvc.lock", "data.dvc", "requirements.lock")],
            "data": [
                MANIFEST,
                *(VALIDATION / name for name in ("problems.csv", "report.json", "data_docs/index.html")),
            ],
            prefix: [
                *(evaluation / name for name in _EVALUATED),
                *(adapt / name for name in ("history.csv", "adapt.json")),
            ],
        },
    )


def publish_version(
    client: MlflowClient, run: Run, params: Params, category: str, metrics: Figures, intervals: Figures
) -> ModelVersion:
    """Return the version that holds the bundle, @challenger; a new one only where none holds it.

    A bundle that returns is its old version again: one that was rolled back stays held back.
    """
    bundle = BUILD / "bundle" / category
    name, content = model_name(params.dataset, category), bundle_hash(bundle)
    headline = {f"panda.{k}": f"{v:.6g}" for k, v in {**metrics, **intervals}.items() if k in _HEADLINE}
    # panda.run: the run whose test scores speak for the version; a new test set gives the same bundle a new one
    evaluated = {**headline, "panda.run": run.info.run_id, "panda.test_images": _test_images(category)}
    about = f"Visual anomaly detector for {category} (data set {params.dataset}); each version has its card."
    versions.ensure_model(client, name, about)
    version = versions.holding(client, name, content)
    if version is None:
        tags = {**_origin_tags(bundle, category, content, client.get_run(run.info.run_id).data.tags), **evaluated}
        measured = [f"{plain_name(category)}/{k}" for k in metrics]
        example, label = _example(category, params), plain_name(category)
        new = versions.NewVersion(name, label, bundle, content, example, tags, measured)
        version = versions.register(client, run, new)
    else:
        versions.restore_files(client, version, bundle, _example(category, params))
    if not version.description:  # it names the version, whose number is known only now
        card = _card(version, category, params, {**metrics, **intervals})
        client.update_model_version(name, version.version, card)
    for key, value in evaluated.items():
        if version.tags.get(key) != value:
            client.set_model_version_tag(name, version.version, key, value)
    if CHALLENGER not in version.aliases:
        client.set_registered_model_alias(name, CHALLENGER, version.version)
    return version


def _origin_tags(bundle: Path, category: str, content: str, run_tags: Mapping[str, str]) -> dict[str, str]:
    """Return the tags that say what a version was made from."""
    return {
        "panda.budget": repr(_json(bundle / "bundle.json")["false_alarm_rate"]),
        "panda.calibration_images": str(len(_json(bundle / "calibration.json")["scores"])),
        "panda.bundle": content,
        "panda.bundle_mb": f"{size_mb(bundle):.2f}",
        "panda.category": category,
        TAG: inputs_hash(run_tags),
        "panda.data": run_tags["panda.data"],
        "panda.commit": run_tags.get("mlflow.source.git.commit", ""),
        "panda.git_dirty": run_tags.get("panda.git_dirty", ""),
    }


def _card(version: ModelVersion, category: str, params: Params, figures: Figures) -> str:
    """Return the model card of a version whose bundle is here."""
    bundle = BUILD / "bundle" / category
    facts = CardFacts(
        _json(bundle / "bundle.json"), figures, _counts(category), size_mb(bundle), params.evaluate.confidence
    )
    return model_card(version.name, str(version.version), origin_of(str(version.run_id), version.tags), facts)


def _description(version: ModelVersion, category: str, figures: Figures) -> str:
    """Return what the run's page says of a category: its version, and its figures with their intervals."""
    report = f"{plain_name(category)}/report.html"
    lines = [f"{version.name} version {version.version}; report: `{report}` among the artifacts.", ""]
    shown = [(title, key) for key, title in TITLES.items() if key in figures]
    if shown:
        lines += ["| figure | value | interval |", "| --- | --- | --- |"]
    for title, key in shown:
        low, high = figures.get(f"{key}_low"), figures.get(f"{key}_high")
        interval = f"{low:.4f} to {high:.4f}" if low is not None and high is not None else ""
        lines.append(f"| {title} | {figures[key]:.4f} | {interval} |")
    return "\n".join(lines)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{path}: missing or unreadable; run `dvc repro`") from None


def _metrics(category: str) -> dict[str, float]:
    """Return the figures of metrics.json."""
    found = _json(BUILD / "evaluation" / category / "metrics.json")
    return {k: v for k, v in found.items() if isinstance(v, int | float)}


def _intervals(category: str) -> dict[str, float]:
    """Return the ends of the figures' intervals, {'image_auroc_low': ...}; none if there was nothing to measure."""
    path = BUILD / "evaluation" / category / "intervals.json"
    return runs.interval_ends(_json(path)) if path.exists() else {}


def _timings(category: str) -> dict[str, float]:
    """Seconds and peak memory of this category's stages and of those that ran once for all."""
    figures: dict[str, float] = {}
    for path in sorted((BUILD / "timings").glob("*.json")):
        t = _json(path)
        if t["category"] in (None, category) and t["stage"] != "publish":
            prefix = f"{plain_name(category)}/" if t["category"] else ""
            figures |= {f"{prefix}seconds/{t['stage']}": t["seconds"], f"{prefix}peak_mb/{t['stage']}": t["peak_mb"]}
    return figures


def _rows(category: str | None = None) -> list[dict[str, str]]:
    """Return the manifest's rows, of one category or of all."""
    with open(MANIFEST, newline="", encoding="utf-8") as f:
        return [row for row in csv.DictReader(f) if category in (None, row["category"])]


def _test_images(category: str) -> str:
    """Return the hash of the category's test images and their labels, hex.

    Figures of versions with the same hash can be compared.
    """
    lines = sorted(f"{row['sha256']} {row['label']}\n" for row in _rows(category) if row["split"] == "test")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _counts(category: str) -> dict[str, int]:
    """Images per split, those of the test set by kind."""
    kinds = Counter(row["split"] if row["split"] != "test" else f"test {row['defect']}" for row in _rows(category))
    order = {"train": 0, "calibration": 1, "test good": 2}
    return dict(sorted(kinds.items(), key=lambda kind: (order.get(kind[0], 3), kind[0])))


def _example(category: str, params: Params) -> bytes:
    """Return a good image as a file's bytes, for the model's input example: as it is if small, else reduced."""
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
