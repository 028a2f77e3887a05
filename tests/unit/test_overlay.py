# SPDX-License-Identifier: Apache-2.0
"""Overlays of `panda-ad score --heatmaps`: the heat map's color, and a box around a defect's region."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from panda_ad.commands.overlay import save_overlay
from panda_ad.scoring.verdict import region, resize_map

DETECTOR = SimpleNamespace(config=SimpleNamespace(heatmap_range=(1.0, 3.0)))


def overlay(path, at: tuple[int, int], size=(120, 160), anomalous=True) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    heat = np.zeros((30, 40), np.float32)
    heat[at] = 5
    heat = resize_map(heat, size)
    box = region(heat)
    gray = np.full((*size, 3), 128, np.uint8)
    save_overlay(path, gray, SimpleNamespace(heatmap=heat, region=box, anomalous=anomalous), DETECTOR)
    return np.asarray(Image.open(path)).astype(int), box


def cyan(pixels: np.ndarray) -> np.ndarray:
    return (pixels[..., 1] - pixels[..., 0] > 80) & (pixels[..., 2] - pixels[..., 0] > 60)


@pytest.mark.parametrize("at", [(15, 20), (0, 0), (29, 39), (0, 39)])
def test_a_defects_region_is_in_a_box(tmp_path, at):
    pixels, (x0, y0, x1, y1) = overlay(tmp_path / "x.jpg", at)
    ys, xs = np.nonzero(cyan(pixels))
    assert len(ys) > 8
    for found, start, end in ((xs, x0, x1), (ys, y0, y1)):
        assert abs(found.min() - max(0, start - 2)) <= 2 and abs(found.max() - (end - 1)) <= 4
    assert not cyan(pixels[y0 + 3 : y1 - 3, x0 + 3 : x1 - 3]).any(), "the frame leaves the defect to be seen"


def test_a_good_image_has_no_box(tmp_path):
    pixels, _ = overlay(tmp_path / "x.jpg", (15, 20), anomalous=False)
    assert not cyan(pixels).any()


def test_the_box_is_thicker_in_a_large_image(tmp_path):
    small, large = (cyan(overlay(tmp_path / "x.jpg", (15, 20), size)[0]).sum() for size in ((120, 160), (1200, 1600)))
    assert large > 4 * small


def test_what_a_jpeg_cannot_hold_raises_and_leaves_nothing(tmp_path):
    wide = np.zeros((2, 66_000), np.float32)
    verdict = SimpleNamespace(heatmap=wide, region=(0, 0, 1, 1), anomalous=True)
    with pytest.raises((OSError, ValueError)):
        save_overlay(tmp_path / "x.jpg", np.zeros((2, 66_000, 3), np.uint8), verdict, DETECTOR)
    assert list(tmp_path.iterdir()) == []
