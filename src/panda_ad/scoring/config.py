# SPDX-License-Identifier: Apache-2.0
"""What a detector is of and how it scores: the typed part of bundle.json."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from panda_ad.params import GalleryParams, LocalizeParams, VerdictParams

ScoreKind = Literal["features", "heatmap", "both"]


class DetectorConfig(BaseModel):
    """How a detector scores, and what it is of.

    Attributes
    ----------
    dataset, category : names, for messages and logs.
    method : of adaptation: none, compactness, ses, ewc or oe.
    k : nearest neighbors summed into the feature score.
    normalize : whether features are L2-normalized.
    whiten : whether they are whitened after that.
    score : the feature score, the map score, or the sum of both in robust units.
    false_alarm_rate : share of good parts that may raise an alarm, in (0, 1).
    heatmap_range : where an overlay's color starts and where it is full, in units of the heat map.
        None without a localizer.
    gray_range : 16-bit gray values that are black and white in all its images; None: 0 and 65535.
    max_megapixels : larger images are refused.
    provenance : facts on how the model was made.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dataset: str = ""
    category: str = ""
    method: str = "none"
    k: int = 2
    normalize: bool = False
    whiten: bool = True
    score: ScoreKind = "both"
    false_alarm_rate: float = 0.05
    heatmap_range: tuple[float, float] | None = None
    gray_range: tuple[int, int] | None = None
    max_megapixels: int = 100
    provenance: dict[str, Any] = {}


class FitParams(BaseModel):
    """What `fit_detector` needs beside the images: sections of params.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    gallery: GalleryParams
    localize: LocalizeParams
    verdict: VerdictParams
    seed: int = 0
