# SPDX-License-Identifier: Apache-2.0
"""The data set's contract: one table of expectations, each with what it says of a row that breaks it.

Great Expectations decides which rows break which expectation (`validation`).
The first broken one in this table gives the row's reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from panda_ad.data.images import MODES
from panda_ad.params import Params

if TYPE_CHECKING:
    import pandas as pd

MIN_SIDE = 8
"""Pixels; a smaller image holds nothing to inspect."""
MIN_GALLERY = 4
"""Training images that must be left where some are kept out of the adaptation."""
COPIES = "No picture occurs twice in a category, within or across train and test"

Reasons = Callable[["pd.DataFrame"], Mapping[Any, str]]


@dataclass(frozen=True)
class ImageRule:
    """An expectation of each image.

    Attributes
    ----------
    description : in words.
    expectation : Great Expectations' class without its 'Expect'.
    arguments : what it is made with. Empty cells do not count.
    reasons : from the rows that break it to {index: reason} of those that must go.
    split : the split it is said of; '' of all.
    """

    description: str
    expectation: str
    arguments: dict[str, Any]
    reasons: Reasons
    split: str = ""


@dataclass(frozen=True)
class CountRule:
    """An expectation of how many usable images a category has.

    Attributes
    ----------
    splits, label : which images count.
    least : so many are needed.
    folder, reason : what is said where there are fewer; {n} is how many there are.
    needed : False: what is missing is only said, and training goes on.
    column : where given, its distinct values among these images are counted, '' aside, and not the images.
    """

    category: str
    description: str
    splits: tuple[str, ...]
    label: int
    least: int
    folder: str
    reason: str
    needed: bool = True
    column: str = ""


def small_reason(width: int, height: int) -> str:
    """Say that an image of so many pixels is too small."""
    return f"{width} x {height} pixels, too small: at least {MIN_SIDE} x {MIN_SIDE}"


def _each(write: Callable[[Any], str]) -> Reasons:
    return lambda rows: {row.Index: write(row) for row in rows.itertuples()}


_SMALL = _each(lambda row: small_reason(row.width, row.height))
_MASK_SIZE = _each(
    lambda row: (
        f"its mask {row.mask} is {row.mask_width} x {row.mask_height} pixels, the image {row.width} x {row.height}"
    )
)


def empty_mask_reason(mask: object, largest: int) -> str:
    """Say that a mask marks nothing, and why that may be."""
    hint = f": its largest value is {largest}, marked is 128 and above (save masks as 0 and 255)" if largest else ""
    return f"its mask {mask} is empty{hint}"


def _copies(rows: pd.DataFrame) -> dict[Any, str]:
    """Return all copies but the first (train before test), or all, where they are labeled differently."""
    found: dict[Any, str] = {}
    for _, group in rows.groupby(["category", "pixels"], sort=False):
        ordered = group.assign(order=(group["split"] == "test").astype(int)).sort_values(["order", "path"])
        contradictory = ordered["label"].nunique() > 1
        for row in (ordered if contradictory else ordered.iloc[1:]).itertuples():
            other = next(path for path in ordered["path"] if path != row.path)
            found[row.Index] = f"the same picture as {other}" + (", which has the other label" if contradictory else "")
    return found


def image_rules() -> list[ImageRule]:
    """Return the expectations of images; the first that an image breaks gives the reason."""
    between, equal, null = "ColumnValuesToBeBetween", "ColumnPairValuesToBeEqual", "ColumnValuesToBeNull"
    side = {"min_value": MIN_SIDE}
    return [
        ImageRule(
            "Every file has a place in the layout",
            null,
            {"column": "misplaced"},
            _each(lambda row: str(row.misplaced)),
        ),
        ImageRule(
            "No defective image in train",
            "ColumnValuesToBeInSet",
            {"column": "label", "value_set": [0]},
            _each(lambda _: "a defective image in train: only train/good may hold training images"),
            split="train",
        ),
        ImageRule("Every file decodes", null, {"column": "unreadable"}, _each(lambda row: str(row.unreadable))),
        ImageRule(f"Images are at least {MIN_SIDE} pixels wide", between, {"column": "width", **side}, _SMALL),
        ImageRule(f"Images are at least {MIN_SIDE} pixels high", between, {"column": "height", **side}, _SMALL),
        ImageRule(
            "Pixel modes are known",
            "ColumnValuesToBeInSet",
            {"column": "mode", "value_set": list(MODES)},
            _each(lambda row: f"pixel mode {row.mode} is not one of {', '.join(MODES)}"),
        ),
        ImageRule(
            COPIES,
            "CompoundColumnsToBeUnique",
            {"column_list": ["category", "pixels"], "ignore_row_if": "any_value_is_missing"},
            _copies,
        ),
        *(
            ImageRule(
                f"Masks are as {word} as their images",
                equal,
                {"column_A": f"mask_{length}", "column_B": length, "ignore_row_if": "either_value_is_missing"},
                _MASK_SIZE,
            )
            for word, length in (("wide", "width"), ("high", "height"))
        ),
        ImageRule(
            "Masks mark at least one pixel",
            between,
            {"column": "mask_marked", "min_value": 1},
            _each(lambda row: empty_mask_reason(row.mask, row.mask_largest)),
        ),
    ]


def count_rules(params: Params, training_images: Mapping[str, int]) -> Iterator[CountRule]:
    """Yield the expectations of each category's usable images.

    `training_images` is how many of them train and calibrate.
    """
    few, fraction = params.data.min_train, params.data.calibration_fraction
    for category in params.categories:
        normal = ", ".join(params.data.normal_classes.get(category, [category]))
        mvtec = params.data.layout == "mvtec"
        train, test = (f"{category}/train/good", f"{category}/test") if mvtec else (f"train/{normal}", "test")
        both = ("train", "calibration")
        short = f"{{n}} usable training images of {category}, data.min_train asks for {few}"
        yield CountRule(category, "training images", both, 0, few, train, short)
        n = training_images[category]
        if n >= few and fraction:
            left = f"{{n}} of {n} training images of {category} left for the adaptation, {MIN_GALLERY} needed"
            hint = f"{left}: add images or lower data.calibration_fraction ({fraction})"
            yield CountRule(
                category, "training images left for the adaptation", ("train",), 0, MIN_GALLERY, train, hint
            )
        if params.data.sessions is not None:
            yield CountRule(
                category,
                "sessions of training images",
                both,
                0,
                2,
                train,
                f"training images of {category} are of {{n}} known session(s): what a session never seen will bring "
                "cannot be told from that; add good images of another shift, lot or camera",
                needed=False,
                column="session",
            )
        yield CountRule(
            category,
            "normal test images",
            ("test",),
            0,
            1,
            test,
            f"no usable normal test images of {category}: false alarms are known from the calibration images only",
            needed=False,
        )
        yield CountRule(
            category,
            "anomalous test images",
            ("test",),
            1,
            1,
            test,
            f"no usable anomalous test images of {category}: model, threshold and heat maps are made, "
            "how many defects they find is not known",
            needed=False,
        )
