# SPDX-License-Identifier: Apache-2.0
"""The manifest: one row per category and image, from files read once each.

Columns (COLUMNS): path, sha256 (of the file), width, height (upright, pixels), mode (Pillow's, as stored), category,
split (train, calibration, test), label (0 normal, 1 anomalous), defect ('good' or its name), mask ('' or path), pixels
(sha256 of the decoded RGB pixels: equal for the same picture in another file format), mask_sha256, session ('' or its
name, `sessions`).
"""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from panda_ad.data.images import Decoding
from panda_ad.data.layouts import Entry, image_root, list_entries
from panda_ad.data.records import Record, Records, digest, inspect_image, inspect_mask, read_all
from panda_ad.data.sessions import sessions_of
from panda_ad.errors import UserError
from panda_ad.params import Params
from panda_ad.system.files import atomic_file

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = [
    "path",
    "sha256",
    "width",
    "height",
    "mode",
    "category",
    "split",
    "label",
    "defect",
    "mask",
    "pixels",
    "mask_sha256",
    "session",
]


_NEEDED = [name for name in COLUMNS if name not in ("pixels", "mask_sha256", "session")]
"""Columns that readers of a manifest need."""


def collect(params: Params) -> tuple[pd.DataFrame, list[str]]:
    """Read every image of the categories, usable or not.

    Returns
    -------
    rows : COLUMNS (split train or test), and what validation needs beyond them: `misplaced` and `unreadable` ('' or the
        reason), `mask_width`, `mask_height`, `mask_marked` (pixels) and `mask_largest` (0..255), NaN where there is
        nothing to measure, `doubt` ('' or a sign of damage), `thumb` ('' or see `records`), `low` and `high` (values of
        16-bit gray, else NaN).
    warnings : one line each.
    """
    import pandas as pd

    root, decoding = image_root(params), Decoding.of(params.data)
    with Records(root, decoding=decoding) as cache:
        listing = list_entries(params, root)
        entries = _limit(listing.entries, params, cache)
        placed = [e for e in entries if not e.problem]
        inspect = [functools.partial(one, decoding=decoding) for one in (inspect_image, inspect_mask)]
        read = read_all({e.path for e in placed}, "image", inspect[0], cache)
        masks = read_all({e.mask for e in placed if e.mask}, "mask", inspect[1], cache)
    rows = [_row(e, read.get(e.path, {}), masks.get(e.mask, {})) for e in entries]
    measures = ["mask_width", "mask_height", "mask_marked", "mask_largest", "low", "high"]
    frame = pd.DataFrame(rows, columns=[*COLUMNS, "misplaced", "unreadable", "doubt", "thumb", *measures])
    for _, part in frame.groupby("category", sort=False):
        taken = [read.get(path, {}).get("taken", "") for path in part["path"]]
        frame.loc[part.index, "session"] = sessions_of(part["path"].tolist(), taken, params, root)
    types = {"width": "Int64", "height": "Int64", "label": "int64", **dict.fromkeys(measures, "Int64")}
    return frame.astype(types), listing.warnings


def _row(entry: Entry, image: Record, mask: Record) -> dict[str, Any]:
    low, high = image.get("values", (None, None))
    return {
        **{k: getattr(entry, k) for k in ("path", "category", "split", "label", "defect", "mask")},
        **{k: image.get(k, "") for k in ("sha256", "mode", "pixels", "doubt", "thumb")},
        **{k: image.get(k) for k in ("width", "height")},
        "mask_sha256": mask.get("sha256", ""),
        "session": "",
        **{f"mask_{k}": mask.get(k) for k in ("width", "height", "marked", "largest")},
        "low": low,
        "high": high,
        "misplaced": entry.problem,
        "unreadable": image.get("problem", "") or mask.get("problem", ""),
    }


def existing_images(params: Params, category: str) -> list[tuple[Entry, Record]]:
    """Return every image of one category with what reading it found; only files that no run has read yet are read."""
    root, decoding = image_root(params), Decoding.of(params.data)
    with Records(root, keep=True, decoding=decoding) as cache:
        entries = list_entries(params.model_copy(update={"categories": [category]}), root).entries
        read = read_all(
            {e.path for e in entries if not e.problem},
            "image",
            functools.partial(inspect_image, decoding=decoding),
            cache,
        )
    return [(e, read.get(e.path, {})) for e in entries]


def draw_key(seed: int, purpose: str, content: str) -> str:
    """Return a key that sorts images in a seeded random order.

    It is a property of each image's content: adding images does not reorder the others.
    """
    return hashlib.sha256(f"{seed}:{purpose}:{content}".encode()).hexdigest()


def _limit(entries: list[Entry], params: Params, cache: Records) -> list[Entry]:
    """Keep at most limit_train and limit_test images of each category, the latter in proportion to its strata."""
    limits = {"train": params.data.limit_train, "test": params.data.limit_test}
    groups: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for e in entries:
        if not e.problem and (e.split == "test" or not e.label):
            groups[e.category, e.split].append(e)
    over = {key: group for key, group in groups.items() if (limit := limits[key[1]]) is not None and len(group) > limit}
    digests = read_all({e.path for group in over.values() for e in group}, "file", digest, cache)
    dropped = set()
    for (category, split), group in over.items():
        strata: dict[str, list[Entry]] = defaultdict(list)
        for e in group:
            strata[e.stratum if split == "test" else ""].append(e)
        quota = apportion({name: len(members) for name, members in strata.items()}, limits[split] or 0)
        for name, members in strata.items():
            members.sort(key=lambda e: (draw_key(params.seed, "limit", digests[e.path]["sha256"]), e.path))
            dropped |= {(category, e.split, e.path) for e in members[quota[name] :]}
    return [e for e in entries if e.problem or (e.category, e.split, e.path) not in dropped]


def apportion(sizes: dict[str, int], limit: int) -> dict[str, int]:
    """Share `limit` seats in proportion to `sizes` (largest remainders), at least one each if there are enough."""
    total = sum(sizes.values())
    if limit >= total:
        return dict(sizes)
    floor = 1 if limit >= len(sizes) else 0
    spare = limit - floor * len(sizes)
    ideal = {name: spare * (size - floor) / max(1, total - floor * len(sizes)) for name, size in sizes.items()}
    seats = {name: floor + math.floor(share) for name, share in ideal.items()}
    by_remainder = sorted(sizes, key=lambda name: (math.floor(ideal[name]) - ideal[name], name))
    for name in by_remainder[: limit - sum(seats.values())]:
        seats[name] += 1
    return seats


def split_calibration(rows: pd.DataFrame, fraction: float, seed: int) -> pd.DataFrame:
    """Hold ceil(fraction * n) of each category's training images out for calibration: the first by `draw_key`."""
    rows = rows.copy()
    for _, train in rows[rows["split"] == "train"].groupby("category", sort=False):
        keys = train["sha256"].map(lambda content: draw_key(seed, "calibration", content))
        held = keys.sort_values(kind="stable").index[: math.ceil(fraction * len(train))]
        rows.loc[held, "split"] = "calibration"
    return rows


def write_manifest(rows: pd.DataFrame, path: Path | str) -> None:
    """Write rows as CSV, atomically. Every text is quoted, so that any file name comes back as it was."""
    with atomic_file(path) as temporary:
        rows.to_csv(temporary, index=False, encoding="utf-8", lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)


def load_manifest(path: Path | str, category: str | None = None) -> pd.DataFrame:
    """Read a manifest, or one category's rows of it (their index is 0, 1, ... either way).

    Raises
    ------
    UserError
        The file cannot be read, or lacks the category.
    """
    import pandas as pd

    try:
        rows = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8", index_col=False)
        if missing := [name for name in _NEEDED if name not in rows.columns]:
            raise ValueError(f"it has no column {', '.join(missing)}")
        rows = (
            rows.assign(session=rows.get("session", ""))
            .fillna("")
            .astype({"width": "int64", "height": "int64", "label": "int64"})
        )
        odd = ~rows["split"].isin(("train", "calibration", "test")) | ~rows["label"].isin((0, 1))
        odd |= (rows["width"] < 1) | (rows["height"] < 1)
        if odd.any():
            raise ValueError(f"row {int(odd.to_numpy().argmax()) + 1} has a split, label or size that there is not")
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); the validate stage writes it") from None
    except (ValueError, KeyError, OverflowError) as e:
        raise UserError(
            f"{path}: not a manifest ({' '.join(str(e).split())[:120]}); run the validate stage again"
        ) from None
    if category is not None:
        rows = rows[rows["category"] == category].reset_index(drop=True)
        if rows.empty:
            raise UserError(f"{path}: holds no images of category {category!r}")
    return rows


def data_hash(rows: pd.DataFrame) -> str:
    """Return the sha256 (hex) over the sorted (path, sha256) of images and masks."""
    files = set(zip(rows["path"], rows["sha256"], strict=True)) | set(
        zip(rows["mask"], rows["mask_sha256"], strict=True)
    )
    return hashlib.sha256(json.dumps(sorted(f for f in files if f[0])).encode()).hexdigest()
