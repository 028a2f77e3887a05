# SPDX-License-Identifier: Apache-2.0
"""Is the false-alarm rate that was promised the one that good parts have met: verdicts on parts that proved good.

A part is confirmed good where a person labeled its image good, in the data set or on the inspector's page, after the
model had scored it without knowing it.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from panda_ad.data.layouts import image_root
from panda_ad.data.manifest import existing_images
from panda_ad.data.sessions import sessions_of
from panda_ad.evaluation.image_metrics import binomial_interval
from panda_ad.evaluation.rates import lower_bound
from panda_ad.monitor.log import LOG, read_file, verdict_files
from panda_ad.params import Params


@dataclass(frozen=True)
class Verdicts:
    """Verdicts on N parts that were confirmed good.

    Attributes
    ----------
    times : (N,) datetime64[us], UTC, ascending: when the image was first logged.
    versions : (N,) str, that gave the verdict.  alarms : (N,) bool.
    sessions : (N,) str, of the data set; the day where none is known.
    """

    times: np.ndarray
    versions: np.ndarray
    alarms: np.ndarray
    sessions: np.ndarray

    def __len__(self) -> int:
        return len(self.times)

    def take(self, chosen: np.ndarray) -> Verdicts:
        """Return some of them, by a mask (N,)."""
        return Verdicts(self.times[chosen], self.versions[chosen], self.alarms[chosen], self.sessions[chosen])

    def by_session(self) -> list[tuple[str, Verdicts]]:
        """Return the verdicts of each session, in the order of their first images."""
        names = list(dict.fromkeys(self.sessions.tolist()))
        return [(name, self.take(self.sessions == name)) for name in names]


@dataclass(frozen=True)
class Realized:
    """A rate that was met.

    Attributes
    ----------
    alarms, images : on good parts.  rate : NaN without any.
    interval : of Clopper and Pearson.  at_least : lower bound that holds however often one looks.
    """

    alarms: int
    images: int
    rate: float
    interval: tuple[float, float]
    at_least: float


def realized(verdicts: Verdicts, confidence: float) -> Realized:
    """Return the rate of alarms among verdicts, at a confidence in (0, 1)."""
    n, k = len(verdicts), int(verdicts.alarms.sum())
    if not n:
        return Realized(0, 0, float("nan"), (0.0, 1.0), 0.0)
    return Realized(k, n, k / n, binomial_interval(k, n, confidence), lower_bound(k, n, confidence))


def labeled_good(params: Params, category: str) -> dict[str, str]:
    """Return the good images of a category in the data set: sha256 -> session, '' where it is not known."""
    found = [(e, r) for e, r in existing_images(params, category) if not e.problem and not e.label and "sha256" in r]
    paths, taken = [e.path for e, _ in found], [r.get("taken", "") for _, r in found]
    sessions = sessions_of(paths, taken, params, image_root(params))
    return {record["sha256"]: session for (_, record), session in zip(found, sessions, strict=True)}


def confirmed_verdicts(
    category: str, model: str, good: Mapping[str, str], seen: Mapping[str, Set[str]], log: Path = LOG
) -> tuple[Verdicts, dict[str, Verdicts]]:
    """Return verdicts on parts that were confirmed good.

    Parameters
    ----------
    good : sha256 of the images of good parts -> session, or ''.
    seen : number of a version in use -> sha256 of the images that it was made from.

    Returns
    -------
    first : each part's first verdict, of whichever version was in place.
    own : of each version in `seen`, its verdicts on the parts that it was not made from.

    Raises
    ------
    UserError
        A file of the log is damaged.
    """
    found: dict[tuple[str, str], tuple[np.datetime64, bool]] = {}
    for path in verdict_files(category, log):
        for table in read_file(path, None, None, ["time", "sha256", "decision"]):
            times = table["time"].to_numpy().astype("datetime64[us]")
            columns = (table[name].to_pylist() for name in ("sha256", "version", "model", "decision"))
            for time, sha256, version, name, decision in zip(times, *columns, strict=True):
                key = (sha256, version)
                if name == model and sha256 in good and (key not in found or time < found[key][0]):
                    found[key] = time, decision == "defect"
    first: dict[str, tuple[np.datetime64, str]] = {}
    for (sha256, version), (time, _) in found.items():
        if sha256 not in first or time < first[sha256][0]:
            first[sha256] = time, version

    def collect(keys: list[tuple[str, str]]) -> Verdicts:
        keys.sort(key=lambda key: (first[key[0]][0], key))
        times = np.array([first[sha256][0] for sha256, _ in keys], dtype="datetime64[us]")
        sessions = [good[sha256] or str(time)[:10] for (sha256, _), time in zip(keys, times, strict=True)]
        alarms = np.array([found[key][1] for key in keys], dtype=bool)
        return Verdicts(times, np.array([v for _, v in keys], dtype=str), alarms, np.array(sessions, dtype=str))

    own = {
        version: collect([key for key in found if key[1] == version and key[0] not in known])
        for version, known in seen.items()
    }
    return collect([(sha256, version) for sha256, (_, version) in first.items()]), own
