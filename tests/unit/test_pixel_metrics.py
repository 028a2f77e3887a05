# SPDX-License-Identifier: Apache-2.0
"""Pixel metrics against naive sweeps over every threshold, scikit-learn, and degenerate masks and maps."""

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import precision_recall_curve, roc_auc_score

from panda_ad.errors import UserError
from panda_ad.evaluation import pixel_metrics


def naive_au_pro(masks, maps, limit):
    """Bergmann et al.: overlap and false-positive rate at every threshold by counting, trapezoids, interpolation at the limit."""
    regions = []
    for mask, m in zip(masks, maps, strict=True):
        labels, n = ndimage.label(mask, np.ones((3, 3)))
        regions += [m[labels == i] for i in range(1, n + 1)]
    normal = np.concatenate([m[~mask] for mask, m in zip(masks, maps, strict=True)])
    fpr, pro = [0.0], [0.0]
    for t in np.unique(np.concatenate([m.ravel() for m in maps]))[::-1]:
        fpr.append(float(np.mean(normal >= t)))
        pro.append(float(np.mean([np.mean(r >= t) for r in regions])))
    area = 0.0
    for x0, x1, y0, y1 in zip(fpr, fpr[1:], pro, pro[1:], strict=False):
        if x0 >= limit:
            break
        if x1 > limit:
            y1 = y0 + (y1 - y0) * (limit - x0) / (x1 - x0)
            x1 = limit
        area += (x1 - x0) * (y0 + y1) / 2
    return area / limit


def blobs(rng, shape, share):
    noise = ndimage.gaussian_filter(rng.normal(size=shape), 1.5)
    return noise > np.quantile(noise, 1 - share)


def case(name):
    rng = np.random.default_rng(sum(map(ord, name)))
    shapes = [(24, 31), (17, 20), (9, 40)]
    masks = [blobs(rng, s, 0.12) for s in shapes]
    maps = [(rng.normal(size=s) + mask).astype(np.float32) for s, mask in zip(shapes, masks, strict=True)]
    if name == "a good image":
        masks[0][:] = False
    elif name == "all defect":
        masks[1][:] = True
    elif name == "ties":
        maps = [np.round(m) for m in maps]
    elif name == "constant":
        maps = [np.full_like(m, 2.5) for m in maps]
    elif name == "perfect":
        maps = [mask.astype(np.float32) for mask in masks]
    elif name == "inverted":
        maps = [-mask.astype(np.float32) for mask in masks]
    elif name == "one pixel":
        masks = [np.zeros(s, bool) for s in shapes]
        masks[2][4, 4] = True
    elif name == "touching corners":
        masks = [np.eye(12, dtype=bool)]
        maps = [rng.normal(size=(12, 12))]
    elif name == "fewer normal pixels":
        masks = [~m for m in masks]
    return masks, maps


NAMES = [
    "random",
    "a good image",
    "all defect",
    "ties",
    "constant",
    "perfect",
    "inverted",
    "one pixel",
    "touching corners",
    "fewer normal pixels",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("limit", [0.3, 0.05, 1.0])
def test_au_pro_equals_naive(name, limit):
    masks, maps = case(name)
    assert pixel_metrics.au_pro(masks, maps, limit) == pytest.approx(naive_au_pro(masks, maps, limit), abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_auroc_and_f1_equal_scikit_learn(name):
    masks, maps = case(name)
    truth, scores = (np.concatenate([a.ravel() for a in arrays]) for arrays in (masks, maps))
    assert pixel_metrics.pixel_auroc(masks, maps) == pytest.approx(roc_auc_score(truth, scores), abs=1e-9)
    precision, recall, _ = precision_recall_curve(truth, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-300)
    assert pixel_metrics.pixel_f1(masks, maps) == pytest.approx(f1.max(), abs=1e-9)


def test_au_pro_of_known_maps():
    masks, maps = case("perfect")
    assert pixel_metrics.au_pro(masks, maps) == pytest.approx(1)
    masks, maps = case("inverted")
    assert pixel_metrics.au_pro(masks, maps) == pytest.approx(0)
    masks, maps = case("constant")  # the chance line y = x: area limit**2 / 2, divided by the limit
    assert pixel_metrics.au_pro(masks, maps, 0.3) == pytest.approx(0.15)


def test_au_pro_weighs_defects_not_pixels():
    mask = np.zeros((20, 20), bool)
    mask[:10, :10] = True
    mask[15, 15] = True
    found_large, found_small = np.zeros((20, 20)), np.zeros((20, 20))
    found_large[:10, :10] = 1
    found_small[15, 15] = 1
    assert pixel_metrics.au_pro([mask], [found_large]) == pytest.approx(pixel_metrics.au_pro([mask], [found_small]))


def test_blocks_change_nothing(monkeypatch):
    masks, maps = case("random")
    whole = [f(masks, maps) for f in (pixel_metrics.pixel_auroc, pixel_metrics.au_pro, pixel_metrics.pixel_f1)]
    monkeypatch.setattr(pixel_metrics, "_BLOCK", 100)
    assert whole == [f(masks, maps) for f in (pixel_metrics.pixel_auroc, pixel_metrics.au_pro, pixel_metrics.pixel_f1)]


def test_intervals_hold_the_metric_and_are_seeded():
    rng = np.random.default_rng(0)
    masks = [blobs(rng, (40, 40), 0.1) if i % 3 else np.zeros((40, 40), bool) for i in range(30)]
    maps = [(rng.normal(size=(40, 40)) + 1.5 * mask).astype(np.float32) for mask in masks]
    intervals = pixel_metrics.pixel_intervals(masks, maps, n=200)
    assert intervals == pixel_metrics.pixel_intervals(masks, maps, n=200)
    for name in ("pixel_auroc", "au_pro", "pixel_f1"):
        low, high = intervals[name]
        assert low < getattr(pixel_metrics, name)(masks, maps) < high
        assert high - low < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_binned_metrics_are_close_to_exact(name, monkeypatch):
    masks, maps = case(name)

    class Unresampled:  # every image once
        def integers(self, low, high, size):
            return np.arange(size)

    monkeypatch.setattr(pixel_metrics.np.random, "default_rng", lambda seed: Unresampled())
    for metric, (low, high) in pixel_metrics.pixel_intervals(masks, maps, n=1).items():
        assert low == high == pytest.approx(getattr(pixel_metrics, metric)(masks, maps), abs=1e-3)


def test_refusals():
    mask, m = np.eye(4, dtype=bool), np.zeros((4, 4), np.float32)
    broken = m.copy()
    broken[0, 0] = np.nan
    for metric in (
        pixel_metrics.pixel_auroc,
        pixel_metrics.au_pro,
        pixel_metrics.pixel_f1,
        pixel_metrics.pixel_intervals,
    ):
        for masks, maps, message in (
            ([mask & False], [m], "0 defective"),
            ([mask | True], [m], "0 normal"),
            ([mask], [broken], "not finite"),
            ([mask], [m[:3]], "resize the map"),
            ([mask.astype(np.uint8)], [m], "bool"),
            ([mask, mask], [m], "2 masks for 1"),
        ):
            with pytest.raises(UserError, match=message):
                metric(masks, maps)
    with pytest.raises(UserError, match="limit"):
        pixel_metrics.au_pro([mask], [m], 0.0)


@pytest.mark.parametrize("side", [1024, 4096])
@pytest.mark.parametrize("width", [1, 4])
def test_small_and_thin_defects_survive_the_reduction(side, width):
    """Each would vanish, or fall into pieces that AU-PRO counts one by one, were it to cover half a pixel."""
    from panda_ad.evaluation.masks import reduce_mask

    rng = np.random.default_rng(side + width)
    for _ in range(10 if side == 1024 else 2):
        y, x = rng.integers(0, side - width, 2)
        mask = np.zeros((side, side), bool)
        mask[y : y + width, x : x + width] = True
        small = reduce_mask(mask, (384, 384))
        at = np.argwhere(small)
        assert len(at) >= 1
        assert np.abs((at + 0.5) * side / 384 - [y + width / 2, x + width / 2]).max() <= 2 * side / 384
    scratch = np.zeros((side, side), bool)
    scratch[np.arange(100, 900), (np.arange(100, 900) * 0.37).astype(int)] = True
    assert ndimage.label(reduce_mask(scratch, (384, 384)), np.ones((3, 3)))[1] == 1
    assert not reduce_mask(np.zeros((side, side), bool), (384, 384)).any()
