"""What is wrong with a data set, in words: a reason per bad image, and what no leaving-out can mend."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from panda_ad.data.images import MODES
from panda_ad.data.manifest import COLUMNS, split_calibration
from panda_ad.params import Params

if TYPE_CHECKING:
    import pandas as pd

MIN_SIDE = 8
"""Pixels; a smaller image holds nothing to inspect."""
MIN_GALLERY = 4
"""Training images that must be left when the calibration images are held out."""


@dataclass(frozen=True)
class Checked:
    """A data set's rows and findings.

    Attributes
    ----------
    rows : every row of `collect`, `problem` filled in for each bad one, good training rows split into train and calibration.
    problems : (path, reason) of each bad file; quarantining them is enough.
    blocking : (folder, reason) of what stays wrong without them: too few images, a test set with one class.
    warnings : one line each, worth a look.
    """

    rows: pd.DataFrame
    problems: list[tuple[str, str]]
    blocking: list[tuple[str, str]]
    warnings: list[str]

    @property
    def usable(self) -> pd.DataFrame:
        """The manifest: good rows, its columns only."""
        return (
            self.rows.loc[self.rows["problem"] == "", COLUMNS]
            .astype({"width": "int64", "height": "int64"})
            .reset_index(drop=True)
        )


def check(rows: pd.DataFrame, params: Params) -> Checked:
    """Find everything wrong with the rows of `collect`."""
    rows = rows.copy()
    for find in (
        _small,
        _modes,
        _duplicates,
        _masks,
    ):  # in this order: each looks only at what the ones before let pass
        for index, reason in find(rows[rows["problem"] == ""]).items():
            rows.loc[index, "problem"] = reason
    good = split_calibration(rows[rows["problem"] == ""], params.data.calibration_fraction, params.seed)
    rows.loc[good.index, "split"] = good["split"]
    bad = rows[rows["problem"] != ""]
    problems = sorted(set(zip(bad["path"], bad["problem"], strict=True)))
    blocking, warnings = [], []
    for category in params.categories:
        blocking += _too_few(good[good["category"] == category], category, params)
        part = good[good["category"] == category]
        if modes := _mixed(part["mode"]):
            warnings.append(f"{category}: images of different pixel modes: {modes}")
        defective = part[(part["label"] == 1) & (part["split"] == "test")]
        without = defective.loc[defective["mask"] == "", "path"]
        if 0 < len(without) < len(defective):
            warnings.append(
                f"{category}: {len(without)} of {len(defective)} defective images have no mask, pixel figures leave them out: {_first(without)}"
            )
        if part["width"].nunique() > 1 or part["height"].nunique() > 1:
            spans = (
                f"{part['width'].min()} to {part['width'].max()} wide",
                f"{part['height'].min()} to {part['height'].max()} high",
            )
            warnings.append(
                f"{category}: images of different sizes, {spans[0]} and {spans[1]} (pixels); all are scaled to one"
            )
    return Checked(rows, problems, blocking, warnings)


def _each(rows: pd.DataFrame) -> Iterator[Any]:
    """The rows as named tuples (whose fields pandas' types do not know)."""
    return iter(rows.itertuples())


def _small(rows: pd.DataFrame) -> dict[int, str]:
    small = rows[(rows["width"] < MIN_SIDE) | (rows["height"] < MIN_SIDE)]
    return {
        r.Index: f"{r.width} x {r.height} pixels, too small: at least {MIN_SIDE} x {MIN_SIDE}" for r in _each(small)
    }


def _modes(rows: pd.DataFrame) -> dict[int, str]:
    odd = rows[~rows["mode"].isin(MODES)]
    return {r.Index: f"pixel mode {r.mode} is not one of {', '.join(MODES)}" for r in _each(odd)}


def _masks(rows: pd.DataFrame) -> dict[int, str]:
    """Of another size than the image, or empty."""
    found: dict[int, str] = {}
    for r in _each(rows[rows["mask"] != ""]):
        if (r.mask_width, r.mask_height) != (r.width, r.height):
            found[r.Index] = (
                f"its mask {r.mask} is {r.mask_width} x {r.mask_height} pixels, the image {r.width} x {r.height}"
            )
        elif not r.mask_marked:
            hint = (
                f": its largest value is {r.mask_largest}, marked is 128 and above (save masks as 0 and 255)"
                if r.mask_largest
                else ""
            )
            found[r.Index] = f"its mask {r.mask} is empty{hint}"
    return found


def _duplicates(rows: pd.DataFrame) -> dict[int, str]:
    """Equal pixels within a category: all but the first (train before test), or all, where they are labelled differently."""
    found: dict[int, str] = {}
    twins = rows[rows.duplicated(["category", "pixels"], keep=False)]
    for _, group in twins.groupby(["category", "pixels"], sort=False):
        group = group.assign(order=(group["split"] == "test").astype(int)).sort_values(["order", "path"])
        contradictory = group["label"].nunique() > 1
        for r in _each(group if contradictory else group.iloc[1:]):
            other = next(path for path in group["path"] if path != r.path)
            found[r.Index] = f"the same picture as {other}" + (", which has the other label" if contradictory else "")
    return found


def _too_few(rows: pd.DataFrame, category: str, params: Params) -> list[tuple[str, str]]:
    mvtec = params.data.layout == "mvtec"
    normal = ", ".join(params.data.normal_classes.get(category, [category]))
    train_folder, test_folder = (f"{category}/train/good", f"{category}/test") if mvtec else (f"train/{normal}", "test")
    train = rows[rows["split"] != "test"]
    test = rows[rows["split"] == "test"]
    left = len(train) - math.ceil(params.data.calibration_fraction * len(train))
    found = []
    if len(train) < params.data.min_train:
        found.append(
            (
                train_folder,
                f"{len(train)} usable training images of {category}, data.min_train asks for {params.data.min_train}",
            )
        )
    elif left < MIN_GALLERY:
        found.append(
            (
                train_folder,
                f"{left} of {len(train)} training images of {category} left beside calibration, {MIN_GALLERY} needed: add images or lower data.calibration_fraction",
            )
        )
    for label, what in ((0, "normal"), (1, "anomalous")):
        if not (test["label"] == label).any():
            found.append(
                (
                    test_folder,
                    f"no usable {what} test images of {category}: without both kinds nothing can be evaluated",
                )
            )
    return found


def _first(paths: Iterable[str], most: int = 3) -> str:
    names = list(paths)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _mixed(values: Iterable[str]) -> str:
    """'L (3), RGB (12)' for values that differ, '' where all are equal."""
    counts = Counter(values)
    return ", ".join(f"{value} ({n})" for value, n in sorted(counts.items())) if len(counts) > 1 else ""
