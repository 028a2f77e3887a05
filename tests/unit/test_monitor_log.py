# SPDX-License-Identifier: Apache-2.0
"""The verdict log: whole files, each image once, the newest of them whoever scored when."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from panda_ad.errors import UserError
from panda_ad.features.image_statistics import NAMES, statistics_matrix
from panda_ad.monitor.log import Entry, NothingLogged, append, known, read_window

START = datetime(2026, 3, 1, tzinfo=UTC)


def entry(number: int, version: str = "1", minutes: float | None = None, d: int = 5) -> Entry:
    rng = np.random.default_rng(number)
    when = START + timedelta(minutes=number if minutes is None else minutes)
    values = dict(zip(NAMES, rng.normal(size=len(NAMES)).tolist(), strict=True))
    name = f"{number}.png"
    return Entry(
        when,
        name,
        f"{number:064x}",
        "fabric",
        "m",
        version,
        rng.normal(),
        0.5,
        number % 2 == 0,
        1.5,
        values,
        rng.normal(size=d),
    )


@given(
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from("12")), max_size=30), st.integers(1, 6), st.integers(1, 15)
)
@settings(deadline=None, max_examples=30)
def test_the_log_holds_each_image_once_per_version(tmp_path_factory, images, size, last):
    log = tmp_path_factory.mktemp("log")
    for start in range(0, len(images), size):
        append([entry(n, v, minutes=start) for n, v in images[start : start + size]], log)
    for version in "12":
        wanted = {f"{n:064x}" for n, v in images if v == version}
        assert known("fabric", "m", version, log) == wanted
        if wanted:
            window = read_window("fabric", "m", version, log=log)
            assert sorted(window.sha256) == sorted(wanted) and (np.diff(window.times) >= np.timedelta64(0)).all()
            assert read_window("fabric", "m", version, last=last, log=log).sha256 == window.sha256[-last:]


def test_the_newest_verdicts_are_found_in_the_files_of_scorers_that_ran_at_the_same_time(tmp_path):
    append([entry(n, minutes=60 * n) for n in range(9)], tmp_path)  # a long run, written at its end
    append([entry(100 + n, minutes=240 + n) for n in range(5)], tmp_path)  # a short one meanwhile
    window = read_window("fabric", "m", "1", last=5, log=tmp_path)
    assert window.paths == ["104.png", "5.png", "6.png", "7.png", "8.png"]


def test_a_damaged_file_stops_only_who_needs_it(tmp_path):
    append([entry(n) for n in range(8)], tmp_path)
    (tmp_path / "fabric" / "20200101T000000.000000Z-00000000.parquet").write_bytes(b"junk")
    assert read_window("fabric", "m", "1", last=3, log=tmp_path).paths == ["5.png", "6.png", "7.png"]
    with pytest.raises(UserError, match="damaged log file"):
        read_window("fabric", "m", "1", log=tmp_path)


def test_images_that_a_version_was_made_from_do_not_count(tmp_path):
    append([entry(n) for n in range(8)], tmp_path)
    seen = {f"{n:064x}" for n in (1, 6, 7)}
    assert read_window("fabric", "m", "1", last=3, log=tmp_path, without=seen).paths == ["3.png", "4.png", "5.png"]
    with pytest.raises(NothingLogged, match="version 1 has scored nothing yet but images that it was made from"):
        read_window("fabric", "m", "1", log=tmp_path, without={f"{n:064x}" for n in range(8)})


def test_features_beyond_float16_stay_finite_in_the_log(tmp_path):
    wild = dataclasses.replace(entry(1), features=np.array([1e7, -1e7, 1.0, 0.0, 65504.0]))
    append([wild, entry(2)], tmp_path)
    features = read_window("fabric", "m", "1", log=tmp_path).sample.features
    np.testing.assert_array_equal(features[0], [65504, -65504, 1, 0, 65504])


def test_the_log_gives_back_what_was_written(tmp_path):
    entries = [entry(i) for i in range(6)]
    path = append(entries[::-1], tmp_path)
    assert path is not None and path.name.startswith("20260301T000000.000000Z-") and path.parent == tmp_path / "fabric"
    window = read_window("fabric", "m", "1", log=tmp_path)
    assert window.paths == [e.path for e in entries]
    assert window.sample.scores.tolist() == [e.score for e in entries]
    assert window.alarms.tolist() == [e.anomalous for e in entries] and window.threshold == 1.5
    np.testing.assert_array_equal(window.sample.statistics, statistics_matrix([e.statistics for e in entries]))
    np.testing.assert_array_equal(window.sample.features, np.stack([e.features for e in entries]).astype(np.float16))
    assert window.times[0] == np.datetime64("2026-03-01T00:00:00")
    assert read_window("fabric", "m", "1", last=2, log=tmp_path).paths == ["4.png", "5.png"]
    assert append(entries, tmp_path) is None and append([], tmp_path) is None


def test_a_log_that_lacks_or_breaks_says_so_in_one_line(tmp_path):
    with pytest.raises(NothingLogged, match="no verdict of m version 1; score images first"):
        read_window("fabric", "m", "1", log=tmp_path)
    path = append([entry(1)], tmp_path)
    (path.parent / f".{path.name}.99.tmp").write_bytes(b"half")  # of a killed writer
    assert len(read_window("fabric", "m", "1", log=tmp_path)) == 1
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="damaged log file") as error:
        known("fabric", "m", "1", tmp_path)
    assert "\n" not in str(error.value) and path.name in str(error.value)
    with pytest.raises(ValueError, match="one category"):
        append([entry(1), dataclasses.replace(entry(2), category="grid")], tmp_path)


def test_the_log_is_read_once_however_many_verdicts_are_added(tmp_path, monkeypatch):
    """It was read once for each of them: minutes for a day's images beside a month's."""
    append([entry(n) for n in range(3)], tmp_path)
    reads: list[str] = []

    def counted(category, model, version, log):
        reads.append(version)
        return known(category, model, version, log)

    monkeypatch.setattr("panda_ad.monitor.log.known", counted)
    append([entry(n, version) for n in range(20) for version in "12"], tmp_path)
    assert sorted(reads) == ["1", "2"] and len(known("fabric", "m", "1", tmp_path)) == 20
