# SPDX-License-Identifier: Apache-2.0
"""What a report shows, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from panda_ad.scoring.calibration import Threshold


@dataclass(frozen=True)
class Metric:
    """A headline figure with its interval (low, high), None where none was computed. `note` says how it was taken."""

    name: str
    value: float
    interval: tuple[float, float] | None = None
    note: str = ""


class Neighbor(NamedTuple):
    """A nearest normal image: uint8 (h, w, 3) and path."""

    thumb: np.ndarray
    path: str


class Spot(NamedTuple):
    """The part of an image with the peak of its heat map, at the image's own resolution.

    Attributes
    ----------
    rgb : uint8 (h, w, 3).
    box : its place (x0, y0, x1, y1) in shares of the image, in [0, 1].
    """

    rgb: np.ndarray
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class ReportImage:
    """One test image with its evidence.

    Attributes
    ----------
    path : its name in `Report.paths`.
    label : 0 good, 1 defective.
    defect : 'good' or the kind.
    rgb : uint8 (h, w, 3), any size; shown at most 256 px wide or high, so nothing is gained by more.
    spot : None where `rgb` shows all there is, or without localization.
    heatmap : float32 (h', w'), higher is more anomalous, covering the whole image; None without localization.
    mask : bool (h'', w''), ground truth covering the whole image; None where there is none.
    neighbors : of the nearest normal images, nearest first; five are shown.
    components : (feature score, map score), whose sum the score is, in standard deviations of normal images.
        None where the score is no sum.
    """

    path: str
    label: int
    defect: str
    score: float
    p_value: float
    rgb: np.ndarray
    heatmap: np.ndarray | None = None
    mask: np.ndarray | None = None
    neighbors: Sequence[Neighbor] = ()
    components: tuple[float, float] | None = None
    spot: Spot | None = None


@dataclass(frozen=True)
class DefectRow:
    """Figures of one kind of defect against all good test images; None where unknown.

    Attributes
    ----------
    defect : the kind.
    n : test images of it.
    auroc, interval : image AUROC, and its (low, high).
    pixel_auroc, au_pro : pixel figures of the same images.
    """

    defect: str
    n: int
    auroc: float | None
    interval: tuple[float, float] | None
    pixel_auroc: float | None = None
    au_pro: float | None = None


@dataclass(frozen=True)
class Report:
    """What the report shows.

    Attributes
    ----------
    headline : the figures at the top.
    threshold : the model's own; anomalous means score > its value.
    paths, defects : (N,) name and kind ('good' or the defect's name) of every test image.
    labels : (N,) 0 good, 1 defective.
    scores, p_values : (N,) float.
    calibration_scores : (M,) float.
    images : those shown as pictures, at most as many as evaluate.report_images; each one's path is in `paths`.
    cautions : one line each on what so few test images cannot tell.
    provenance : section ('data', 'model', 'code') -> key -> value.
    confidence : of every interval.
    bundle : folder of the model, as the command line takes it.
    """

    dataset: str
    category: str
    title: str
    created: str
    headline: Sequence[Metric]
    threshold: Threshold
    paths: Sequence[str]
    defects: Sequence[str]
    labels: np.ndarray
    scores: np.ndarray
    p_values: np.ndarray
    calibration_scores: np.ndarray
    images: Sequence[ReportImage]
    per_defect: Sequence[DefectRow] = ()
    cautions: Sequence[str] = ()
    provenance: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    confidence: float = 0.95
    bundle: str = "BUNDLE"
