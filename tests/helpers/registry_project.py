# SPDX-License-Identifier: Apache-2.0
"""A small repository as the pipeline leaves it before `publish`, for the registry's tests."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml
from PIL import Image

from panda_ad.registry import audit
from panda_ad.registry.connection import connect
from panda_ad.scoring.bundle_formats import FORMAT
from panda_ad.scoring.checksums import write_checksums
from panda_ad.system.files import digest_file

if TYPE_CHECKING:
    from mlflow.entities import Run

ROOT = Path(__file__).resolve().parents[2]
DEFECTS = ("hole", "stain")
NAME = "panda-sample-fabric"


def make_project(folder: Path, categories: tuple[str, ...] = ("fabric",)) -> Path:
    """params.yaml, data/ and build/ up to `evaluate`, with bundles that only the registry looks at."""
    folder.mkdir(parents=True, exist_ok=True)
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8")) | {"categories": list(categories)}
    params["backbone"]["input_size"] = 32
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    for name in ("dvc.yaml", "dvc.lock", "data.dvc", "requirements.lock"):
        (folder / name).write_text(f"# {name}\n", encoding="utf-8")
    rng = np.random.default_rng(0)
    rows = []
    for category in categories:
        for i in range(14):
            split = "train" if i < 8 else "calibration"
            rows.append(_image(folder, category, f"train/good/{i:03d}.png", split, "good", rng))
        for i in range(10):
            rows.append(_image(folder, category, f"test/good/{i:03d}.png", "test", "good", rng))
        for defect in DEFECTS:
            rows += [_image(folder, category, f"test/{defect}/{i:03d}.png", "test", defect, rng) for i in range(6)]
    write_rows(folder / "build/validation/manifest.csv", rows)
    write_rows(folder / "build/validation/problems.csv", [{"path": "x.png", "reason": "empty"}])
    write_json(folder / "build/validation/report.json", {"success": True, "data_hash": "d" * 64})
    write(folder / "build/validation/data_docs/index.html", "<html>docs</html>")
    for stage, category in [("validate", None), ("extract", None), *(("adapt", c) for c in categories)]:
        name = stage if category is None else f"{stage}-{category}"
        write_json(
            folder / f"build/timings/{name}.json",
            {"stage": stage, "category": category, "seconds": 1.5, "peak_mb": 300},
        )
    for category in categories:
        write_rows(
            folder / f"build/adapt/{category}/history.csv", [{"step": i, "loss": 1 / (i + 1)} for i in range(20)]
        )
        write_json(folder / f"build/adapt/{category}/adapt.json", {"method": "ses", "steps": [0, 5]})
        write_bundle(folder, category, b"weights 1")
        write_scores(folder, category)
    return folder


def write_bundle(folder: Path, category: str, weights: bytes) -> None:
    """Another `weights` is another model."""
    bundle = folder / "build/bundle" / category
    config = {
        "format": FORMAT, "architecture": "resnet18", "dataset": "sample", "category": category, "input_size": [32, 32], "method": "ses",
        "k": 2, "steps": [0, 5], "false_alarm_rate": 0.05,
        "provenance": {"backbone": "embedded", "weights": "DEFAULT", "train_images": 8, "calibration_images": 6, "collapsed_at": None},
    }  # fmt: skip
    write_json(bundle / "bundle.json", config)
    write_json(bundle / "calibration.json", {"scores": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], "threshold": {"value": 0.6}})
    (bundle / "learned.safetensors").write_bytes(weights)
    write_checksums(bundle)


def write_scores(folder: Path, category: str, quality: float = 1.0) -> None:
    """Test scores and metrics of a model that separates by `quality`: 1 fully, 0 not at all."""
    rows = [
        r
        for r in read_rows(folder / "build/validation/manifest.csv")
        if r["category"] == category and r["split"] == "test"
    ]
    rng = np.random.default_rng(5)
    table = []
    for row in rows:
        score = float(rng.uniform(0, 0.6)) + quality * 0.7 * int(row["label"])
        kept = {k: row[k] for k in ("path", "sha256", "label", "defect")}
        table.append({**kept, "score": repr(score), "p_value": 0.5, "anomalous": score > 0.6, "snapshot": 0})
    evaluation = folder / "build/evaluation" / category
    write_rows(evaluation / "scores.csv", table)
    for name in ("roc.csv", "histogram.csv"):
        write(evaluation / name, "a,b\n1,2\n")
    write(evaluation / "report.html", "<html>report</html>")
    from panda_ad.evaluation.image_metrics import auroc

    labels, scores = (np.array([float(r[k]) for r in table]) for k in ("label", "score"))
    value = auroc(labels, scores)
    metrics = {
        "image_auroc": value, "pixel_auroc": 0.9, "threshold": 0.6,
        "recall": float((scores[labels == 1] > 0.6).mean()), "false_alarm_rate": 0.0, "test_good": 10, "test_defect": 12,
    }  # fmt: skip
    write_json(evaluation / "metrics.json", metrics)
    write_json(evaluation / "intervals.json", {"image_auroc": [value - 0.02, value]})


def set_gate(folder: Path, **changes: object) -> None:
    """Change entries of params.yaml's `gate`."""
    params = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
    params["gate"] |= changes
    (folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")


def _image(
    folder: Path, category: str, name: str, split: str, defect: str, rng: np.random.Generator
) -> dict[str, object]:
    path = folder / "data" / category / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(90, 160, (32, 32, 3)).astype(np.uint8)
    if defect != "good":
        pixels[8:20, 8:20] = 255 if defect == "hole" else 0
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    path.write_bytes(out.getvalue())
    return {
        "path": f"{category}/{name}", "sha256": digest_file(path), "width": 32, "height": 32, "mode": "RGB", "category": category,
        "split": split, "label": int(defect != "good"), "defect": defect, "mask": "",
    }  # fmt: skip


def write_rows(path: Path, rows: list[dict]) -> None:
    """CSV with the first row's keys as header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV as text."""
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def write(path: Path, text: str) -> None:
    """A text file, its folder made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """A JSON file, its folder made."""
    write(path, json.dumps(value))


def retrained(folder: Path, quality: float = 1.0, weights: bytes = b"weights 2") -> None:
    """Another change: other code, another model, other scores."""
    write(folder / "requirements.lock", f"# {weights!r}\n")
    write_bundle(folder, "fabric", weights)
    write_scores(folder, "fabric", quality)


def aliases() -> dict[str, int]:
    """Of the registered model, with their versions."""
    return {k: int(v) for k, v in connect().get_registered_model(NAME).aliases.items()}


def moves() -> list[tuple[str, str, str | None, str]]:
    """The moves that were made: action, alias, from, to."""
    found = audit.history(connect().get_registered_model(NAME))
    return [(m["action"], m["alias"], m["from"], m["to"]) for m in found if m["done"]]


def the_run() -> Run:
    """The store's only run."""
    (run,) = connect().search_runs(["1"])
    return run
