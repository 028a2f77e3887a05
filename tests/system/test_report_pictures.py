"""What a report shows, before it is a page: projections, outlines, colors."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from report_demo import demo

from panda_ad.report.build import project_2d
from panda_ad.report.content import Report
from panda_ad.report.encode import heat_scale, outline


@pytest.fixture(scope="module")
def report() -> Report:
    return demo(good=24, per_kind=8, size=(60, 80))


def test_projection_is_the_galleries_pca_with_fixed_signs():
    from sklearn.decomposition import PCA

    rng = np.random.default_rng(1)
    gallery, test = rng.normal(size=(30, 7)) * np.arange(1, 8), rng.normal(size=(5, 7))
    pca = PCA(2).fit(gallery)
    ours, ours_test = project_2d(gallery, test)
    np.testing.assert_allclose(np.abs(ours), np.abs(pca.transform(gallery)), atol=1e-4)
    np.testing.assert_allclose(np.abs(ours_test), np.abs(pca.transform(test)), atol=1e-4)
    np.testing.assert_allclose(project_2d(gallery[::-1], test)[1], ours_test, atol=1e-4)
    one, rest = project_2d(np.ones((1, 1)), np.array([[3.0]]))
    assert one.shape == rest.shape == (1, 2) and rest[0, 1] == 0


def area(path: str) -> float:
    """Signed area of an outline in pixels: holes count negative."""
    total = 0.0
    for loop in re.findall(r"M([^Z]*)Z", path):
        x, y = np.array([[float(v) for v in point.split()] for point in loop.split("L")]).T / 2
        total += float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
    return total


def test_outline_encloses_the_mask():
    mask = np.zeros((20, 30), bool)
    mask[5:12, 4:14] = True
    path, width, height = outline(mask)
    assert (width, height) == (60, 40)
    assert area(path) == 70 - 4 / 8  # each corner is cut by an eighth of a pixel
    mask[7:9, 6:8] = False
    assert area(outline(mask)[0]) == 70 - 4 / 8 - (4 - 4 / 8)
    mask[12, 14] = True  # touches the block at a corner only
    assert outline(mask)[0].count("M") in (2, 3)
    assert outline(np.ones((3, 4), bool))[0].count("M") == 1
    assert outline(np.zeros((3, 4), bool)) is None
    speck = np.zeros((3000, 2000), bool)
    speck[1500, 1000] = True
    path, width, height = outline(speck)
    x, y = (float(v) for v in path[1:].split("L")[0].split())
    assert x / width == pytest.approx(0.5, abs=0.02) and y / height == pytest.approx(0.5, abs=0.02)


def test_the_outline_of_a_speckled_mask_is_coarse_and_small():
    specks = np.random.default_rng(0).random((512, 384)) > 0.5
    assert 0 < len(outline(specks)[0]) < 5000
    assert len(outline(np.random.default_rng(0).random((128, 128)) > 0.7)[0]) < 5000


def test_heat_scale_is_shared_and_survives_flat_and_broken_maps(report):
    low, high = heat_scale(report.images)
    maxima = [image.heatmap.max() for image in report.images]
    assert low < high and np.mean(np.array(maxima) > high) == pytest.approx(0.1, abs=0.03)
    flat = [replace(report.images[0], heatmap=np.full((4, 4), np.nan, np.float32))]
    assert heat_scale(flat) == (0.0, 1.0)
    assert heat_scale([replace(report.images[0], heatmap=None)]) is None
