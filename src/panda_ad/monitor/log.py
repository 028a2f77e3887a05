# SPDX-License-Identifier: Apache-2.0
"""The verdict log: Parquet files under monitoring/log/<category>/, one per batch, each written whole or not at all.

Columns: time (UTC, microseconds), path, sha256 (of the image file), category, model, version, score, p_value, decision
('good' or 'defect'), threshold, one per image statistic, features (fixed-size list of float16, under the model's last
head).
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from panda_ad.errors import UserError
from panda_ad.features.image_statistics import NAMES, as_float16, statistics_matrix
from panda_ad.monitor.drift import Sample
from panda_ad.monitor.window import Window
from panda_ad.system.files import atomic_file
from panda_ad.system.paths import LOG

if TYPE_CHECKING:
    import pyarrow as pa

VERDICT = ("time", "path", "sha256", "model", "version", "score", "p_value", "decision", "threshold")
_NUMBERS = ("score", "p_value", "threshold")


class NothingLogged(UserError):
    """The log has no verdict of a version. Exit code 2."""


@dataclass(frozen=True)
class Entry:
    """One verdict.

    Attributes
    ----------
    time : with a time zone.  path : as given to the scorer.  sha256 : of the file, hex.
    model, version : registered name and number, e.g. 'panda-sample-fabric', '3'.
    statistics : by `statistics.NAMES`.  features : (D,) float.
    """

    time: datetime
    path: str
    sha256: str
    category: str
    model: str
    version: str
    score: float
    p_value: float
    anomalous: bool
    threshold: float
    statistics: dict[str, float]
    features: np.ndarray


def append(entries: Sequence[Entry], log: Path = LOG) -> Path | None:
    """Add verdicts of one category as one file; an image that the log holds of the same model version is left out.

    Returns
    -------
    The file, or None if nothing was new.

    Raises
    ------
    ValueError : entries of several categories, or with features of several lengths.
    UserError : the log cannot be read.
    """
    if not entries:
        return None
    if len({e.category for e in entries}) != 1 or len({len(e.features) for e in entries}) != 1:
        raise ValueError("log: one category and one length of features per file")
    import pyarrow.parquet as pq

    category = entries[0].category
    seen = {by: known(category, *by, log) for by in {(e.model, e.version) for e in entries}}
    new = []
    for entry in entries:
        hashes = seen[entry.model, entry.version]
        if entry.sha256 not in hashes:
            hashes.add(entry.sha256)
            new.append(entry)
    if not new:
        return None
    path = (
        log / category / f"{min(e.time for e in new).astimezone(UTC):%Y%m%dT%H%M%S.%fZ}-{uuid.uuid4().hex[:8]}.parquet"
    )
    with atomic_file(path) as temporary:
        pq.write_table(_table(new), temporary, compression="zstd")
    return path


def known(category: str, model: str, version: str, log: Path = LOG) -> set[str]:
    """Return the sha256 of the images that the log holds of a model version; UserError if a file is damaged."""
    found: set[str] = set()
    for path in verdict_files(category, log):
        for part in read_file(path, model, version, ["sha256"]):
            found.update(part["sha256"].to_pylist())
    return found


def holders(category: str, log: Path = LOG) -> dict[str, set[tuple[str, str]]]:
    """Return for each logged image of a category, by sha256, the (model, version) that have scored it.

    Raises
    ------
    UserError
        A file is damaged.
    """
    found: dict[str, set[tuple[str, str]]] = {}
    for path in verdict_files(category, log):
        for part in read_file(path, None, None, ["sha256"]):
            for sha256, model, version in zip(
                *(part[name].to_pylist() for name in ("sha256", "model", "version")), strict=True
            ):
                found.setdefault(sha256, set()).add((model, version))
    return found


def read_verdicts(path: Path) -> list[dict[str, Any]]:
    """Return the rows of one file of the log with the columns `VERDICT`; UserError if it is damaged."""
    return [row for part in read_file(path, None, None, list(VERDICT)) for row in part.select(VERDICT).to_pylist()]


def read_window(
    category: str,
    model: str,
    version: str,
    last: int | None = None,
    log: Path = LOG,
    without: Set[str] = frozenset(),
    only: Set[str] | None = None,
) -> Window:
    """Return the newest verdicts of a model version, each image once, oldest first.

    Parameters
    ----------
    last : at most so many images; None: all there are.
    without : sha256 (hex) of images that do not count.  only : of those that do; None: all others.

    Raises
    ------
    NothingLogged
        The log has no verdict of that version.
    UserError
        A file is damaged.
    """
    import pyarrow as pa

    parts: list[pa.Table] = []
    found: dict[str, datetime] = {}
    for newest, path in sorted(((_newest(path), path) for path in verdict_files(category, log)), reverse=True):
        if last is not None and len(found) >= last and newest < sorted(found.values())[-last]:
            break  # scorers that ran at the same time have files whose times overlap
        for table in read_file(path, model, version, None):
            part = table
            if without or only is not None:
                keys = part["sha256"].to_pylist()
                part = part.filter([key not in without and (only is None or key in only) for key in keys])
            parts.append(part)
            for sha256, time in zip(part["sha256"].to_pylist(), part["time"].to_pylist(), strict=True):
                found[sha256] = min(time, found.get(sha256, time))
    if not found:
        if parts:
            raise NothingLogged(
                f"{log / category}: {model} version {version} has scored nothing yet but images that it was made from"
            )
        where = f"{log / category}: no verdict of {model} version {version}"
        raise NothingLogged(
            f"{where}; score images first (`panda-ad score IMAGES --model models:/{model}/{version} --log`)"
        )
    table = pa.concat_tables(parts).sort_by([("time", "ascending"), ("sha256", "ascending")])
    times = table["time"].to_numpy().astype("datetime64[us]")
    _, first = np.unique(
        np.array(table["sha256"].to_pylist()), return_index=True
    )  # two scorers at once may log an image twice
    keep = np.sort(first)
    if last is not None:
        keep = keep[-last:]
    return _window(table.take(pa.array(keep)), times[keep], category, model, version)


def _window(table: pa.Table, times: np.ndarray, category: str, model: str, version: str) -> Window:
    columns = {name: table[name].to_numpy() for name in (*_NUMBERS, *NAMES)}
    features = table["features"].combine_chunks()
    matrix = features.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1).astype(np.float32)
    sample = Sample(columns["score"], np.stack([columns[name] for name in NAMES], axis=1), matrix)
    alarms = np.array([d == "defect" for d in table["decision"].to_pylist()])
    paths, hashes = table["path"].to_pylist(), table["sha256"].to_pylist()
    limit = float(columns["threshold"][-1])
    return Window(category, model, version, times, paths, hashes, columns["p_value"], alarms, limit, sample)


def _table(entries: Sequence[Entry]) -> pa.Table:
    import pyarrow as pa

    features = as_float16(np.stack([e.features for e in entries]))
    columns: dict[str, Any] = {
        "time": pa.array([e.time.astimezone(UTC) for e in entries], pa.timestamp("us", tz="UTC")),
        "path": [e.path for e in entries],
        "sha256": [e.sha256 for e in entries],
        "category": [e.category for e in entries],
        "model": [e.model for e in entries],
        "version": [e.version for e in entries],
        "score": [float(e.score) for e in entries],
        "p_value": [float(e.p_value) for e in entries],
        "decision": ["defect" if e.anomalous else "good" for e in entries],
        "threshold": [float(e.threshold) for e in entries],
    }
    matrix = statistics_matrix([e.statistics for e in entries])
    columns |= {name: matrix[:, i] for i, name in enumerate(NAMES)}
    columns["features"] = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel(), pa.float16()), features.shape[1])
    return pa.table(columns)


def verdict_files(category: str, log: Path = LOG) -> list[Path]:
    """Return a category's files, oldest first; one that is being written is hidden and does not count."""
    return sorted(p for p in (log / category).glob("*.parquet") if not p.name.startswith("."))


def _newest(path: Path) -> datetime:
    """Return the time of the newest verdict in a file, from its footer.

    If the file is damaged, it is the time of the oldest, from its name: the error is left to those who read the file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
        groups = [
            metadata.row_group(i).column(0).statistics.max for i in range(metadata.num_row_groups)
        ]  # `time` is the first column
        return max(groups)
    except (pa.ArrowException, OSError, AttributeError, ValueError):
        try:
            return datetime.strptime(path.name.partition("-")[0], "%Y%m%dT%H%M%S.%fZ").replace(tzinfo=UTC)
        except ValueError:
            return datetime.max.replace(tzinfo=UTC)


def read_file(path: Path, model: str | None, version: str | None, columns: list[str] | None) -> Iterator[pa.Table]:
    """Return the rows of a model version (None: of all) in one file; nothing if there are none."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        wanted = None if columns is None else [*columns, "model", "version"]
        rows = pq.ParquetFile(path).read(columns=wanted)
        if model is not None:
            rows = rows.filter(pc.and_(pc.equal(rows["model"], model), pc.equal(rows["version"], version)))
    except (pa.ArrowException, OSError, KeyError) as e:
        raise UserError(
            f"{path}: damaged log file ({' '.join(str(e).split())[:120]}); move it away, its images can be scored again"
        ) from None
    if len(rows):
        yield rows
