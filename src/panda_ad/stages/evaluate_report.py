# SPDX-License-Identifier: Apache-2.0
"""What stage `evaluate` puts into the HTML report: pictures with their evidence, figures per defect, provenance."""

from __future__ import annotations

import io
import json
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from panda_ad.data.images import Decoding, read_image
from panda_ad.data.layouts import image_root
from panda_ad.evaluation import figures, pixel_metrics
from panda_ad.evaluation import image_metrics as metrics
from panda_ad.evaluation.intervals import Intervals
from panda_ad.evaluation.masks import Masks, with_masks
from panda_ad.params import Params
from panda_ad.report.build import write_report
from panda_ad.report.content import DefectRow, Metric, Neighbor, Report, ReportImage, Spot
from panda_ad.report.encode import THUMB
from panda_ad.scoring.calibration import p_values
from panda_ad.scoring.detector import Detector
from panda_ad.scoring.verdict import Scores
from panda_ad.system.paths import BUILD

SPOTS = 200
"""Images shown with their worst spot at full resolution: those further down the list are right, and it takes room."""

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


@dataclass(frozen=True)
class Evaluated:
    """What stage `evaluate` found on the N test images of a category; rows, scores and masks are in the same order.

    Attributes
    ----------
    rows : the images' rows of the manifest.
    scores : with heat maps if the model has a localizer.
    values, intervals : the figures of metrics.json and intervals.json.
    masks : one per image; None if the category has none.
    """

    rows: pd.DataFrame
    scores: Scores
    values: Mapping[str, float]
    intervals: Intervals
    masks: Masks | None


def evaluation_report(path: Path, category: str, params: Params, detector: Detector, found: Evaluated) -> None:
    """Write the report of one category."""
    rows, scores, masks = found.rows, found.scores, found.masks
    labels, defects = rows["label"].to_numpy(np.int64), rows["defect"].to_numpy()
    bare = sum(mask is None for mask in masks or [])
    unmarked = {"pixel_auroc": f"; {bare} defective images have no mask and are left out"} if bare else {}
    report = Report(
        dataset=params.dataset,
        category=category,
        title=f"{METHODS[detector.config.method]}, backbone {params.backbone.name}, "
        f"{' x '.join(map(str, detector.size))} px",
        created=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        headline=[
            Metric(name, found.values[key], found.intervals.get(key), note + unmarked.get(key, ""))
            for key, (name, note) in HEADLINE.items()
            if key in found.values
        ],
        cautions=figures.cautions(int((labels == 0).sum()), int((labels == 1).sum()), params.evaluate.confidence),
        threshold=detector.threshold(),
        paths=rows["path"].tolist(),
        defects=defects.tolist(),
        labels=labels,
        scores=scores.score,
        p_values=p_values(detector.calibration, scores.score),
        calibration_scores=detector.calibration,
        images=images(params, detector, rows, scores, masks),
        per_defect=per_defect(labels, defects, scores, masks, params),
        provenance=provenance(params, detector, category, found.values),
        confidence=params.evaluate.confidence,
        bundle=str(BUILD / "bundle" / category),
    )
    write_report(report, path)


def images(
    params: Params, detector: Detector, rows: pd.DataFrame, scores: Scores, masks: Masks | None
) -> list[ReportImage]:
    """Return the images to show, at most `evaluate.report_images`, worst mistakes first.

    The arguments are as in `Evaluated`.
    """
    labels, root = rows["label"].to_numpy(np.int64), image_root(params)
    p = p_values(detector.calibration, scores.score)
    thumbs = [np.asarray(Image.open(io.BytesIO(data))) for data in detector.thumbnails]
    components, decoding = detector.components(scores), Decoding.of(params.data)
    order = worst_mistakes_first(labels, scores.score, detector.threshold().value)[: params.evaluate.report_images]
    shown = []
    for n, i in enumerate(order):
        row = rows.iloc[i]
        rgb = read_image(root / row["path"], row["sha256"], decoding)
        heat = None if scores.heatmaps is None else scores.heatmaps[i]
        shown.append(
            ReportImage(
                path=row["path"],
                label=int(labels[i]),
                defect=row["defect"],
                score=float(scores.score[i]),
                p_value=float(p[i]),
                rgb=reduced(rgb),
                heatmap=heat,
                spot=None if heat is None or n >= SPOTS else worst_spot(rgb, heat),
                mask=None if masks is None else masks[i],
                components=None if components is None else (float(components[i, 0]), float(components[i, 1])),
                neighbors=[
                    Neighbor(thumbs[k], detector.images[k]["path"]) for k in detector.distinct(scores.neighbors[i])
                ],
            )
        )
    return shown


def worst_mistakes_first(labels: np.ndarray, scores: np.ndarray, threshold: float) -> np.ndarray:
    """Return the order of test images, (N,) int64.

    Wrong ones come first, by how far down the ranking they went wrong, then the others.
    """
    rank = np.argsort(np.argsort(scores)) / max(len(scores) - 1, 1)
    wrongness = np.where(labels == 1, 1 - rank, rank) + 2 * ((scores > threshold) != (labels == 1))
    return np.argsort(-wrongness, kind="stable")


def per_defect(
    labels: np.ndarray, defects: np.ndarray, scores: Scores, masks: Masks | None, params: Params
) -> list[DefectRow]:
    """Compare each kind of defect with all good test images; without these its AUROC is unknown."""
    settings, out = params.evaluate, []
    for kind in sorted(set(defects[labels == 1])):
        chosen = np.flatnonzero((labels == 0) | (defects == kind))
        y, s = labels[chosen], scores.score[chosen]
        area = interval = None
        if (y == 0).any():
            area = metrics.auroc(y, s)
            interval = metrics.bootstrap_interval(
                metrics.auroc, y, s, settings.bootstrap, settings.confidence, params.seed
            )
        pixel = pro = None
        if masks is not None and scores.heatmaps is not None:
            known, maps = with_masks([scores.heatmaps[i] for i in chosen], [masks[i] for i in chosen])
            if any(mask.any() for mask in known) and not all(mask.all() for mask in known):
                pixel, pro = pixel_metrics.pixel_auroc(known, maps), pixel_metrics.au_pro(known, maps)
        out.append(DefectRow(kind, int((y == 1).sum()), area, interval, pixel, pro))
    return out


def provenance(
    params: Params, detector: Detector, category: str, values: Mapping[str, float]
) -> dict[str, dict[str, object]]:
    """Return facts on data, model and settings, for the last section."""
    report = json.loads((BUILD / "validation" / "report.json").read_text())
    known = detector.config.provenance
    return {
        "data": {
            "dataset": params.dataset,
            "category": category,
            "data hash": report["data_hash"],
            "normal training images": f"{known['train_images']:,}",
            "calibration images": f"{known['calibration_images']:,}",
            "test images, good": f"{values['test_good']:,}",
            "test images, defective": f"{values['test_defect']:,}",
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
        "code": {
            "panda-ad": known["panda_ad"],
            "commit": commit(),
            "seed": params.seed,
            "version and run": f"once published: in {BUILD / 'publish' / category}.json and in MLflow, "
            "whose run holds this report",
        },
    }


def reduced(rgb: np.ndarray, side: int = THUMB) -> np.ndarray:
    """Reduce a picture, uint8 (h, w, 3), to at most `side` pixels a side, so that hundreds fit in memory."""
    image = Image.fromarray(rgb)
    image.thumbnail((side, side))
    return np.asarray(image)


def worst_spot(rgb: np.ndarray, heatmap: np.ndarray, side: int = THUMB) -> Spot | None:
    """Cut the surroundings of the heat map's maximum out of an image, at its own resolution.

    Parameters
    ----------
    rgb : uint8 (h, w, 3).
    heatmap : float (h', w'), of the whole image.
    side : pixels of the cutting, if the image has so many.

    Returns
    -------
    None if the whole image is no larger than that.
    """
    height, width = rgb.shape[:2]
    if max(height, width) <= side:
        return None
    y, x = np.unravel_index(np.nanargmax(heatmap), heatmap.shape)
    top = int(np.clip((y + 0.5) * height / heatmap.shape[0] - side / 2, 0, max(0, height - side)))
    left = int(np.clip((x + 0.5) * width / heatmap.shape[1] - side / 2, 0, max(0, width - side)))
    cut = rgb[top : top + side, left : left + side].copy()
    return Spot(cut, (left / width, top / height, (left + cut.shape[1]) / width, (top + cut.shape[0]) / height))


def commit() -> str:
    """Return the commit that the working tree is at, 'none' outside a git repository.

    '+ changes' follows if tracked files differ from it.
    """
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty= + changes"],
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    return done.stdout.strip() if done.returncode == 0 else "none"
