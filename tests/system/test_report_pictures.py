# SPDX-License-Identifier: Apache-2.0
"""What a report shows, before it is a page: outlines, colors, the worst spot."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from report_demo import demo

from panda_ad.report.content import Report
from panda_ad.report.encode import heat_scale, outline


@pytest.fixture(scope="module")
def report() -> Report:
    return demo(good=24, per_kind=8, size=(60, 80))


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


@pytest.mark.parametrize("shape", [(512, 384), (96, 96), (3, 4)])
def test_an_outline_of_specks_encloses_what_is_marked(shape):
    specks = np.random.default_rng(0).random(shape) > 0.7
    path, width, height = outline(specks)
    assert max(width, height) <= 192 and path.count("M") == path.count("Z") > 0


def test_the_worst_spot_is_cut_out_at_the_images_own_resolution():
    from panda_ad.stages.evaluate_report import worst_spot

    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (600, 1000, 3), np.uint8)
    for y, x in ((0, 0), (29, 49), (15, 20)):
        heat = np.zeros((30, 50), np.float32)
        heat[y, x] = 1
        spot = worst_spot(image, heat)
        x0, y0, x1, y1 = (round(v * side) for v, side in zip(spot.box, (1000, 600, 1000, 600), strict=True))
        assert spot.rgb.shape == (256, 256, 3) and (x1 - x0, y1 - y0) == (256, 256)
        np.testing.assert_array_equal(spot.rgb, image[y0:y1, x0:x1])
        assert x0 <= 20 * x + 10 <= x1 and y0 <= 20 * y + 10 <= y1
    narrow = worst_spot(image[:100], np.ones((5, 50), np.float32))
    assert narrow.rgb.shape == (100, 256, 3)
    assert worst_spot(image[:256, :200], np.ones((4, 4), np.float32)) is None


def test_heat_scale_is_shared_and_survives_flat_and_broken_maps(report):
    low, high = heat_scale(report.images)
    maxima = [image.heatmap.max() for image in report.images]
    assert low < high and np.mean(np.array(maxima) > high) == pytest.approx(0.1, abs=0.03)
    flat = [replace(report.images[0], heatmap=np.full((4, 4), np.nan, np.float32))]
    assert heat_scale(flat) == (0.0, 1.0)
    assert heat_scale([replace(report.images[0], heatmap=None)]) is None
