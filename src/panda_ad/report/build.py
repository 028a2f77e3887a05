# SPDX-License-Identifier: Apache-2.0
"""Build the report: figures, curves, pictures and provenance in one HTML string that opens offline.

How pages are put together is in `page.py`.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from panda_ad.report.content import Report
from panda_ad.report.encode import encode_images
from panda_ad.report.page import render
from panda_ad.system.files import write_text

SCRIPTS = ("vendor/uPlot.iife.min.js", "charts.js", "gallery.js", "report.js")


def write_report(report: Report, path: Path | str) -> None:
    """Write the report atomically as UTF-8."""
    write_text(path, build_report(report))


def build_report(report: Report) -> str:
    """Build one self-contained HTML page.

    Raises
    ------
    ValueError
        Arrays of different lengths, a score that is not finite, or a picture whose path is not in `report.paths`.
    """
    data = _data(report)
    good = int((np.asarray(report.labels) == 0).sum())
    alarms = np.asarray(report.scores, np.float64) > report.threshold.value
    defects = np.asarray(report.defects, dtype=object)
    return render(
        "template.html.j2",
        SCRIPTS,
        data,
        report=report,
        good=good,
        defective=len(report.scores) - good,
        caught={row.defect: int(alarms[defects == row.defect].sum()) for row in report.per_defect},
        has_pixels=any(row.pixel_auroc is not None or row.au_pro is not None for row in report.per_defect),
        has_heatmaps=data["heat"] is not None,
        has_neighbors=any(image["neighbors"] for image in data["images"]),
        has_masks=any(image["outline"] for image in data["images"]),
    )


def _data(report: Report) -> dict[str, Any]:
    """Return what the page's scripts read."""
    n = len(report.scores)
    lengths: dict[str, Sequence[Any] | np.ndarray] = {
        "paths": report.paths,
        "defects": report.defects,
        "labels": report.labels,
        "p_values": report.p_values,
    }
    for name, values in lengths.items():
        if len(values) != n:
            raise ValueError(f"report: {len(values)} {name} for {n} scores")
    rows = {path: i for i, path in enumerate(report.paths)}
    unknown = [image.path for image in report.images if image.path not in rows]
    if unknown:
        raise ValueError(f"report: picture {unknown[0]!r} is not among the scored images")
    pictures = encode_images(report.images)
    for item, image in zip(pictures["images"], report.images, strict=True):
        item["row"] = rows[image.path]
    kinds = sorted(set(report.defects), key=lambda kind: (kind != "good", kind))
    limit = float(report.threshold.value)
    return {
        "threshold": limit if np.isfinite(limit) else None,
        "confidence": report.confidence,
        "bundle": shlex.quote(report.bundle),
        "kinds": kinds,
        "kind": [kinds.index(d) for d in report.defects],
        "labels": np.asarray(report.labels, int).tolist(),
        "scores": np.asarray(report.scores, np.float64).tolist(),
        "pValues": np.round(np.asarray(report.p_values, np.float64), 6).tolist(),
        "paths": list(report.paths),
        "calibration": np.sort(np.asarray(report.calibration_scores, np.float64)).tolist(),
        "rates": _rate_intervals(len(report.calibration_scores), report.confidence),
        **pictures,
    }


def _rate_intervals(m: int, confidence: float) -> list[list[float]]:
    """Return the interval of the true false-alarm rate for each place of the threshold, l = 1 .. m + 1.

    At place l, l - 1 of m calibration scores lie above the threshold.

    With the threshold at the l-th largest of m exchangeable scores, the rate follows Beta(l, m + 1 - l).
    Source: order statistics; Vovk, Conditional validity of inductive conformal predictors, 2012.
    Above them all (l = m + 1) it is 1.
    """
    from scipy.special import betaincinv

    l = np.arange(1, m + 1, dtype=np.float64)  # noqa: E741
    tail = (1 - confidence) / 2
    bounds = np.stack([betaincinv(l, m + 1 - l, tail), betaincinv(l, m + 1 - l, 1 - tail)], axis=1)
    return [*np.round(bounds, 5).tolist(), [1.0, 1.0]]
