"""Image statistics, the verdict log and drift: formulas against naive ones, names on the sample's camera, no alarm without cause."""

from __future__ import annotations

import dataclasses
import functools
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy import ndimage
from scipy.spatial.distance import cdist

from panda_ad.errors import UserError
from panda_ad.monitor import statistics
from panda_ad.monitor.drift import Sample, TooFew, _energy, _shift_of_points, find_drift
from panda_ad.monitor.log import Entry, NothingLogged, append, known, read_window
from panda_ad.monitor.statistics import NAMES, image_statistics, statistics_matrix
from panda_ad.params import MonitorParams, parse_params

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from make_sample import _MODULES, image_rng
from sample.camera import draw_camera, photograph, reduce

LIMITS = MonitorParams(window=200, min_images=15, significance=0.01, min_shift=0.5)


@given(arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=24).map(lambda s: (*s, 3))))
@settings(deadline=None)
def test_any_image_has_finite_statistics(rgb):
    values = image_statistics(rgb)
    assert tuple(values) == NAMES
    assert np.isfinite(list(values.values())).all()
    assert 0 <= values["brightness"] <= 1 and 0 <= values["saturation"] <= 1


def test_formulas_on_a_small_image():
    rgb = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    x = rgb / 255
    luma = x @ [0.2126, 0.7152, 0.0722]
    r, g, b = x.mean(axis=(0, 1))
    fine, coarse = (s**4 * ndimage.gaussian_laplace(luma, s).var() for s in (1, 4))
    expected = {
        "brightness": luma.mean(),
        "contrast": luma.std() / luma.mean(),
        "sharpness": np.log(fine / coarse),
        "red_green": (r - g) / ((r + g + b) / 3),
        "yellow_blue": ((r + g) / 2 - b) / ((r + g + b) / 3),
        "saturation": (x.max(axis=2) - x.min(axis=2)).mean() / x.max(axis=2).mean(),
    }
    found = image_statistics(rgb)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=2e-4), name


def test_a_dimmer_lamp_moves_brightness_alone():
    rgb = ndimage.zoom(np.random.default_rng(1).integers(80, 250, (16, 16, 3)), (4, 4, 1), order=1).astype(np.uint8)
    full, half = image_statistics(rgb), image_statistics((rgb // 2 * 1.0).astype(np.uint8))
    assert half["brightness"] == pytest.approx(full["brightness"] / 2, rel=0.02)
    for name in NAMES[1:]:
        assert half[name] == pytest.approx(full[name], abs=0.02), name


def test_a_large_image_is_reduced_by_block_means(monkeypatch):
    monkeypatch.setattr(statistics, "LONGEST", 10)
    rgb = np.random.default_rng(2).integers(0, 256, (13, 29, 3), dtype=np.uint8)
    blocks = rgb[:12, :27].reshape(4, 3, 9, 3, 3).mean(axis=(1, 3)) / 255
    np.testing.assert_allclose(statistics._reduced(rgb), blocks, atol=1e-6)


@functools.cache
def parts(category: str, part: str, count: int = 24) -> list:
    """(reflectance, camera) of good parts; the camera at rest."""
    found = []
    for i in range(count):
        rng = image_rng(3, category, part, i)
        scene, state = _MODULES[category].draw(rng), rng.bit_generator.state
        found.append((reduce(_MODULES[category].render(scene)), state))
    return found


def photographs(category: str, part: str, light: float = 0.0, blur: float = 0.0, balance=(1, 1, 1)) -> list[np.ndarray]:
    images = []
    for reflectance, state in parts(category, part):
        rng = np.random.default_rng()
        rng.bit_generator.state = state
        camera = draw_camera(rng, light)
        changed = dataclasses.replace(camera, blur=float(np.hypot(camera.blur, blur)), light=camera.light * np.array(balance))
        images.append(photograph(reflectance, changed))
    return images


def sample(images: list[np.ndarray], seed: int, score: float = 5.0) -> Sample:
    """Real statistics, coarse pictures as features, scores at random."""
    rng = np.random.default_rng(seed)
    coarse = [ndimage.zoom(image.mean(axis=2) / image.mean(), 8 / len(image), order=1).ravel() for image in images]
    return Sample(rng.gamma(score, size=len(images)), statistics_matrix([image_statistics(i) for i in images]), np.stack(coarse))


CHANGES = {
    "nothing": ({}, set()),
    "dimmer": ({"light": 0.5}, {"darker", "colour cast towards yellow", "colour cast towards red"}),
    "stronger lamp": ({"light": -0.5}, {"brighter", "colour cast towards blue", "colour cast towards green"}),
    "focus": ({"blur": 1.2}, {"out of focus"}),
    "yellow": ({"balance": (1.03, 1.03, 0.85)}, {"colour cast towards yellow"}),
    "green": ({"balance": (0.93, 1.03, 0.97)}, {"colour cast towards green"}),
}


@pytest.mark.parametrize("category", ["fabric", "capsule"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_camera_is_named(category, change):
    setting, expected = CHANGES[change]
    drift = find_drift(sample(photographs(category, "one"), 1), sample(photographs(category, "two", **setting), 2), 0.05, LIMITS)
    found = set(drift.findings)
    assert expected <= found
    assert not any(word in " ".join(found) for word in ("content", "score")), found
    if change == "nothing":
        assert drift.headline == "no drift in 24 images" and not drift.drifted
    if change == "focus":
        assert not {"darker", "brighter"} & found and not any("cast" in f for f in found)
    if change in ("yellow", "green"):
        assert "out of focus" not in found and "sharper or noisier" not in found


def by_name(drift, name):
    (test,) = [t for t in drift.tests if t.name == name]
    return test


def test_other_content_under_the_same_light_is_called_content():
    """The capsule lies across the image's corners: the same pixels elsewhere."""
    moved = [np.roll(image, (image.shape[0] // 2, image.shape[1] // 2), axis=(0, 1)) for image in photographs("capsule", "two")]
    drift = find_drift(sample(photographs("capsule", "one"), 1), sample(moved, 2), 0.05, LIMITS)
    assert drift.findings == ["content has changed while light, focus and colour have not"]


def test_light_that_moves_features_is_no_content():
    reference, window = arrays_of(24, 0), arrays_of(60, 1)
    window.statistics[:, 0] -= 3
    window.features[:] += 3
    drift = find_drift(reference, window, 0.05, LIMITS)
    assert drift.findings == ["darker"]
    assert by_name(drift, "content").drifted and not by_name(drift, "content").finding


def test_defects_raise_alarms_and_scores():
    reference, window = arrays_of(40, 0), arrays_of(60, 1)
    window.scores[:20] += 100
    drift = find_drift(reference, window, 0.05, LIMITS)
    assert drift.findings[0] == "more images score as defects"
    assert by_name(drift, "alarms").after >= 1 / 3
    window.scores[:] += 10
    assert "scores are higher" in find_drift(reference, window, 0.05, LIMITS).findings


def arrays_of(n: int, seed: int, d: int = 24) -> Sample:
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(n, d)) * np.linspace(2, 0.1, d)
    return Sample(np.abs(hidden).sum(axis=1), rng.normal(size=(n, len(NAMES))) + hidden[:, : len(NAMES)], hidden)


@pytest.mark.parametrize(("m", "n"), [(24, 30), (24, 200), (100, 60)])
def test_no_drift_where_nothing_has_changed(m, n):
    """At most the significance asked for, 5 % here, of windows that are exchangeable with the calibration images."""
    limits = MonitorParams(window=200, min_images=4, significance=0.05, min_shift=0.0)
    runs = 120
    false = sum(find_drift(arrays_of(m, 2 * s), arrays_of(n, 2 * s + 1), 0.05, limits, seed=s).drifted for s in range(runs))
    assert false <= 13, "binomial: 14 or more of 120 at 5 % have a chance of 0.3 %"


def test_a_small_shift_is_no_drift_however_certain():
    reference, window = arrays_of(2000, 0), arrays_of(2000, 1)
    window.statistics[:, 2] -= 0.3 * reference.statistics[:, 2].std()
    drift = find_drift(reference, window, 0.05, LIMITS)
    assert by_name(drift, "sharpness").adjusted < 1e-6 and not drift.drifted
    assert find_drift(reference, window, 0.05, LIMITS.model_copy(update={"min_shift": 0.2})).findings == ["out of focus"]


def test_a_steady_camera_may_waver_within_its_resolution():
    reference, window = arrays_of(30, 0), arrays_of(30, 1)
    reference.statistics[:, 0], window.statistics[:, 0] = 0.5, 0.5005
    test = by_name(find_drift(reference, window, 0.05, LIMITS), "brightness")
    assert test.adjusted < 1e-6 and not test.drifted


@given(st.integers(2, 9), st.integers(2, 9), st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_energy_distance_is_its_definition(m, n, seed):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(m + n, 3))
    order = rng.permutation(m + n)
    x, y = points[order[:m]], points[order[m:]]
    naive = 2 * cdist(x, y).mean() - cdist(x, x).mean() - cdist(y, y).mean()
    found = _energy(cdist(points, points))(order[None, :m], order[None, m:], axis=-1)
    np.testing.assert_allclose(found, [naive], atol=1e-12)


def test_the_shift_of_points_is_in_deviations_and_unbiased():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(400, 6)), rng.normal(size=(400, 6))
    y[:, 2] += 2
    assert _shift_of_points(x, y) == pytest.approx(2, abs=0.25)
    null = [_shift_of_points(rng.normal(size=(20, 6)), rng.normal(size=(60, 6))) for _ in range(200)]
    assert abs(np.mean(null)) < 0.1


def test_bad_windows_are_one_line():
    with pytest.raises(TooFew, match="14 images in the log, 15 are needed"):
        find_drift(arrays_of(24, 0), arrays_of(14, 1), 0.05, LIMITS)
    with pytest.raises(UserError, match="3 calibration images are too few"):
        find_drift(arrays_of(3, 0), arrays_of(20, 1), 0.05, LIMITS)
    with pytest.raises(ValueError, match="sample"):
        Sample(np.zeros(3), np.zeros((2, len(NAMES))), np.zeros((3, 4)))


def test_bad_limits_name_their_key(repo_root):
    raw = yaml.safe_load((repo_root / "params.yaml").read_text())
    raw["monitor"] |= {"window": 10, "min_images": 11}
    with pytest.raises(UserError, match=r"monitor.window \(10\) is smaller than monitor.min_images \(11\)"):
        parse_params(raw)
    raw["monitor"] |= {"window": 20, "significance": 0}
    with pytest.raises(UserError, match="monitor.significance"):
        parse_params(raw)


START = datetime(2026, 3, 1, tzinfo=UTC)


def entry(number: int, version: str = "1", minutes: float | None = None, d: int = 5) -> Entry:
    rng = np.random.default_rng(number)
    when = START + timedelta(minutes=number if minutes is None else minutes)
    values = dict(zip(NAMES, rng.normal(size=len(NAMES)).tolist(), strict=True))
    name = f"{number}.png"
    return Entry(when, name, f"{number:064x}", "fabric", "m", version, rng.normal(), 0.5, number % 2 == 0, 1.5, values, rng.normal(size=d))


@given(st.lists(st.tuples(st.integers(0, 12), st.sampled_from("12")), max_size=30), st.integers(1, 6), st.integers(1, 15))
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


def test_every_finding_about_the_camera_says_where_to_look():
    from panda_ad.monitor.report import ADVICE

    assert set(ADVICE) >= {finding for s in statistics.STATISTICS for finding in (s.lower, s.higher)}
