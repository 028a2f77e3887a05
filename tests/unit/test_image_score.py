# SPDX-License-Identifier: Apache-2.0
"""One score per image: its parts, their scale, and the same number everywhere."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from registry_project import make_project
from scipy.stats import iqr
from test_localize import build, naive_spade, pairwise

from panda_ad.data.images import read_image
from panda_ad.errors import UserError
from panda_ad.params_file import parse_params
from panda_ad.scoring.bundle import load_bundle, save_bundle
from panda_ad.scoring.bundle_formats import FORMAT
from panda_ad.scoring.folds import split_folds
from panda_ad.scoring.image_score import RobustScale, fit_robust_scale, image_scores, map_scores
from panda_ad.scoring.localize.maps import local_means, positions


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
def test_the_scale_is_median_and_normal_iqr(values):
    scale = fit_robust_scale(np.array(values))
    assert scale.center == pytest.approx(np.median(values), abs=1e-6)
    assert scale.spread == pytest.approx(iqr(values, scale="normal") or 1.0, rel=1e-6)


def test_a_few_bad_images_among_the_normal_ones_hardly_move_the_scale():
    normal = np.random.default_rng(0).normal(5, 2, 100)
    with_bad = np.concatenate([normal, [500.0] * 5])
    assert fit_robust_scale(with_bad).spread == pytest.approx(fit_robust_scale(normal).spread, rel=0.2)
    assert np.std(with_bad) > 10 * np.std(normal)


def test_both_adds_what_the_parts_say_in_units_of_their_spread():
    features, peaks = np.array([1.0, 3.0, 2.0]), np.array([10.0, 10.0, 40.0])
    assert image_scores("features", features, None, None) is features
    assert image_scores("heatmap", features, peaks, None) is peaks
    both = image_scores("both", features, peaks, (RobustScale(1.0, 0.5), RobustScale(10.0, 10.0)))
    assert both.tolist() == [0.0, 4.0, 5.0]


def test_the_map_score_is_the_peak_of_each_map():
    maps = np.random.default_rng(0).random((3, 4, 5)).astype(np.float32)
    assert map_scores(maps).tolist() == [float(m.max()) for m in maps]
    assert map_scores(maps[:0]).shape == (0,)


@pytest.fixture(scope="module", params=[(64, 64)])
def world(request):
    from test_localize import world as make

    return make.__wrapped__(request)


def test_spade_without_images_never_looks_at_them(world):
    size, gallery, pooled, _, _ = world
    left = build("spade", world).without(np.array([4, 7]))
    layers = {k: v[4:5] for k, v in gallery.items()}
    others = ~np.isin(np.arange(12), [4, 7])
    kept = {k: v[others] for k, v in gallery.items()}
    expected = naive_spade(kept, pooled[others], {k: v[0] for k, v in layers.items()}, pooled[4], size, 5, 2.0)
    np.testing.assert_allclose(left.heatmaps(layers, pooled[4:5], size)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("tiles", [1, 2])
def test_patch_memory_without_an_image_has_none_of_its_patches(world, tiles):
    """With tiles the gallery's maps count as the four tiles of three images."""
    size, gallery, pooled, _, _ = world
    whole = build(
        "patch_memory",
        (size, gallery, pooled[: 12 // tiles**2], None, None),
        memory_limit=10**6,
        tiles=tiles if tiles > 1 else None,
    )
    left = whole.without(np.array([1]))
    layer = gallery["layer2"][tiles**2]
    for level in whole.levels:
        rows = np.stack([positions(local_means(image)) for image in gallery[level]])  # (12, P, C)
        own = {tuple(row.tolist()) for row in rows[tiles**2 : 2 * tiles**2].reshape(-1, rows.shape[2])}
        mine, theirs = whole.memories[level].values, left.memories[level].values
        assert own & {tuple(row.tolist()) for row in mine}
        assert not own & {tuple(row.tolist()) for row in theirs}
        assert len(theirs) >= len(mine) * (1 - 1.5 / (12 // tiles**2))
        assert np.array_equal(whole.without(np.array([999])).memories[level].values, mine)
    query, memory = torch.from_numpy(positions(local_means(layer))).float(), left.memories["layer2"]
    away = pairwise(query, torch.from_numpy(memory.values).float()) / memory.scale
    np.testing.assert_allclose(memory.distances(layer).ravel(), away, rtol=1e-5)
    assert whole.without(np.arange(12)).memories["layer2"] is whole.memories["layer2"], "nothing else to compare with"


@pytest.mark.parametrize("tiles", [1, 2])
def test_out_of_fold_map_scores_are_those_of_each_image_alone_without_its_fold(world, tiles, monkeypatch):
    """Although many are computed together, and only some images are chosen."""
    from panda_ad.scoring import fit_localizer

    size, gallery, pooled, _, _ = world
    count = 12 // tiles**2
    whole = build("patch_memory", (size, gallery, pooled[:count], None, None), tiles=tiles if tiles > 1 else None)
    monkeypatch.setattr(fit_localizer, "image_maps", lambda *a: lambda i: {k: v[i] for k, v in gallery.items()})
    detector = SimpleNamespace(localizer=whole, size=size, network=None)
    folds, chosen = split_folds(count, 3), np.arange(1, count)
    found = fit_localizer.out_of_fold_map_scores(detector, None, pooled[:count], folds, chosen)
    assert found.shape == (count - 1,)
    fold_of = {int(i): fold for fold, _ in folds for i in fold}
    for score, i in zip(found, chosen, strict=True):
        own = {k: v[i * tiles**2 : (i + 1) * tiles**2] for k, v in gallery.items()}
        assert score == whole.without(fold_of[i]).heatmaps(own, pooled[i : i + 1], size).max()


def make_plant(folder, monkeypatch, gallery=None, **verdict):
    from panda_ad.stages import adapt, evaluate, extract, index

    folder = make_project(folder)
    for name in ("adapt", "bundle", "evaluation"):
        shutil.rmtree(folder / "build" / name)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["adapt"] |= {"method": "ses", "epochs": 1, "snapshots": 2}
    params["evaluate"]["bootstrap"] = 50
    params["gallery"] |= {"whiten": False} | (gallery or {})
    params["verdict"] |= verdict
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(folder)
    extract.main()
    for stage in (adapt, index, evaluate):
        stage.main("fabric")
    return folder


@pytest.mark.parametrize("method", ["both", "heatmap", "features"])
def test_one_score_for_the_same_bytes_evaluated_and_scored_with_or_without_heat_maps(tmp_path, monkeypatch, method):
    import pandas as pd

    folder = make_plant(tmp_path / "plant", monkeypatch, score=method)
    detector = load_bundle("build/bundle/fabric")
    rows = pd.read_csv("build/evaluation/fabric/scores.csv")
    images = [read_image(folder / "data" / path) for path in rows["path"]]
    plain, mapped = detector.score(images), detector.score(images, heatmaps=True)
    assert [v.score for v in plain] == [v.score for v in mapped] == rows["score"].tolist()
    if method == "both":
        assert [sum(v.components) for v in plain] == pytest.approx(rows["score"].tolist())
        assert plain[0].components == (
            detector.scales[0](rows["features_score"][0]),
            detector.scales[1](rows["heatmap_peak"][0]),
        )
    else:
        assert plain[0].components is None
    assert plain[0].heatmap is None and mapped[0].heatmap is not None
    assert detector.score(images[2:3])[0].score == rows["score"][2]
    expected = {
        "features": rows["features_score"],
        "heatmap": rows["heatmap_peak"],
        "both": sum(
            scale(rows[c]) for scale, c in zip(detector.scales or (), ("features_score", "heatmap_peak"), strict=False)
        ),
    }[method]
    assert rows["score"].tolist() == expected.tolist()
    bundle = json.loads((folder / "build/bundle/fabric/bundle.json").read_text())
    assert bundle["format"] == FORMAT
    figures = json.loads((folder / "build/evaluation/fabric/metrics.json").read_text())
    assert figures["image_auroc"] == figures.get(
        {"features": "features_auroc", "heatmap": "heatmap_auroc"}.get(method, "image_auroc")
    )


@pytest.mark.parametrize("whiten", [False, True])
def test_scales_come_from_training_images_that_the_model_had_not_seen(tmp_path, monkeypatch, whiten):
    """By hand: each fold against whitening and gallery of the others, by the loaded bundle's own heads; a seen image would look too normal."""
    import pandas as pd

    from panda_ad.scoring.whitening import fit_whitening

    folder = make_plant(tmp_path / "plant", monkeypatch, {"whiten": whiten}, score="both")
    detector = load_bundle("build/bundle/fabric")
    manifest = pd.read_csv("build/features/fabric/rows.csv")
    train = [read_image(folder / "data" / path) for path in manifest[manifest["split"] != "test"]["path"]]
    network = detector.network
    activations = network.activations(network.preprocess(train))
    seen = detector.score_activations(activations, heatmaps=True)
    plain = replace(detector, whitenings=()).transformed(network.features(activations))
    ratios = []
    for features, mean in zip(plain, detector.train_means, strict=True):
        ratio = np.empty(len(train))
        for fold, rest in split_folds(len(train), 0):
            white = fit_whitening(features[rest]) if whiten else (lambda x: x)
            for i in fold:
                squared = np.square(white(features[rest]).astype(np.float64) - white(features[i : i + 1])).sum(axis=1)
                ratio[i] = np.sort(squared)[:2].sum() / mean
        ratios.append(ratio)
    scale = fit_robust_scale(np.max(ratios, axis=0))
    assert detector.scales[0].center == pytest.approx(scale.center, rel=1e-4)
    assert detector.scales[0].spread == pytest.approx(scale.spread, rel=1e-4)
    assert detector.scales[0].center > 2 * np.median(seen.feature_score)
    assert detector.scales[1].center > 1.2 * np.median(seen.map_score)


def test_a_bundle_without_what_its_score_needs_is_none(tmp_path, monkeypatch):
    make_plant(tmp_path / "plant", monkeypatch, score="features")
    before = load_bundle("build/bundle/fabric")
    damaged = replace(before, config=before.config.model_copy(update={"score": "both"}))
    (tmp_path / "new").mkdir()
    save_bundle(damaged, tmp_path / "new")  # says both, does not say in what units
    with pytest.raises(UserError, match="damaged bundle"):
        load_bundle(tmp_path / "new")


def test_a_score_from_heat_maps_needs_them(repo_root):
    raw = yaml.safe_load((repo_root / "params.yaml").read_text())
    raw["verdict"]["score"], raw["localize"]["method"] = "both", "none"
    with pytest.raises(UserError, match="verdict.score: both needs heat maps"):
        parse_params(raw)
    raw["verdict"]["score"] = "features"
    assert parse_params(raw).verdict.score == "features"
