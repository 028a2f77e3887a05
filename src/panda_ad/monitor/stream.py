# SPDX-License-Identifier: Apache-2.0
"""A category's logged images in the order in which they were first logged, whichever version scored them.

What an image is like (light, focus, color) does not depend on the version that scored it; its score does.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from panda_ad.features.image_statistics import NAMES
from panda_ad.monitor.log import LOG, read_file, verdict_files


@dataclass(frozen=True)
class Stream:
    """N images, each once.

    Attributes
    ----------
    times : (N,) datetime64[us], UTC, ascending: when an image was first logged.
    sha256 : (N,) str, of the files.
    statistics : (N, S) float64, columns as `image_statistics.NAMES`.
    scores : (N,) float64, by the version that is looked at; NaN where it has not scored the image.
    seen : (N,) bool, whether that version was made from the image.
    """

    times: np.ndarray
    sha256: np.ndarray
    statistics: np.ndarray
    scores: np.ndarray
    seen: np.ndarray

    def __len__(self) -> int:
        return len(self.times)

    @property
    def own(self) -> np.ndarray:
        """(N,) bool, whether the version has scored the image."""
        return np.isfinite(self.scores)

    def take(self, chosen: np.ndarray) -> Stream:
        """Return some of the images, by a mask (N,) or by ascending indices."""
        return Stream(
            *(column[chosen] for column in (self.times, self.sha256, self.statistics, self.scores, self.seen))
        )


def read_stream(category: str, model: str, version: str, seen: Set[str] = frozenset(), log: Path = LOG) -> Stream:
    """Return all logged images of a category.

    Parameters
    ----------
    model, version : whose scores are wanted.  seen : sha256 (hex) of the images that it was made from.

    Raises
    ------
    UserError
        A file of the log is damaged.
    """
    rows: dict[str, tuple[Any, ...]] = {}
    scores: dict[str, float] = {}
    for path in verdict_files(category, log):
        for table in read_file(path, None, None, ["time", "sha256", "score", *NAMES]):
            times = table["time"].to_numpy().astype("datetime64[us]")
            hashes = table["sha256"].to_pylist()
            values = np.stack([table[name].to_numpy() for name in NAMES], axis=1)
            mine = [
                (m, v) == (model, version)
                for m, v in zip(table["model"].to_pylist(), table["version"].to_pylist(), strict=True)
            ]
            for i, key in enumerate(hashes):
                if key not in rows or times[i] < rows[key][0]:
                    rows[key] = times[i], values[i]
                if mine[i]:
                    scores.setdefault(key, float(table["score"][i].as_py()))
    keys = sorted(rows, key=lambda key: (rows[key][0], key))
    return Stream(
        np.array([rows[key][0] for key in keys], dtype="datetime64[us]"),
        np.array(keys, dtype=str),
        np.array([rows[key][1] for key in keys], dtype=np.float64).reshape(len(keys), len(NAMES)),
        np.array([scores.get(key, np.nan) for key in keys], dtype=np.float64),
        np.array([key in seen for key in keys], dtype=bool),
    )
