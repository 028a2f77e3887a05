# SPDX-License-Identifier: Apache-2.0
"""SPADE and the patch memory against naive references; same map alone, in a batch and after saving."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from torch.nn import functional as F

from panda_ad.features.backbones import load_backbone
from panda_ad.features.export import export_network
from panda_ad.params import LocalizeParams
from panda_ad.scoring.folds import split_folds
from panda_ad.scoring.localize.localizer import build_localizer, load_localizer
from panda_ad.scoring.localize.maps import local_means, positions, resize
from panda_ad.scoring.localize.patch_memory import choose
from panda_ad.scoring.localize.tiling import blend, boxes, tiles

LEVELS = {"spade": ("layer1", "layer2", "layer3"), "patch_memory": ("layer2", "layer3")}


def params(method, **changes):
    values = {
        "method": method,
        "neighbors": 5,
        "memory_limit": 300,
        "sigma": 2.0,
        "tiles": None,
    }
    return LocalizeParams(**(values | changes))


def texture(rng, shape):
    return np.clip(128 + 60 * ndimage.gaussian_filter(rng.normal(size=(*shape, 3)), (1.5, 1.5, 0)) * 4, 0, 255).astype(
        np.uint8
    )


@pytest.fixture(scope="module", params=[(64, 64), (64, 96)], ids=["square", "wide"])
def world(request):
    """Layers and pooled features of 12 normal images and 3 others, the last with a defect in its upper left."""
    size = request.param
    rng = np.random.default_rng(0)
    images = [texture(rng, size) for _ in range(15)]
    images[-1][8:24, 8:24] = 255 - images[-1][8:24, 8:24] // 3
    network = export_network(load_backbone("embedded"), size)
    (pooled,), layers = network.features_and_maps(network.activations(network.preprocess(images)), network.inner_levels)
    return (
        size,
        {k: v[:12] for k, v in layers.items()},
        pooled[:12],
        {k: v[12:] for k, v in layers.items()},
        pooled[12:],
    )


def build(method, world, **changes):
    _, gallery, pooled, _, _ = world
    return build_localizer(
        params(method, **changes), LEVELS[method], lambda i: {k: v[i] for k, v in gallery.items()}, pooled, 0
    )


def pairwise(queries, rows):
    return (queries[:, None] - rows[None]).square().sum(2).min(1).values.sqrt()


def naive_spade(gallery, pooled, layers, feature, size, k, sigma):
    chosen = np.argsort(((pooled - feature) ** 2).sum(1))[:k]
    maps = []
    for name, values in layers.items():
        layer = torch.from_numpy(values)
        c, h, w = layer.shape
        rows = torch.from_numpy(gallery[name][chosen]).float().permute(0, 2, 3, 1).reshape(-1, c)
        distance = pairwise(layer.float().permute(1, 2, 0).reshape(-1, c), rows).view(1, 1, h, w)
        maps.append(F.interpolate(distance, size=size, mode="bilinear")[0, 0].numpy())
    return ndimage.gaussian_filter(np.mean(maps, axis=0), sigma)


def test_spade_equals_naive(world):
    size, gallery, pooled, layers, features = world
    ours = build("spade", world).heatmaps(layers, features, size)
    assert ours.dtype == np.float32 and ours.shape == (3, *size)
    for i in range(3):
        expected = naive_spade(gallery, pooled, {k: v[i] for k, v in layers.items()}, features[i], size, 5, 2.0)
        np.testing.assert_allclose(ours[i], expected, rtol=1e-5)


def naive_means(layer):
    """Mean of each 3 x 3 neighborhood, zeros beyond the border counted: (C, h, w) -> float32 (h * w, C)."""
    x = F.pad(torch.from_numpy(layer).float(), (1, 1, 1, 1))
    return (
        torch.stack([x[:, y : y + 3, z : z + 3].mean((1, 2)) for y, z in np.ndindex(*layer.shape[1:])]).half().float()
    )


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 7), st.integers(0, 2**16))
def test_local_means_are_those_of_each_neighborhood(channels, height, width, seed):
    layer = np.random.default_rng(seed).normal(size=(channels, height, width)).astype(np.float16)
    np.testing.assert_allclose(positions(local_means(layer)), naive_means(layer), atol=2e-3)


@given(*[st.integers(1, 9)] * 2, *[st.integers(1, 40)] * 2, st.sampled_from([0.0, 0.7, 4.0]), st.integers(0, 2**16))
def test_resize_is_bilinear_interpolation_and_a_gaussian_filter(h, w, height, width, sigma, seed):
    values = np.random.default_rng(seed).normal(size=(h, w)).astype(np.float32)
    plain = F.interpolate(torch.from_numpy(values)[None, None], size=(height, width), mode="bilinear")[0, 0].numpy()
    expected = ndimage.gaussian_filter(plain, sigma) if sigma else plain
    np.testing.assert_allclose(resize(values, (height, width), sigma), expected, atol=1e-5)


def test_patch_memory_equals_naive(world):
    """A map per level, each in units of what images of the other folds have on average, then their mean."""
    size, gallery, _, layers, features = world
    localizer = build("patch_memory", world, memory_limit=10**6)
    ours = localizer.heatmaps({k: layers[k] for k in ("layer2", "layer3")}, features, size)
    expected = np.zeros((3, *size))
    for level in ("layer2", "layer3"):
        rows = torch.stack([naive_means(image) for image in gallery[level]])  # (12, P, C)
        away = [pairwise(rows[fold].flatten(0, 1), rows[rest].flatten(0, 1)) for fold, rest in split_folds(12, 0)]
        assert localizer.memories[level].scale == pytest.approx(float(torch.cat(away).mean()), rel=1e-3)
        for i in range(3):
            distance = pairwise(naive_means(layers[level][i]), rows.flatten(0, 1)).view(1, 1, *layers[level].shape[2:])
            expected[i] += (
                F.interpolate(distance, size=size, mode="bilinear")[0, 0].numpy() / torch.cat(away).mean().item()
            )
    for i in range(3):
        # means rounded to float16 may differ in their last bit between the two ways of summing nine numbers
        np.testing.assert_allclose(ours[i], ndimage.gaussian_filter(expected[i] / 2, 2.0), rtol=2e-3)


def test_a_normal_image_is_about_1_whatever_the_size_of_a_level(world):
    size, gallery, pooled, layers, features = world
    localizer = build("patch_memory", world)
    scaled = {"layer2": 32 * gallery["layer2"], "layer3": gallery["layer3"]}
    other = build("patch_memory", (size, scaled, pooled, None, None))
    good = {"layer2": layers["layer2"][:1], "layer3": layers["layer3"][:1]}
    found = localizer.heatmaps(good, features[:1], size)
    assert 0.7 < found.mean() < 1.4
    same = other.heatmaps({"layer2": 32 * good["layer2"], "layer3": good["layer3"]}, features[:1], size)
    np.testing.assert_allclose(same, found, rtol=1e-3)


def test_a_level_that_never_changes_gives_a_map_of_zeros(world):
    size, gallery, pooled, _, features = world
    constant = {k: np.ones_like(v) for k, v in gallery.items()}
    localizer = build("patch_memory", (size, constant, pooled, None, None))
    found = localizer.heatmaps({k: v[:1] for k, v in constant.items()}, features[:1], size)
    assert found.max() == 0
    assert len(localizer.memories["layer2"].values) < 10, "copies are kept once"


@pytest.mark.parametrize("method", ["spade", "patch_memory"])
def test_finds_the_defect(world, method):
    size, _, _, layers, features = world
    good, _, bad = build(method, world).heatmaps(layers, features, size)
    inside = np.zeros(size, bool)
    inside[8:24, 8:24] = True
    assert bad[inside].mean() > 1.2 * bad[~inside].mean()
    assert bad[inside].mean() > 1.2 * good[inside].mean()


@pytest.mark.parametrize("method", ["spade", "patch_memory"])
def test_alone_in_a_batch_and_after_saving(world, method, tmp_path):
    size, _, _, layers, features = world
    localizer = build(method, world)
    together = localizer.heatmaps(layers, features, size)
    localizer.save(tmp_path)
    loaded = load_localizer(tmp_path)
    del localizer  # its temporary files go; the saved ones are all that is needed
    for i in range(3):
        alone = loaded.heatmaps({k: v[i : i + 1] for k, v in layers.items()}, features[i : i + 1], size)
        np.testing.assert_array_equal(alone[0], together[i])
    assert loaded.heatmaps({k: v[:0] for k, v in layers.items()}, features[:0], size).shape == (0, *size)


def test_a_gallery_image_is_normal_everywhere(world):
    size, gallery, pooled, _, _ = world
    for localizer in (build("spade", world), build("patch_memory", world, memory_limit=10**6)):
        own = localizer.heatmaps({k: v[3:4] for k, v in gallery.items()}, pooled[3:4], size)
        assert own.max() < 1e-3


def test_spade_with_fewer_images_than_neighbors_and_at_another_input_size(world):
    size, gallery, pooled, layers, features = world
    ours = build("spade", world, neighbors=50).heatmaps(layers, features, size)
    expected = naive_spade(gallery, pooled, {k: v[0] for k, v in layers.items()}, features[0], size, 12, 2.0)
    np.testing.assert_allclose(ours[0], expected, rtol=1e-5)
    larger = {k: np.tile(v, (1, 1, 2, 1)) for k, v in layers.items()}
    assert build("spade", world).heatmaps(larger, features, (2 * size[0], size[1])).shape == (3, 2 * size[0], size[1])


@pytest.mark.parametrize("method", ["spade", "patch_memory"])
def test_no_smoothing(world, method):
    size, _, _, layers, features = world
    sharp = build(method, world, sigma=0.0).heatmaps(layers, features, size)
    smoothed = build(method, world).heatmaps(layers, features, size)
    np.testing.assert_allclose(smoothed[0], ndimage.gaussian_filter(sharp[0], 2.0), rtol=1e-6)


def test_memory_size_follows_the_parameters(world):
    for limit in (7, 100):
        memories = build("patch_memory", world, memory_limit=limit).memories
        assert [len(memory.values) for memory in memories.values()] == [limit, limit]
    assert build("patch_memory", world).memories["layer2"].values.dtype == np.float16


def test_coreset_is_greedy_seeded_and_skips_copies():
    rows = np.random.default_rng(0).normal(size=(300, 8))
    chosen = choose(rows, 40, 1).tolist()
    assert chosen == choose(rows, 40, 1).tolist()
    assert len(set(chosen)) == 40
    away = np.full(300, np.inf)
    for i, (last, following) in enumerate(zip(chosen, chosen[1:], strict=False)):
        away = np.minimum(away, np.square(rows - rows[last]).sum(axis=1))
        assert away[following] == pytest.approx(away.max(), rel=1e-4), i
    copies = np.tile(rows[:5], (20, 1))
    assert sorted(i % 5 for i in choose(copies, 50, 0).tolist()) == [0, 1, 2, 3, 4]
    assert len(choose(np.ones((10, 4)), 5, 0)) == 1


def test_coreset_covers_better_than_chance():
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(
        rng.normal(size=(2000, 64)) * (rng.random((2000, 1)) > 0.98) * 5 + rng.normal(size=(2000, 64))
    ).half()
    chosen = choose(rows.numpy(), 100, 0)
    radius = pairwise(rows.float(), rows[chosen].float()).max()
    assert radius < 0.8 * pairwise(rows.float(), rows[:100].float()).max()


@pytest.mark.parametrize(
    ("shape", "size", "overlap"),
    [
        ((50, 70), (32, 32), (8, 8)),
        ((33, 48), (32, 40), (0, 9)),
        ((20, 90), (32, 32), (31, 31)),
        ((10, 12), (32, 16), (4, 0)),
    ],
)
def test_tiles_cover_and_blend_without_seams(shape, size, overlap):
    rng = np.random.default_rng(0)
    image = ndimage.gaussian_filter(rng.normal(size=shape), 3).astype(np.float32)
    parts = tiles(image, size, overlap)
    np.testing.assert_allclose(blend(parts, shape, size, overlap), image, atol=1e-6)
    spans = sorted({(y0, y1) for y0, _, y1, _ in boxes(shape, size, overlap)})
    assert spans[0][0] == 0 and spans[-1][1] == shape[0]
    assert all(end - start >= overlap[0] for (_, end), (start, _) in zip(spans, spans[1:], strict=False))


def test_a_tile_that_disagrees_leaves_no_step():
    shape, size, overlap = (32, 104), (32, 32), (8, 8)
    maps = [np.full((32, 32), float(i)) for i in range(len(boxes(shape, size, overlap)))]
    assert np.abs(np.diff(blend(maps, shape, size, overlap), axis=1)).max() < 0.25  # a hard seam is a step of 1
    with pytest.raises(Exception, match="maps for 4 tiles"):
        blend(maps[1:], shape, size, overlap)
    with pytest.raises(Exception, match="overlap"):
        boxes(shape, (32, 32), (8, 32))
