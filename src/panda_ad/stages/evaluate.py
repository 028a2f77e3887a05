# SPDX-License-Identifier: Apache-2.0
"""Stage `evaluate`: score a category's test images with its bundle; metrics, curves and the report."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from panda_ad.evaluation import figures
from panda_ad.evaluation.intervals import Intervals
from panda_ad.evaluation.masks import PIXEL_SIDE, Masks, load_masks, with_masks
from panda_ad.features.images import CachedImages
from panda_ad.params import Params
from panda_ad.params_file import load_params
from panda_ad.scoring.bundle import load_bundle
from panda_ad.scoring.calibration import p_values
from panda_ad.scoring.detector import Detector
from panda_ad.scoring.verdict import Scores, resize_map
from panda_ad.stages.common import activations_for, cached_images, category_rows, check_weights, network_for
from panda_ad.system.files import atomic_file, write_json
from panda_ad.system.paths import BUILD
from panda_ad.system.processes import keep_freed_memory
from panda_ad.system.stage import run_stage


def main(category: str) -> None:
    """Write the files of build/evaluation/<category>.

    They are metrics.json, intervals.json, scores.csv, roc.csv, histogram.csv and report.html.
    """
    from panda_ad.stages.evaluate_report import Evaluated, evaluation_report

    params = load_params()
    keep_freed_memory()
    rows, bundle = category_rows(category)["test"], BUILD / "bundle" / category
    detector = load_bundle(bundle)
    made, expected = detector.network.facts.fingerprint, network_for().facts.fingerprint
    check_weights(made, expected, str(bundle), f"index@{category}")
    threshold = detector.threshold()
    limit = threshold.value
    scores = score_rows(detector, params, rows, category)
    found = measured(detector, params, rows, scores)
    values, intervals = found.values, found.intervals
    labels = rows["label"].to_numpy(np.int64)
    folder = BUILD / "evaluation" / category
    write_measured(folder, found)
    write_csv(folder / "roc.csv", figures.roc_table(labels, scores.score))
    write_csv(folder / "histogram.csv", figures.histogram_table(labels, scores.score, limit))
    shown = Evaluated(rows, scores, values, intervals, found.masks)
    evaluation_report(folder / "report.html", category, params, detector, shown)
    print(f"{category}: {summary_line(values, intervals)}")
    for line in figures.cautions(int((labels == 0).sum()), int((labels == 1).sum()), params.evaluate.confidence):
        print(f"{category}: {line}")


@dataclass(frozen=True)
class Measured:
    """What a detector does on a category's test images.

    Attributes
    ----------
    values, intervals : its figures.
    table : scores.csv, a row per image.
    masks : of the images, None where no image has any.
    """

    values: dict[str, float]
    intervals: Intervals
    table: pd.DataFrame
    masks: Masks | None


def measured(detector: Detector, params: Params, rows: pd.DataFrame, scores: Scores) -> Measured:
    """Return all figures of the test images `rows`, manifest rows in the order of `scores`."""
    threshold, labels = detector.threshold(), rows["label"].to_numpy(np.int64)
    values, intervals = figures.image_figures(labels, scores.score, threshold.value, params)
    values |= figures.component_figures(labels, scores.feature_score, scores.map_score)
    if threshold.sessions is not None:
        session_values, session_intervals = figures.session_figures(threshold.sessions)
        values |= session_values
        intervals |= session_intervals
    masks = load_masks(rows, params)
    if scores.heatmaps is not None and masks is not None:
        pixel_values, pixel_intervals = figures.pixel_figures(*with_masks(scores.heatmaps, masks), params)
        values |= pixel_values
        intervals |= pixel_intervals
    table = rows[["path", "sha256", "label", "defect"]].assign(
        score=scores.score,
        features_score=scores.feature_score,
        heatmap_peak=scores.map_score,
        p_value=p_values(detector.calibration, scores.score),
        anomalous=scores.score > threshold.value,
        snapshot=scores.snapshot,
    )
    return Measured(values, intervals, table, masks)


def write_measured(folder: Path, found: Measured) -> None:
    """Write metrics.json, intervals.json and scores.csv."""
    write_json(folder / "metrics.json", found.values)
    write_json(folder / "intervals.json", found.intervals)
    write_csv(folder / "scores.csv", found.table)


def summary_line(values: Mapping[str, float], intervals: Intervals) -> str:
    """Say the main figures in one line; those that could not be measured are left out."""
    parts = []
    if "image_auroc" in values:
        low, high = intervals["image_auroc"]
        parts.append(f"image AUROC {values['image_auroc']:.4f} [{low:.4f}, {high:.4f}]")
    if "recall" in values:
        parts.append(f"caught {100 * values['recall']:.0f} %")
    if "false_alarm_rate" in values:
        parts.append(f"false alarms {100 * values['false_alarm_rate']:.0f} %")
    if "pixel_auroc" in values:
        parts.append(f"pixel AUROC {values['pixel_auroc']:.4f}, AU-PRO {values['au_pro']:.4f}")
    return ", ".join(parts) or f"no test images; threshold {values['threshold']:.4g}"


def score_rows(detector: Detector, params: Params, rows: pd.DataFrame, category: str) -> Scores:
    """Score manifest rows of a category from cached activations.

    Heat maps are made, on disk, only if the model has a localizer. Joined maps of tiles are kept at most as large as
    pixel metrics look at them, or the network's input.
    """
    if not len(rows):
        return no_scores(detector)
    return score_cached(detector, cached_images(activations_for(params, detector.network), rows, params, category))


def score_cached(detector: Detector, images: CachedImages) -> Scores:
    """Score images of the activation cache; see `score_rows`."""
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
                    maps = np.memmap(file, np.float32, "w+", shape=(len(images), *kept[0].shape))
            maps[done : done + len(kept)] = kept
    columns = ("score", "snapshot", "neighbors", "distances", "features")
    score, snapshot, neighbors, distances, features = (
        np.concatenate([getattr(p, name) for p in parts]) for name in columns
    )
    map_scores = [part.map_score for part in parts if part.map_score is not None]
    feature_score = np.concatenate([part.feature_score for part in parts])
    map_score = np.concatenate(map_scores) if map_scores else None
    return Scores(score, snapshot, neighbors, distances, features, maps, feature_score, map_score)


def no_scores(detector: Detector) -> Scores:
    """Return the scores of no images, for a test set without any: arrays of `Scores` with N = 0, without heat maps."""
    none, peaks = np.zeros(0), None if detector.localizer is None else np.zeros(0)
    pairs = np.zeros((0, 0))
    return Scores(
        none, none.astype(np.int64), pairs.astype(np.int64), pairs, np.zeros((0, 0), np.float32), None, none, peaks
    )


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write a table atomically; floats keep every digit."""
    with atomic_file(path) as temporary:
        table.to_csv(temporary, index=False)


if __name__ == "__main__":
    run_stage("evaluate", main)
