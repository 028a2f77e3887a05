# SPDX-License-Identifier: Apache-2.0
"""SPADE and the patch memory against naive references; same map alone, in a batch and after saving."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional as F

from panda_ad.features.backbones import frozen_activations, in_micro_batches, load_backbone
from panda_ad.features.preprocessing import preprocess
from panda_ad.params import LocalizeParams
from panda_ad.scoring.localize.localizer import build_localizer, load_localizer
from panda_ad.scoring.localize.patch_memory import choose, patch_features
from panda_ad.scoring.localize.tiling import blend, boxes, tiles

LEVELS = {"spade": ("layer1", "layer2", "layer3"), "patch_memory": ("layer2", "layer3")}


def params(method, **changes):
    values = {
        "method": method,
        "neighbors": 5,
        "memory_fraction": 0.3,
        "memory_limit": 20_000,
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
    backbone = load_backbone("embedded")
    layer1, layer2 = frozen_activations(
        backbone,
        torch.from_numpy(np.stack([preprocess(i, size, backbone.architecture) for i in images])),
        torch.float32,
    )
    layer3, pooled = in_micro_batches(
        lambda x: (backbone.adapted.maps(x.float())[0], backbone.adapted(x.float())), layer2
    )
    layers = {"layer1": layer1.numpy(), "layer2": layer2.numpy(), "layer3": layer3.half().numpy()}
    return (
        size,
        {k: v[:12] for k, v in layers.items()},
        pooled[:12].numpy(),
        {k: v[12:] for k, v in layers.items()},
        pooled[12:].numpy(),
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


def naive_patch_features(layer2, layer3):
    """One image, neighborhood by neighborhood."""
    layer2, layer3 = torch.from_numpy(layer2), torch.from_numpy(layer3)

    def mean3x3(x):
        out = torch.empty_like(x)
        for y in range(x.shape[1]):
            for z in range(x.shape[2]):
                out[:, y, z] = x[:, max(y - 1, 0) : y + 2, max(z - 1, 0) : z + 2].mean((1, 2))
        return out

    up = F.interpolate(mean3x3(layer3.float())[None], size=layer2.shape[1:], mode="bilinear")[0]
    return torch.cat([mean3x3(layer2.float()), up]).half()


def test_patch_memory_equals_naive(world):
    size, gallery, _, layers, features = world
    localizer = build("patch_memory", world, memory_fraction=1.0)
    ours = localizer.heatmaps({k: layers[k] for k in ("layer2", "layer3")}, features, size)
    memory = [naive_patch_features(a, b) for a, b in zip(gallery["layer2"], gallery["layer3"], strict=True)]
    rows = torch.cat([m.flatten(1).T for m in memory]).float()
    for i in range(3):
        image = naive_patch_features(layers["layer2"][i], layers["layer3"][i])
        distance = pairwise(image.flatten(1).T.float(), rows).view(1, 1, *image.shape[1:])
        expected = ndimage.gaussian_filter(F.interpolate(distance, size=size, mode="bilinear")[0, 0].numpy(), 2.0)
        # means rounded to float16 may differ in their last bit between the two ways of summing nine numbers
        np.testing.assert_allclose(ours[i], expected, rtol=2e-3)


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
    for localizer in (build("spade", world), build("patch_memory", world, memory_fraction=1.0)):
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
    total = 12 * (world[0][0] // 8) * (world[0][1] // 8)
    assert len(build("patch_memory", world, memory_fraction=0.1).values) == round(0.1 * total)
    assert len(build("patch_memory", world, memory_limit=7).values) == 7


def test_coreset_is_greedy_seeded_and_skips_copies():
    rows = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    chosen = choose(rows, 40, torch.Generator().manual_seed(1)).tolist()
    assert chosen == choose(rows, 40, torch.Generator().manual_seed(1)).tolist()
    assert len(set(chosen)) == 40
    away = torch.full((300,), torch.inf)
    for i, (last, following) in enumerate(zip(chosen, chosen[1:], strict=False)):
        away = torch.minimum(away, (rows - rows[last]).square().sum(1))
        assert away[following] == pytest.approx(float(away.max()), rel=1e-4), i
    copies = rows[:5].repeat(20, 1)
    assert sorted(i % 5 for i in choose(copies, 50, torch.Generator().manual_seed(0)).tolist()) == [0, 1, 2, 3, 4]
    assert len(choose(torch.ones(10, 4), 5, torch.Generator().manual_seed(0))) == 1


def test_coreset_covers_better_than_chance():
    rng = np.random.default_rng(0)
    rows = torch.from_numpy(
        rng.normal(size=(2000, 64)) * (rng.random((2000, 1)) > 0.98) * 5 + rng.normal(size=(2000, 64))
    ).half()
    chosen = choose(rows, 100, torch.Generator().manual_seed(0))
    radius = pairwise(rows.float(), rows[chosen].float()).max()
    assert radius < 0.8 * pairwise(rows.float(), rows[:100].float()).max()


def test_patch_features_of_an_image_do_not_depend_on_the_batch(world):
    layers = {k: torch.from_numpy(world[3][k]) for k in LEVELS["patch_memory"]}
    together = patch_features(layers)
    for i in range(3):
        assert torch.equal(together[i], patch_features({k: v[i : i + 1] for k, v in layers.items()})[0])


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
