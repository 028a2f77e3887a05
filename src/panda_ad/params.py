# SPDX-License-Identifier: Apache-2.0
"""The pipeline's parameters, typed and checked: what `params.yaml` may hold."""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Fraction = Annotated[float, Field(gt=0, lt=1)]
PositiveInt = Annotated[int, Field(gt=0)]
Pixels = Annotated[int, Field(ge=16, le=4096)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Data(_Section):
    """Where the images are, how they are laid out, and how they are read (`data`)."""

    root: str
    layout: Literal["mvtec", "folders", "cifar10", "cifar100", "fashion_mnist", "flowers102"]
    normal_classes: dict[str, list[str]]
    limit_train: PositiveInt | None
    limit_test: PositiveInt | None
    min_train: Annotated[int, Field(ge=4)]
    calibration_fraction: Annotated[float, Field(ge=0, lt=1)]
    on_invalid: Literal["fail", "quarantine"]
    gray_range: Annotated[list[Annotated[int, Field(ge=0, le=65535)]], Field(min_length=2, max_length=2)] | None = None
    max_megapixels: Annotated[int, Field(ge=1, le=10_000)] = 100
    sessions: Literal["folder"] | dict[str, str | int | float] | None = None

    @field_validator("sessions", mode="before")
    @classmethod
    def _one_way_to_tell(cls, value: object) -> object:
        if problem := _sessions_problem(value):
            raise ValueError(problem)
        return value

    @field_validator("gray_range")
    @classmethod
    def _rises(cls, values: list[int] | None) -> list[int] | None:
        if values is not None and values[0] >= values[1]:
            raise ValueError(f"[lowest, highest] 16-bit gray is expected, found {values}")
        return values


def _sessions_problem(value: object) -> str:
    """Return what is wrong with `data.sessions`, '' where nothing is."""
    if value is None or value == "folder":
        return ""
    ways = "null, folder, {name: REGEX}, {csv: FILE} or {gap_minutes: M} is expected"
    if not isinstance(value, dict) or len(value) != 1:
        return f"{ways}, found {shown(value)}"
    ((way, how),) = value.items()
    if way == "gap_minutes":
        good = isinstance(how, int | float) and not isinstance(how, bool) and 0 < how < float("inf")
        return "" if good else f"gap_minutes is a number of minutes above 0, found {shown(how)}"
    if way not in ("name", "csv"):
        return f"{ways}, found {shown(value)}"
    if not isinstance(how, str) or not how:
        return f"{way} is a text, found {shown(how)}"
    if way == "csv":
        return ""
    try:
        re.compile(how)
    except re.error as e:
        return f"{how!r} is no regular expression: {e}"
    return ""


class BackboneParams(_Section):
    """The pretrained network, its input and the cache of its frozen activations (`backbone`)."""

    name: str
    weights: str
    input_size: Pixels | Annotated[list[Pixels], Field(min_length=2, max_length=2)]
    precision: Literal["fp32"]
    cache_gb: Annotated[float, Field(ge=0)]

    @property
    def size(self) -> tuple[int, int]:
        """Network input (height, width), pixels."""
        s = self.input_size
        return (s, s) if isinstance(s, int) else (s[0], s[1])


class Method(NamedTuple):
    """A method of adaptation: what trains, for how long and how fast where the parameters say null.

    Attributes
    ----------
    loss : name of a function of adapt/losses.py; '' trains nothing.
    epochs, learning_rate : the paper's.
    snapshots : whether `adapt.snapshots` of the way are kept and an image is scored by the best of them (SES).
    penalty : whether elastic weight consolidation holds the weights near the pretrained ones.
    outliers : whether a linear classifier learns to tell the images of `adapt.outliers` from normal ones, and scores.
    """

    loss: str
    epochs: int
    learning_rate: float
    snapshots: bool = False
    penalty: bool = False
    outliers: bool = False


METHODS = {
    "none": Method("", 0, 0.0),  # DN2: features as pretrained
    "compactness": Method("compactness", 15, 1e-2),
    "soft_boundary": Method("soft_boundary", 15, 1e-2),
    "ses": Method("compactness", 15, 1e-2, snapshots=True),
    "ewc": Method("compactness", 50, 1e-2, penalty=True),
    "oe": Method("outlier_exposure", 50, 1e-1, outliers=True),
}


class AdaptParams(_Section):
    """How the adapted layers are fine-tuned; null means the paper's value of the method (`adapt`)."""

    method: Literal[*METHODS]  # type: ignore[valid-type]
    epochs: PositiveInt | None
    batch_size: PositiveInt
    learning_rate: Annotated[float, Field(gt=0)] | None
    momentum: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: Annotated[float, Field(ge=0)]
    clip_norm: Annotated[float, Field(gt=0)]
    snapshots: Annotated[int, Field(ge=1, le=64)]
    ewc_lambda: Annotated[float, Field(ge=0)]
    fisher: str | None
    fisher_samples: PositiveInt
    outliers: str | None
    on_collapse: Literal["warn", "fallback"]
    precision: Literal["fp32", "bf16"] = "fp32"

    @model_validator(mode="after")
    def _outliers_are_given(self) -> AdaptParams:
        if METHODS[self.method].outliers and self.outliers is None:
            raise ValueError(f"method {self.method} needs adapt.outliers, a folder of outlier images")
        return self


class GalleryParams(_Section):
    """The nearest-neighbor score and the features it compares with (`gallery`)."""

    k: PositiveInt
    normalize: bool
    whiten: bool
    compression: Literal["none", "kmeans", "coreset"]
    size: PositiveInt
    relight: bool = False


class LocalizeParams(_Section):
    """How heat maps are made (`localize`)."""

    method: Literal["none", "spade", "patch_memory"]
    neighbors: PositiveInt
    memory_limit: PositiveInt
    sigma: Annotated[float, Field(ge=0)]
    tiles: Annotated[int, Field(ge=2, le=8)] | None

    @model_validator(mode="after")
    def _tiles_go_with_patch_memory(self) -> LocalizeParams:
        if self.tiles is not None and self.method != "patch_memory":
            raise ValueError(f"tiles need method: patch_memory, not {self.method}; change it, or set tiles: null")
        return self


class VerdictParams(_Section):
    """What an image's score is made of, and the false-alarm rate of its threshold (`verdict`)."""

    score: Literal["features", "heatmap", "both"]
    false_alarm_rate: Fraction


class EvaluateParams(_Section):
    """Confidence intervals and pictures of the evaluation (`evaluate`)."""

    bootstrap: Annotated[int, Field(ge=10)]
    confidence: Fraction
    report_images: PositiveInt


Share = Annotated[float, Field(ge=0, le=1)]


class GateParams(_Section):
    """One entry per rule of `registry/gate.py`; null turns a rule off."""

    margin: Share | None
    recall_margin: Share | None
    decision_margin: Share | None
    confidence: Fraction
    min_image_auroc: Share | None
    min_pixel_auroc: Share | None
    min_defect_auroc: Share | dict[str, Share] | None
    min_defect_recall: Share | dict[str, Share] | None
    must_catch: list[str]
    false_alarm_risk: Fraction | None
    promise_confidence: Fraction | None = 0.95
    max_latency_ms: Annotated[float, Field(gt=0)] | None
    max_bundle_mb: Annotated[float, Field(gt=0)] | None


class MonitorParams(_Section):
    """How many scored images are watched for drift, and what counts as drift (`monitor`)."""

    window: PositiveInt
    min_images: Annotated[int, Field(ge=4)]
    significance: Fraction
    min_shift: Annotated[float, Field(ge=0)]
    settle_seconds: Annotated[float, Field(ge=0, le=600)] = 5.0

    @model_validator(mode="after")
    def _window_holds_enough(self) -> MonitorParams:
        if self.window < self.min_images:
            raise ValueError(f"monitor.window ({self.window}) is smaller than monitor.min_images ({self.min_images})")
        return self


class Params(_Section):
    """All of `params.yaml`; the comments there say what each key means."""

    dataset: str
    categories: Annotated[list[str], Field(min_length=1)]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    data: Data
    backbone: BackboneParams
    adapt: AdaptParams
    gallery: GalleryParams
    localize: LocalizeParams
    verdict: VerdictParams
    evaluate: EvaluateParams
    gate: GateParams
    monitor: MonitorParams

    @model_validator(mode="after")
    def _score_has_its_heat_map(self) -> Params:
        if self.verdict.score != "features" and self.localize.method == "none":
            raise ValueError(
                f"verdict.score: {self.verdict.score} needs heat maps; set localize.method, or verdict.score: features"
            )
        return self

    @field_validator("dataset")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise ValueError("use letters, digits, '_', '.' and '-' only: it becomes part of a registered model's name")
        return name

    @field_validator("categories")
    @classmethod
    def _usable_names(cls, names: list[str]) -> list[str]:
        if len(set(names)) != len(names):
            raise ValueError("a category is listed twice")
        for name in names:
            if reason := _unusable(name):
                raise ValueError(f"{name!r} cannot name a category: {reason}")
        known: dict[str, str] = {}
        for name in names:
            other = known.setdefault(plain_name(unicodedata.normalize("NFC", name)).casefold(), name)
            if other != name:
                raise ValueError(f"{other!r} and {name!r} would share one name in MLflow or on disk; rename one")
        return names


_RESERVED = {"data", "seconds", "peak_mb"}
"""Names an MLflow run uses itself, for the whole data set and for stages that run once; no category may have one."""


def plain_name(category: str) -> str:
    """Return a category as part of metric names and artifact paths; MLflow allows fewer characters than folders do."""
    return re.sub(r"[^\w\- ]", "_", category)


def _unusable(category: str) -> str:
    """Return why a name can be no category's, '' where it can.

    It becomes part of commands, paths, DVC's stages and MLflow's addresses.
    """
    if not category or category != category.strip():
        return "it is empty, or begins or ends with a blank"
    if category[0] in ".-" or category.lower().endswith(".dvc"):
        return "no '.' or '-' at the beginning, no '.dvc' at the end"
    if re.search(r"[/\\:%\"'@$`*?#<>|{}\[\]!]", category) or not category.isprintable():
        return "no / \\ : % @ $ ` * ? # < > | { } [ ] ! quotes or line breaks: it becomes part of commands and paths"
    if category in _RESERVED:
        return "an MLflow run keeps the figures or files of the whole data set under that name"
    return ""


def shown(value: object) -> str:
    """Write a value as an error names it, not too long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # thousands of digits, or a list in itself
        return f"a {type(value).__name__} too long to show"
    return text if len(text) <= 200 else f"{text[:200]}..."
