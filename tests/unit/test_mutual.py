# SPDX-License-Identifier: Apache-2.0
"""Mutual scoring against a naive loop, and that it finds what only one image holds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from panda_ad.scoring import mutual
from panda_ad.scoring.localize.search import pack
from panda_ad.scoring.mutual import mutual_maps, mutual_scores


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(0, 2**31))
def test_scores_are_the_mean_of_the_lowest_distances(others, patches, seed):
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(others + 1, patches, 5)).astype(np.float16)
    found = mutual_scores(pack(images[0]), [pack(image) for image in images[1:]])
    wide = images.astype(np.float64)
    for p in range(patches):
        away = sorted(min(np.linalg.norm(wide[0, p] - q) for q in image) for image in wide[1:])
        assert found[p] == pytest.approx(np.mean(away[: max(1, round(0.3 * others))]), rel=1e-5)


def test_the_image_with_a_spot_of_its_own_is_the_oddest_and_the_spot_the_place(monkeypatch):
    monkeypatch.setattr(mutual, "COMPARED", 5)
    rng = np.random.default_rng(0)
    layers = rng.normal(size=(12, 6, 8, 8)).astype(np.float16) / 4
    layers[7, :, 5:7, 1:3] += 5
    maps = mutual_maps(lambda i: {"a": layers[i], "b": layers[i, :, ::2, ::2]}, 12, ("a", "b"), (16, 16), 1.0)
    assert maps.shape == (12, 16, 16) and maps.max(axis=(1, 2)).argmax() == 7
    row, column = np.unravel_index(maps[7].argmax(), (16, 16))
    assert 9 <= row < 15 and 1 <= column < 7
    assert np.median(maps) == pytest.approx(1, abs=0.3), "1 is usual"
