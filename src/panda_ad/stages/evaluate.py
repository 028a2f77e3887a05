"""Stage `evaluate`: score a category's test images with its bundle; metrics, curves and the report."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from panda_ad.evaluation import image_metrics as metrics
from panda_ad.evaluation import pixel_metrics
from panda_ad.evaluation.intervals import Intervals
from panda_ad.evaluation.masks import PIXEL_SIDE, load_masks, with_masks
from panda_ad.params import Params, load_params
from panda_ad.scoring.bundle import load_bundle
from panda_ad.scoring.calibration import p_values
from panda_ad.scoring.detector import Detector
from panda_ad.scoring.verdict import Scores, resize_map
from panda_ad.stages.common import activations_for, cached_images, category_rows, threads
from panda_ad.system.files import atomic_file, write_json
from panda_ad.system.paths import BUILD
from panda_ad.system.stage import run_stage


def main(category: str) -> None:
    """Write build/evaluation/<category>/{metrics.json, intervals.json, scores.csv, roc.csv, histogram.csv, report.html}."""
    params = load_params()
    threads()
    rows = category_rows(category)["test"]
    detector = load_bundle(BUILD / "bundle" / category)
    scores = score_rows(detector, params, rows, category)
    labels = rows["label"].to_numpy()
    limit = detector.threshold()
    values, intervals = image_metrics(labels, scores.score, params)
    values |= {
        "threshold": limit.value,
        "false_alarm_rate": float((scores.score[labels == 0] > limit.value).mean()),
        "recall": float((scores.score[labels == 1] > limit.value).mean()),
        "test_good": int((labels == 0).sum()),
        "test_defect": int((labels == 1).sum()),
        "features_auroc": metrics.auroc(labels, scores.feature_score),  # what either part of the score would give alone
    }
    if scores.map_score is not None:
        values["heatmap_auroc"] = metrics.auroc(labels, scores.map_score)
    masks = load_masks(rows, params)
    if scores.heatmaps is not None and masks is not None:
        pixel_values, pixel_intervals = pixel_figures(*with_masks(scores.heatmaps, masks), params)
        values |= pixel_values
        intervals |= pixel_intervals
    folder = BUILD / "evaluation" / category
    write_json(folder / "metrics.json", values)
    write_json(folder / "intervals.json", intervals)
    table = rows[["path", "sha256", "label", "defect"]].assign(
        score=scores.score,
        features_score=scores.feature_score,
        heatmap_peak=scores.map_score,
        p_value=p_values(detector.calibration, scores.score),
        anomalous=scores.score > limit.value,
        snapshot=scores.snapshot,
    )
    write_csv(folder / "scores.csv", table)
    false_positive, true_positive, _ = metrics.roc_curve(labels, scores.score)
    write_csv(
        folder / "roc.csv", pd.DataFrame({"false_positive_rate": false_positive, "true_positive_rate": true_positive})
    )
    write_csv(folder / "histogram.csv", histogram(labels, scores.score))
    from panda_ad.stages.evaluate_report import evaluation_report

    evaluation_report(folder / "report.html", category, params, detector, rows, scores, values, intervals, masks)
    low, high = intervals["image_auroc"]
    print(
        f"{category}: image AUROC {values['image_auroc']:.4f} [{low:.4f}, {high:.4f}]"
        + f", caught {100 * values['recall']:.0f} % at {100 * values['false_alarm_rate']:.0f} % false alarms"
        + (
            f", pixel AUROC {values['pixel_auroc']:.4f}, AU-PRO {values['au_pro']:.4f}"
            if "pixel_auroc" in values
            else ""
        )
    )


def score_rows(detector: Detector, params: Params, rows: pd.DataFrame, category: str) -> Scores:
    """Score manifest rows of a category from cached activations; heat maps, on disk, only where the model has a localizer.

    Joined maps of tiles are kept at most as large as pixel metrics look at them, or the network's input.
    """
    images = cached_images(activations_for(params, detector.network.backbone, category), rows, params, category)
    images.cache.warm(images.items, detector.levels)
    most = max(PIXEL_SIDE, *detector.size)
    parts: list[Scores] = []
    maps: np.ndarray | None = None
    for part in detector.score_images(images):
        done = sum(len(p.score) for p in parts)
        parts.append(replace(part, heatmaps=None))
        if part.heatmaps is not None:
            scale = min(1.0, most / max(part.heatmaps.shape[1:]))
            kept = [resize_map(m, (round(m.shape[0] * scale), round(m.shape[1] * scale))) for m in part.heatmaps]
            if maps is None:  # thousands of test images have more of it than there is memory
                with tempfile.TemporaryFile(dir=BUILD) as file:
                    maps = np.memmap(file, np.float32, "w+", shape=(len(rows), *kept[0].shape))
            maps[done : done + len(kept)] = kept
    columns = ("score", "snapshot", "neighbors", "distances", "features")
    score, snapshot, neighbors, distances, features = (
        np.concatenate([getattr(p, name) for p in parts]) for name in columns
    )
    map_scores = [part.map_score for part in parts if part.map_score is not None]
    feature_score = np.concatenate([part.feature_score for part in parts])
    map_score = np.concatenate(map_scores) if map_scores else None
    return Scores(score, snapshot, neighbors, distances, features, maps, feature_score, map_score)


def image_metrics(labels: np.ndarray, scores: np.ndarray, params: Params) -> tuple[dict[str, float], Intervals]:
    """AUROC, average precision and FPR at 95 % TPR on raw scores, each with its stratified bootstrap interval."""
    values: dict[str, float] = {}
    intervals: Intervals = {}
    for name, metric in {
        "image_auroc": metrics.auroc,
        "average_precision": metrics.average_precision,
        "fpr_at_95_tpr": metrics.fpr_at_tpr,
    }.items():
        intervals[name] = metrics.bootstrap_interval(
            metric, labels, scores, params.evaluate.bootstrap, params.evaluate.confidence, params.seed
        )
        values[name] = float(metric(labels, scores))
    return values, intervals


def pixel_figures(
    masks: Sequence[np.ndarray], maps: Sequence[np.ndarray], params: Params
) -> tuple[dict[str, float], Intervals]:
    """Pixel AUROC, AU-PRO and best F1, exact, with bootstrap intervals by image."""
    values = {
        "pixel_auroc": pixel_metrics.pixel_auroc(masks, maps),
        "au_pro": pixel_metrics.au_pro(masks, maps),
        "pixel_f1": pixel_metrics.pixel_f1(masks, maps),
    }
    intervals = pixel_metrics.pixel_intervals(
        masks, maps, params.evaluate.bootstrap, params.evaluate.confidence, params.seed
    )
    return values, intervals


def histogram(labels: np.ndarray, scores: np.ndarray, bins: int = 30) -> pd.DataFrame:
    """Images per score interval, good and defect."""
    edges = np.histogram_bin_edges(scores, bins)
    counts = {name: np.histogram(scores[labels == label], edges)[0] for label, name in ((0, "good"), (1, "defect"))}
    middle = (edges[:-1] + edges[1:]) / 2
    return pd.concat([pd.DataFrame({"score": middle, "images": n, "label": name}) for name, n in counts.items()])


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write a table atomically; floats keep every digit."""
    with atomic_file(path) as temporary:
        table.to_csv(temporary, index=False)


if __name__ == "__main__":
    run_stage("evaluate", main)
