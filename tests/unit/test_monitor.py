# SPDX-License-Identifier: Apache-2.0
"""Image statistics, the verdict log and drift: formulas against naive ones, names on the sample's camera, no alarm without cause."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from make_sample import _MODULES, image_rng
from sample.camera import draw_camera, photograph, reduce
from scipy import ndimage
from scipy.spatial.distance import cdist

from panda_ad.errors import UserError
from panda_ad.features import image_statistics as statistics
from panda_ad.features.image_statistics import NAMES, image_statistics, statistics_matrix
from panda_ad.monitor.drift import Sample, TooFew, _energy, _shift_of_points, find_drift
from panda_ad.params import MonitorParams
from panda_ad.params_file import parse_params

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
        changed = dataclasses.replace(
            camera, blur=float(np.hypot(camera.blur, blur)), light=camera.light * np.array(balance)
        )
        images.append(photograph(reflectance, changed))
    return images


def sample(images: list[np.ndarray], seed: int, score: float = 5.0) -> Sample:
    """Real statistics, coarse pictures as features, scores at random."""
    rng = np.random.default_rng(seed)
    coarse = [ndimage.zoom(image.mean(axis=2) / image.mean(), 8 / len(image), order=1).ravel() for image in images]
    return Sample(
        rng.gamma(score, size=len(images)), statistics_matrix([image_statistics(i) for i in images]), np.stack(coarse)
    )


CHANGES = {
    "nothing": ({}, set()),
    "dimmer": ({"light": 0.5}, {"darker", "color cast towards yellow", "color cast towards red"}),
    "stronger lamp": ({"light": -0.5}, {"brighter", "color cast towards blue", "color cast towards green"}),
    "focus": ({"blur": 1.2}, {"out of focus"}),
    "yellow": ({"balance": (1.03, 1.03, 0.85)}, {"color cast towards yellow"}),
    "green": ({"balance": (0.93, 1.03, 0.97)}, {"color cast towards green"}),
}


@pytest.mark.parametrize("category", ["fabric", "capsule"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_camera_is_named(category, change):
    setting, expected = CHANGES[change]
    drift = find_drift(
        sample(photographs(category, "one"), 1), sample(photographs(category, "two", **setting), 2), 0.05, LIMITS
    )
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
    moved = [
        np.roll(image, (image.shape[0] // 2, image.shape[1] // 2), axis=(0, 1))
        for image in photographs("capsule", "two")
    ]
    drift = find_drift(sample(photographs("capsule", "one"), 1), sample(moved, 2), 0.05, LIMITS)
    assert drift.findings == ["content has changed while light, focus and color have not"]


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


@pytest.mark.slow
@pytest.mark.parametrize(("m", "n"), [(24, 30), (24, 200), (100, 60)])
def test_no_drift_where_nothing_has_changed(m, n):
    """At most the significance asked for, 5 % here, of windows that are exchangeable with the calibration images."""
    limits = MonitorParams(window=200, min_images=4, significance=0.05, min_shift=0.0)
    runs = 120
    false = sum(
        find_drift(arrays_of(m, 2 * s), arrays_of(n, 2 * s + 1), 0.05, limits, seed=s).drifted for s in range(runs)
    )
    assert false <= 13, "binomial: 14 or more of 120 at 5 % have a chance of 0.3 %"


def test_a_small_shift_is_no_drift_however_certain():
    reference, window = arrays_of(2000, 0), arrays_of(2000, 1)
    window.statistics[:, 2] -= 0.3 * reference.statistics[:, 2].std()
    drift = find_drift(reference, window, 0.05, LIMITS)
    assert by_name(drift, "sharpness").adjusted < 1e-6 and not drift.drifted
    assert find_drift(reference, window, 0.05, LIMITS.model_copy(update={"min_shift": 0.2})).findings == [
        "out of focus"
    ]


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
        Sample(np.zeros(3), np.zeros((3, len(NAMES))), np.zeros((2, 4)))


def test_bad_limits_name_their_key(repo_root):
    raw = yaml.safe_load((repo_root / "params.yaml").read_text())
    raw["monitor"] |= {"window": 10, "min_images": 11}
    with pytest.raises(UserError, match=r"monitor.window \(10\) is smaller than monitor.min_images \(11\)"):
        parse_params(raw)
    raw["monitor"] |= {"window": 20, "significance": 0}
    with pytest.raises(UserError, match="monitor.significance"):
        parse_params(raw)


def test_every_finding_about_the_camera_says_where_to_look():
    from panda_ad.monitor.report import ADVICE

    assert set(ADVICE) >= {finding for s in statistics.STATISTICS for finding in (s.lower, s.higher)}
