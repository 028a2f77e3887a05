# SPDX-License-Identifier: Apache-2.0
"""Logged verdicts of one version, as the tests by name and the report take them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from panda_ad.monitor.drift import Sample


@dataclass(frozen=True)
class Window:
    """Logged verdicts of one category and version, oldest first.

    Attributes
    ----------
    times : (N,) datetime64[us], UTC.
    paths, sha256 : N strings.
    p_values : (N,).
    alarms : (N,) bool.
    threshold : of the newest.
    sample : scores, statistics and features, as `drift.find_drift` takes them.
    """

    category: str
    model: str
    version: str
    times: np.ndarray
    paths: list[str]
    sha256: list[str]
    p_values: np.ndarray
    alarms: np.ndarray
    threshold: float
    sample: Sample

    def __len__(self) -> int:
        return len(self.paths)

    def last(self, count: int) -> Window:
        """Return the newest verdicts, at most so many."""
        return self.of(np.array(self.sha256[-count:]))

    def of(self, keys: np.ndarray) -> Window:
        """Return the verdicts of some images, by their sha256, in that order."""
        place = {key: i for i, key in enumerate(self.sha256)}
        at = np.array([place[str(key)] for key in keys], dtype=np.int64)
        sample = Sample(self.sample.scores[at], self.sample.statistics[at], self.sample.features[at])
        return replace(
            self,
            times=self.times[at],
            paths=[self.paths[i] for i in at],
            sha256=[self.sha256[i] for i in at],
            p_values=self.p_values[at],
            alarms=self.alarms[at],
            sample=sample,
        )
