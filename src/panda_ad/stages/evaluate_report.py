"""What stage `evaluate` puts into the HTML report: chosen pictures with their evidence, figures per defect, provenance."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from panda_ad.data.images import Decoding, read_image
from panda_ad.data.layouts import image_root
from panda_ad.evaluation import image_metrics as metrics
from panda_ad.evaluation import pixel_metrics
from panda_ad.evaluation.intervals import Intervals
from panda_ad.evaluation.masks import Masks, with_masks
from panda_ad.params import Params
from panda_ad.report.build import project_2d, write_report
from panda_ad.report.content import DefectRow, Metric, Neighbor, Report, ReportImage
from panda_ad.scoring.calibration import p_values
from panda_ad.scoring.detector import Detector
from panda_ad.scoring.verdict import Scores
from panda_ad.system.paths import BUILD

METHODS = {
    "none": "DN2",
    "compactness": "PANDA (compactness)",
    "ses": "PANDA-SES",
    "ewc": "PANDA-EWC",
    "oe": "PANDA-OE",
}
"""Methods as docs/results.md names them."""
HEADLINE = {
    "image_auroc": ("Image AUROC", "chance that a defective image scores above a good one"),
    "average_precision": ("Average precision", "over all thresholds"),
    "fpr_at_95_tpr": ("False alarms at 95 % recall", "share of good images"),
    "pixel_auroc": ("Pixel AUROC", "over all pixels of the test images"),
    "au_pro": ("AU-PRO", "overlap per defect, up to 30 % false positive pixels"),
    "pixel_f1": ("Best pixel F1", "at the best threshold for this test set"),
}


def evaluation_report(
    path: Path,
    category: str,
    params: Params,
    detector: Detector,
    rows: pd.DataFrame,
    scores: Scores,
    values: Mapping[str, float],
    intervals: Intervals,
    masks: Masks | None,
) -> None:
    """Write the report of one category; `rows`, `scores` and `masks` are in the same order."""
    labels, defects = rows["label"].to_numpy(), rows["defect"].to_numpy()
    p = p_values(detector.calibration, scores.score)
    thumbs = [np.asarray(Image.open(io.BytesIO(data))) for data in detector.thumbnails]
    shown = worst_mistakes_first(labels, scores.score, detector.threshold().value)[: params.evaluate.report_images]
    root = image_root(params)
    paths, keys = rows["path"].tolist(), rows["sha256"].tolist()
    parts = detector.components(scores)
    images = [
        ReportImage(
            path=paths[i],
            label=int(labels[i]),
            defect=defects[i],
            score=float(scores.score[i]),
            p_value=float(p[i]),
            snapshot=int(scores.snapshot[i]),
            rgb=small(read_image(root / paths[i], keys[i], Decoding.of(params.data))),
            heatmap=None if scores.heatmaps is None else scores.heatmaps[i],
            mask=None if masks is None else masks[i],
            parts=None if parts is None else (float(parts[i, 0]), float(parts[i, 1])),
            neighbors=[
                Neighbor(thumbs[n], float(d), detector.images[n]["path"])
                for n, d in zip(scores.neighbors[i], scores.distances[i], strict=True)
            ],
        )
        for i in shown
    ]
    gallery_2d, test_2d = project_2d(detector.galleries[-1].features, scores.features)
    bare = sum(mask is None for mask in masks or [])
    out_of_fold = {"pixel_auroc": f"; {bare} defective images have no mask and are left out"} if bare else {}
    headline = [
        Metric(name, values[key], intervals.get(key), note + out_of_fold.get(key, ""))
        for key, (name, note) in HEADLINE.items()
        if key in values
    ]
    write_report(
        Report(
            dataset=params.dataset,
            category=category,
            title=f"{METHODS[detector.config.method]}, backbone {params.backbone.name}, {' x '.join(map(str, detector.size))} px",
            created=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            headline=headline,
            threshold=detector.threshold(),
            paths=paths,
            defects=defects.tolist(),
            labels=labels,
            scores=scores.score,
            p_values=p,
            calibration_scores=detector.calibration,
            images=images,
            per_defect=per_defect(labels, defects, scores, masks, params),
            gallery_features_2d=gallery_2d,
            test_features_2d=test_2d,
            gallery_paths=[image["path"] for image in detector.images],
            provenance=provenance(params, detector, category, values),
            confidence=params.evaluate.confidence,
        ),
        path,
    )


def worst_mistakes_first(labels: np.ndarray, scores: np.ndarray, threshold: float) -> np.ndarray:
    """Order of test images: wrong ones by how far down the ranking they went wrong, then the others; (N,) int64."""
    rank = np.argsort(np.argsort(scores)) / max(len(scores) - 1, 1)
    wrongness = np.where(labels == 1, 1 - rank, rank) + 2 * ((scores > threshold) != (labels == 1))
    return np.argsort(-wrongness, kind="stable")


def per_defect(
    labels: np.ndarray, defects: np.ndarray, scores: Scores, masks: Masks | None, params: Params
) -> list[DefectRow]:
    """Each kind of defect against all good test images."""
    out = []
    for kind in sorted(set(defects[labels == 1])):
        chosen = np.flatnonzero((labels == 0) | (defects == kind))
        y, s = labels[chosen], scores.score[chosen]
        low, high = metrics.bootstrap_interval(
            metrics.auroc, y, s, params.evaluate.bootstrap, params.evaluate.confidence, params.seed
        )
        pixel = pro = None
        if masks is not None and scores.heatmaps is not None:
            known, maps = with_masks([scores.heatmaps[i] for i in chosen], [masks[i] for i in chosen])
            if any(mask.any() for mask in known):
                pixel, pro = pixel_metrics.pixel_auroc(known, maps), pixel_metrics.au_pro(known, maps)
        out.append(DefectRow(kind, int((y == 1).sum()), metrics.auroc(y, s), low, high, pixel, pro))
    return out


def provenance(
    params: Params, detector: Detector, category: str, values: Mapping[str, float]
) -> dict[str, dict[str, object]]:
    """Facts on data, model and settings, for the last section."""
    report = json.loads((BUILD / "validation" / "report.json").read_text())
    known = detector.config.provenance
    return {
        "data": {
            "dataset": params.dataset,
            "category": category,
            "data hash": report["data_hash"],
            "normal training images": known["train_images"],
            "calibration images": known["calibration_images"],
            "test images, good": values["test_good"],
            "test images, defective": values["test_defect"],
        },
        "model": {
            "backbone": f"{known['backbone']} ({known['weights']})",
            "weights": known["fingerprint"],
            "input size": " x ".join(map(str, detector.size)),
            "adaptation": detector.config.method,
            "snapshots at steps": ", ".join(map(str, detector.network.steps)),
            "neighbors": detector.config.k,
            "localization": params.localize.method
            + (f", {tiles} x {tiles} tiles" if (tiles := params.localize.tiles) else ""),
        },
        "code": {"panda-ad": known["panda_ad"], "seed": params.seed},
    }


def small(rgb: np.ndarray, side: int = 256) -> np.ndarray:
    """The picture reduced to at most `side` pixels a side, so that hundreds fit in memory."""
    image = Image.fromarray(rgb)
    image.thumbnail((side, side))
    return np.asarray(image)
