# SPDX-License-Identifier: Apache-2.0
"""What is worth a look in usable images: nothing here stops the pipeline."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from panda_ad.data.images import Decoding
from panda_ad.data.records import THUMB
from panda_ad.data.sessions import unknown_sessions
from panda_ad.params import Params

if TYPE_CHECKING:
    import pandas as pd

FEW_DEFECTS = 5
"""With fewer defective test images, figures say little."""
MIN_LEVELS = 64
"""16-bit gray that fills fewer of 256 levels is worth a warning."""
NEAR = 0.2
"""A test image this much nearer to a training image than training images are to each other is nearly a copy.

The distance among training images is the median of each one's distance to its nearest.
"""
_MOST_PAIRS = 50_000_000


def find_warnings(good: pd.DataFrame, params: Params) -> list[str]:
    """Look at the usable rows of `collect`. Return one line for each finding, by category."""
    found = []
    for category in params.categories:
        part = good[good["category"] == category]
        for kind in (_modes, _sizes, _masks, _defects, _doubts, lambda p: _gray_range(p, params), _near_copies):
            found += [" ".join(f"{category}: {line}".split()) for line in kind(part)]
        stray = part.loc[(part["session"] == "") & (part["label"] == 0), "path"].tolist()
        if params.data.sessions is not None and stray:
            found.append(unknown_sessions(params, category, stray))
    return found


def first(paths: Iterable[str], most: int = 3) -> str:
    """Name the first paths, and how many more there are."""
    names = list(paths)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _modes(part: pd.DataFrame) -> Iterator[str]:
    counts = Counter(part["mode"])
    if len(counts) > 1:
        yield f"images of different pixel modes: {', '.join(f'{value} ({n})' for value, n in sorted(counts.items()))}"


def _sizes(part: pd.DataFrame) -> Iterator[str]:
    if part["width"].nunique() > 1 or part["height"].nunique() > 1:
        wide = f"{part['width'].min()} to {part['width'].max()} wide"
        high = f"{part['height'].min()} to {part['height'].max()} high"
        yield f"images of different sizes, {wide} and {high} (pixels); all are scaled to one"


def _masks(part: pd.DataFrame) -> Iterator[str]:
    defective = part[(part["label"] == 1) & (part["split"] == "test")]
    without = defective.loc[defective["mask"] == "", "path"]
    if 0 < len(without) < len(defective):
        yield (
            f"{len(without)} of {len(defective)} defective images have no mask, "
            f"pixel figures leave them out: {first(without)}"
        )

    marked = part[part["mask_marked"].notna()]
    most = marked.loc[2 * marked["mask_marked"] > marked["mask_width"] * marked["mask_height"], "path"].tolist()
    if most:
        yield f"{len(most)} masks mark more than half of their image, as inverted ones do: {first(most)}"


def _defects(part: pd.DataFrame) -> Iterator[str]:
    n = int(((part["label"] == 1) & (part["split"] == "test")).sum())
    if 0 < n < FEW_DEFECTS:
        yield f"only {n} defective test image{'s' if n > 1 else ''}: figures on defects say little"


def _doubts(part: pd.DataFrame) -> Iterator[str]:
    doubtful = part[part["doubt"] != ""]
    for reason, group in doubtful.groupby("doubt"):
        yield f"{len(group)} images may be damaged ({reason}): {first(group['path'])}"


def _gray_range(part: pd.DataFrame, params: Params) -> Iterator[str]:
    gray = part[part["high"].notna()]
    if gray.empty:
        return
    low, high = int(gray["low"].min()), int(gray["high"].max())
    black, white = Decoding.of(params.data).gray_range
    if narrow := narrow_range(low, high, (black, white)):
        yield narrow
    beyond = gray[(gray["low"] < black) | (gray["high"] > white)]
    if len(beyond):
        yield f"{len(beyond)} images hold values from {low} to {high}, beyond data.gray_range: {first(beyond['path'])}"


def narrow_range(low: int, high: int, gray_range: tuple[int, int]) -> str:
    """Say that 16-bit gray values from `low` to `high` fill few gray levels between black and white; '' where not."""
    black, white = gray_range
    levels = max(0, min(high, white) - max(low, black)) * 255 / (white - black)
    if levels >= MIN_LEVELS:
        return ""
    full = 2 ** max(8, high.bit_length()) - 1
    return (
        f"16-bit images hold values from {low} to {high}, which are {levels + 1:.0f} of 256 gray levels: "
        f"set data.gray_range, e.g. [0, {full}], or to the window that matters"
    )


def _near_copies(part: pd.DataFrame) -> Iterator[str]:
    """Find the same picture saved again, in train and test.

    Such pictures are far nearer to each other than images of different parts are.
    """
    train, test = part[part["split"] != "test"], part[part["split"] == "test"]
    if len(train) < 3 or test.empty or len(train) * (len(train) + len(test)) > _MOST_PAIRS:
        return
    a, b = _thumbs(train), _thumbs(test)
    own, _ = _nearest(a, a, itself=True)
    typical = float(np.median(own))
    distances, index = _nearest(b, a)
    near = np.flatnonzero(distances < NEAR * typical)
    pairs = [f"{test['path'].iloc[i]} of {train['path'].iloc[index[i]]}" for i in near]
    if pairs:
        yield (
            f"{len(pairs)} test images are nearly copies of training images "
            f"(the same picture saved again?): {first(pairs)}"
        )


def _thumbs(rows: pd.DataFrame) -> np.ndarray:
    """Return the reduced pictures, float32 (N, THUMB * THUMB)."""
    data = b"".join(base64.b64decode(thumb) for thumb in rows["thumb"])
    return np.frombuffer(data, np.float16).reshape(len(rows), THUMB * THUMB).astype(np.float32)


def _nearest(x: np.ndarray, y: np.ndarray, itself: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return the distance (N,) from each row of x to the nearest of y, and its index.

    With `itself`, x is y, and no row is its own neighbor.
    """
    distances, indices = np.empty(len(x), np.float32), np.empty(len(x), np.intp)
    block = max(1, 4_000_000 // len(y))
    center = y.mean(axis=0)
    x, y = x - center, y - center
    for start in range(0, len(x), block):
        part = x[start : start + block]
        squared = (part**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * part @ y.T
        if itself:
            squared[np.arange(len(part)), start + np.arange(len(part))] = np.inf
        indices[start : start + block] = squared.argmin(axis=1)
        distances[start : start + block] = np.sqrt(np.maximum(squared.min(axis=1), 0))
    return distances, indices
