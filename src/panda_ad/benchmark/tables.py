# SPDX-License-Identifier: Apache-2.0
"""Tables of finished cells: mean over classes per method, with intervals, beside the paper's figures."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from panda_ad.benchmark.protocols import METHODS, TUNING_CLASSES, Settings
from panda_ad.evaluation.image_metrics import auroc, percentiles, resample_metric
from panda_ad.system.files import write_text

NAMES = {
    "none": "DN2 (last level, not normalized)",
    "normalized": "normalized (all levels)",
    "whitened": "whitened (normalized before that)",
    "ocsvm": "one-class SVM",
    "iforest": "isolation forest",
    "gaussian": "Gaussian (Mahalanobis)",
    "deep_svdd": "Deep SVDD",
    "compactness": "compactness, fixed steps",
    "ses": "PANDA-SES",
    "ewc": "PANDA-EWC",
    "oe": "outlier exposure",
}

PAPER = {
    "cifar10": {"none": "92.5", "ewc": "96.2", "oe": "98.9"},
    "fashion_mnist": {"none": "94.5", "ses": "95.6 (PANDA)", "ewc": "95.6 (PANDA)"},
    "cats_vs_dogs": {"ses": "97.3 (PANDA)", "ewc": "97.3 (PANDA)"},
    "cub": {"ses": "95.3 (PANDA)"},
    "wbc": {"none": "87.4"},
    "mvtec": {"none": "86.5"},
}
"""Mean ROC AUC, %, of the paper (and its authors' repository for MVTec).

It is for ResNet-152, ImageNet weights, 224 px, all images.
"""

EXPERIMENT = "panda-benchmark"

BASELINE = "whitened"
"""What gains are counted from: the default's score without adaptation."""

Cell = Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """One method of a table; figures in per cent ROC AUC, mean over classes.

    Attributes
    ----------
    classes : how many classes (or categories) are finished.
    mean, low, high : with the percentile bootstrap interval over test images.
        The classes are taken as given, not resampled.
    gain, gain_low, gain_high : minus BASELINE on the same classes and the same resampled images.
        None for BASELINE or without it.
    tuned, held_out : mean over the tuning classes and over the others.
        None if the set has no tuning classes.
    seed_sd : standard deviation over seeds of the mean over the classes run with every seed; None with one seed.
    """

    method: str
    classes: int
    mean: float
    low: float
    high: float
    gain: float | None
    gain_low: float | None
    gain_high: float | None
    tuned: float | None
    held_out: float | None
    seed_sd: float | None
    paper: str


def build_table(dataset: str, cells: Sequence[Cell], resamples: int, confidence: float) -> list[Row]:
    """Return a row per method, in the order of METHODS."""
    by_method: dict[str, dict[str, list[Cell]]] = {}
    for cell in cells:
        by_method.setdefault(cell["method"], {}).setdefault(cell["target"], []).append(cell)
    draws = _draws(cells, resamples)
    sampled = {
        method: {target: np.mean([_bootstrap(c, draws) for c in found], axis=0) for target, found in targets.items()}
        for method, targets in by_method.items()
    }
    rows = []
    for method in (m for m in METHODS if m in by_method):
        targets = by_method[method]
        point = {t: float(np.mean([c["auroc"] for c in found])) for t, found in targets.items()}
        low, high = percentiles(np.mean(list(sampled[method].values()), axis=0), confidence)
        common = [t for t in targets if t in by_method.get(BASELINE, {})]
        gain = None
        if method != BASELINE and common:
            base = {t: float(np.mean([c["auroc"] for c in by_method[BASELINE][t]])) for t in common}
            difference = np.mean([sampled[method][t] - sampled[BASELINE][t] for t in common], axis=0)
            gain_low, gain_high = percentiles(difference, confidence)
            gain = (100 * float(np.mean([point[t] - base[t] for t in common])), 100 * gain_low, 100 * gain_high)
        half = TUNING_CLASSES.get(dataset, ())
        rows.append(
            Row(
                method=method,
                classes=len(targets),
                mean=100 * float(np.mean(list(point.values()))),
                low=100 * low,
                high=100 * high,
                gain=gain and gain[0],
                gain_low=gain and gain[1],
                gain_high=gain and gain[2],
                tuned=_mean([v for t, v in point.items() if t in half]),
                held_out=_mean([v for t, v in point.items() if t not in half]) if half else None,
                seed_sd=_seed_sd(targets),
                paper=PAPER.get(dataset, {}).get(method, ""),
            )
        )
    return rows


def _mean(values: Sequence[float]) -> float | None:
    return 100 * float(np.mean(values)) if values else None


def _seed_sd(targets: Mapping[str, Sequence[Cell]]) -> float | None:
    """Return the standard deviation over seeds, in points; None with one seed.

    It is that of the mean over the classes that were run with every seed.
    """
    seeds = sorted({c["seed"] for found in targets.values() for c in found})
    complete = [
        {c["seed"]: c["auroc"] for c in found}
        for found in targets.values()
        if len({c["seed"] for c in found}) == len(seeds)
    ]
    if len(seeds) < 2 or not complete:
        return None
    return 100 * float(np.std([np.mean([found[s] for found in complete]) for s in seeds], ddof=1))


def _draws(cells: Sequence[Cell], resamples: int) -> dict[str, np.ndarray]:
    """Per target, how often each test image is drawn, int32 (B, N).

    Within a one-vs-rest set all targets share the test images and thus the draws: an image is resampled within its own
    class, so the classes keep their sizes. MVTec's categories have test sets of their own and are drawn apart.
    """
    labels = {c["target"]: c["labels"] for c in cells}
    shared = len({len(v) for v in labels.values()}) == 1 and all(c["protocol"] != "category" for c in cells)
    groups = [list(labels)] if shared else [[target] for target in labels]
    rng = np.random.default_rng(0)
    draws: dict[str, np.ndarray] = {}
    for group in groups:
        strata = np.unique(np.array([labels[t] for t in group]), axis=1, return_inverse=True)[1].ravel()
        counts = np.zeros((resamples, len(strata)), np.int32)
        for stratum in range(strata.max() + 1):
            members = np.flatnonzero(strata == stratum)
            counts[:, members] = rng.multinomial(len(members), np.full(len(members), 1 / len(members)), size=resamples)
        draws.update(dict.fromkeys(group, counts))
    return draws


def _bootstrap(cell: Cell, draws: Mapping[str, np.ndarray]) -> np.ndarray:
    """AUROC of a cell on each resample, (B,)."""
    return resample_metric(auroc, np.array(cell["labels"], np.int8), np.array(cell["scores"]), draws[cell["target"]])


def to_csv(rows: Sequence[Row]) -> str:
    """Return the table as CSV, figures in per cent."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    fields = list(Row.__dataclass_fields__)
    writer.writerow(fields)
    for row in rows:
        values = [getattr(row, f) for f in fields]
        writer.writerow(["" if v is None else f"{v:.3f}" if isinstance(v, float) else v for v in values])
    return out.getvalue()


def to_markdown(dataset: str, rows: Sequence[Row], cells: Sequence[Cell], settings: Settings, confidence: float) -> str:
    """Return the table with its conditions above and the classes below, one column per method."""
    b, level = settings.params.backbone, f"{100 * confidence:g} %"
    n_train, n_test = [sorted({c[k] for c in cells}) for k in ("n_train", "n_test")]
    seeds = sorted({c["seed"] for c in cells})
    counts = [f"{v[0]:,}" if len(v) == 1 else f"{v[0]:,} to {v[-1]:,}" for v in (n_train, n_test)]
    protocol = ", ".join(sorted({c["protocol"] for c in cells}))
    lines = [
        f"{dataset}, {protocol}: ROC AUC in %, mean over classes. "
        f"Backbone {b.name} ({b.weights}), {b.size[0]} x {b.size[1]} px. "
        f"Training images per class: {counts[0]}; test images: {counts[1]}"
        f"{', shared by the classes' if protocol != 'category' else ''}; seed(s) {', '.join(map(str, seeds))}. "
        f"Intervals: {level}, bootstrap over test images (stratified by class, the classes themselves not resampled). "
        "Paper: ResNet-152, ImageNet weights, 224 px, all images.",
        "",
    ]
    halves = any(r.tuned is not None for r in rows)
    spread = any(r.seed_sd is not None for r in rows)
    head = ["method", "classes", f"mean [{level}]", f"minus {BASELINE} [{level}]"]
    head += ["tuning classes", "others"] * halves + ["sd over seeds"] * spread + ["paper"]
    lines += [_line(head), _line(["---"] * len(head))]
    for r in rows:
        gain = "" if r.gain is None else f"{r.gain:+.2f} [{r.gain_low:+.2f}, {r.gain_high:+.2f}]"
        row = [NAMES[r.method], str(r.classes), f"{r.mean:.2f} [{r.low:.2f}, {r.high:.2f}]", gain]
        row += [_figure(r.tuned), _figure(r.held_out)] * halves + [_figure(r.seed_sd)] * spread + [r.paper]
        lines.append(_line(row))
    value: dict[tuple[str, str], list[float]] = {}
    for c in cells:
        value.setdefault((c["target"], c["method"]), []).append(100 * c["auroc"])
    methods = [r.method for r in rows]
    lines += [
        "",
        _line(["class", *(NAMES[m].split(" (")[0].split(",")[0] for m in methods)]),
        _line(["---"] * (len(methods) + 1)),
    ]
    for target in dict.fromkeys(c["target"] for c in cells):
        lines.append(_line([target, *(_figure(np.mean(v)) if (v := value.get((target, m))) else "" for m in methods)]))
    return "\n".join(lines) + "\n"


def _figure(value: Any) -> str:
    return "" if value is None else f"{value:.2f}"


def _line(values: Sequence[str]) -> str:
    return f"| {' | '.join(values)} |"


def write_tables(
    dataset: str, protocol: str, cells: Sequence[Cell], settings: Settings, out: Path, resamples: int, confidence: float
) -> list[Row]:
    """Write <dataset>[-leave-one-out].csv and .md into `out`; returns the rows."""
    rows = build_table(dataset, cells, resamples, confidence)
    name = dataset if protocol != "leave-one-out" else f"{dataset}-leave-one-out"
    write_text(out / f"{name}.csv", to_csv(rows))
    write_text(out / f"{name}.md", to_markdown(dataset, rows, cells, settings, confidence))
    return rows


def log_to_mlflow(dataset: str, protocol: str, rows: Sequence[Row], settings: Settings, out: Path) -> None:
    """One MLflow run per table, in the experiment panda-benchmark: the settings, a metric per method, the files.

    Raises
    ------
    UserError
        The tracking server does not answer; the tables are written all the same.
    """
    from panda_ad.registry.connection import artifact_root, connect, local_store, mlflow_errors

    name = dataset if protocol != "leave-one-out" else f"{dataset}-leave-one-out"
    facts = {"dataset": dataset, "protocol": protocol, "train": settings.train, "test": settings.test}
    facts |= {f"backbone.{k}": v for k, v in settings.params.backbone.model_dump().items()}
    facts |= {f"{family}.{k}": v for family, section in settings.adapt.items() for k, v in section.model_dump().items()}
    with mlflow_errors():
        client = connect()
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            identity = client.create_experiment(EXPERIMENT, artifact_root() if local_store() else None)
        else:
            identity = experiment.experiment_id
        run = client.create_run(identity, run_name=name).info.run_id
        for key, value in facts.items():
            client.log_param(run, key, value)
        for row in rows:
            client.log_metric(run, f"auroc_{row.method}", row.mean / 100)
            client.log_metric(run, f"classes_{row.method}", row.classes)
        for suffix in (".csv", ".md"):
            client.log_artifact(run, str(out / (name + suffix)))
        client.set_terminated(run)
