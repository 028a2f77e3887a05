# SPDX-License-Identifier: Apache-2.0
"""A report made of generated images: woven textures with five kinds of defect, heat maps, masks and neighbors."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

from panda_ad.evaluation.image_metrics import auroc
from panda_ad.report.content import DefectRow, Metric, Neighbor, Report, ReportImage, Spot
from panda_ad.scoring.calibration import p_values, threshold

KINDS = ("crack", "hole", "stain", "scratch", "missing thread")


def weave(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A woven texture with its own light, phase and grain, float (height, width, 3) in [0, 1]."""
    y, x = np.mgrid[:height, :width].astype(float)
    a, b = rng.uniform(0, 6, 2)
    cloth = 0.5 + 0.16 * np.sin(x * 0.55 + a) * np.cos(y * 0.5 + b) + 0.05 * np.sin(0.55 * y + a)
    cloth += rng.uniform(-0.08, 0.08) + rng.uniform(-0.1, 0.1) * (x / width - 0.5) + rng.normal(0, 0.03, cloth.shape)
    return np.clip(cloth[..., None] * np.array([1.0, 0.93, 0.8]) + rng.uniform(-0.03, 0.03, 3), 0, 1)


def damage(rng: np.random.Generator, image: np.ndarray, kind: str, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """The image with a defect, and its mask."""
    h, w = image.shape[:2]
    y, x = np.mgrid[:h, :w].astype(float)
    cy, cx = rng.uniform(0.25, 0.75) * h, rng.uniform(0.25, 0.75) * w
    angle, size = rng.uniform(0, np.pi), rng.uniform(0.05, 0.14) * min(h, w)
    along = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
    across = -(x - cx) * np.sin(angle) + (y - cy) * np.cos(angle)
    if kind == "crack":
        mask = (np.abs(across + 3 * np.sin(along / 6)) < 1.5 + strength) & (np.abs(along) < 3 * size)
        change = -0.35
    elif kind == "scratch":
        mask = (np.abs(across) < 1.2) & (np.abs(along) < 3.5 * size)
        change = 0.3
    elif kind == "hole":
        mask, change = across**2 + along**2 < size**2, -0.45
    elif kind == "stain":
        mask, change = (across / 1.6) ** 2 + along**2 + 9 * np.sin(along / 4) * size < (1.3 * size) ** 2, -0.16
    else:
        mask, change = (np.abs(x - cx) < 2.5), 0.18
    if not mask.any():
        mask[int(cy), int(cx)] = True
    return np.clip(image + mask[..., None] * change * strength, 0, 1), mask


def demo(
    good: int = 40, per_kind: int = 14, size: tuple[int, int] = (150, 200), calibration: int = 60, seed: int = 0
) -> Report:
    """A report of `good + 5 per_kind` images; scores overlap, so that it has mistakes."""
    rng = np.random.default_rng(seed)
    gallery = [Neighbor(_bytes(weave(rng, 64, 84)), f"train/good/{i:03d}.png") for i in range(80)]
    paths, defects, labels, scores, images = [], [], [], [], []
    for kind in ("good", *KINDS):
        for i in range(good if kind == "good" else per_kind):
            label, strength = int(kind != "good"), float(rng.uniform(0.15, 1.3))
            picture, mask = weave(rng, *size), None
            heat = gaussian_filter(rng.normal(0, 1, size), 8) * 6 + 1.0
            if label:
                picture, mask = damage(rng, picture, kind, strength)
                heat += 7 * strength * gaussian_filter(mask.astype(float), 4) ** 0.7
            score = float(np.exp(rng.normal(1.0, 0.25) + label * strength * (0.6 if kind == "stain" else 1.6)))
            path = f"test/{kind}/{i:03d}.png"
            near = [gallery[j] for j in rng.choice(80, 5, replace=False)]
            paths.append(path)
            defects.append(kind)
            labels.append(label)
            scores.append(score)
            images.append((path, label, kind, score, _bytes(picture), heat.astype(np.float32), mask, near))
    labels_, scores_ = np.array(labels), np.array(scores)
    normals = np.exp(rng.normal(1.0, 0.25, calibration))
    p = p_values(normals, scores_)
    kinds = np.array(defects)
    rows = []
    for kind in KINDS:
        take = (kinds == kind) | (labels_ == 0)
        value = auroc(labels_[take], scores_[take])
        rows.append(
            DefectRow(
                kind,
                per_kind,
                value,
                (max(0, value - 0.05), min(1, value + 0.03)),
                0.957,
                0.81 if kind != "stain" else None,
            )
        )
    return Report(
        dataset="demo",
        category="fabric",
        title="DN2 + SES, patch memory",
        created="2026-11-23 20:00 UTC",
        headline=[
            Metric("Image AUROC", auroc(labels_, scores_), (0.921, 0.989), "one image, one score"),
            Metric("Average precision", 0.948, (0.911, 0.972)),
            Metric("FPR at 95 % TPR", 0.425, (0.25, 0.6), "lower is better"),
            Metric("Pixel AUROC", 0.953, (0.94, 0.964)),
            Metric("AU-PRO", 0.842, (0.815, 0.868), "up to 30 % false positives"),
        ],
        threshold=threshold(normals, 0.05),
        paths=paths,
        defects=defects,
        labels=labels_,
        scores=scores_,
        p_values=p,
        calibration_scores=normals,
        images=[
            ReportImage(
                path=n,
                label=y,
                defect=d,
                score=s,
                p_value=float(q),
                rgb=rgb,
                heatmap=heat,
                mask=m,
                neighbors=near,
                components=(s - 4.0, 4.0),
                spot=Spot(rgb[:40, :50], (0.2, 0.1, 0.5, 0.45)) if y else None,
            )
            for (n, y, d, s, rgb, heat, m, near), q in zip(images, p, strict=True)
        ],
        per_defect=rows,
        provenance={
            "data": {
                "data set": "demo",
                "images": "240 train, 60 calibration, 110 test",
                "data.dvc": "9f2b6c0a8d1e4f7b9f2b6c0a8d1e4f7b.dir",
                "great expectations": "passed, 14 of 14",
            },
            "model": {
                "backbone": "embedded (ResNet-18)",
                "input size": [128, 128],
                "adaptation": "ses, 4 snapshots, 15 epochs",
                "neighbors": 2,
                "localization": "patch_memory",
            },
            "code": {"commit": "8814b2a", "seed": 0, "params": {"adapt.method": "ses", "gallery.k": 2}},
        },
    )


def _bytes(image: np.ndarray) -> np.ndarray:
    return np.round(image * 255).astype(np.uint8)
