# SPDX-License-Identifier: Apache-2.0
"""The gallery against brute force in float64."""

import json
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from panda_ad.errors import UserError
from panda_ad.params import GalleryParams
from panda_ad.scoring.fit import fit_galleries, out_of_fold
from panda_ad.scoring.folds import split_folds
from panda_ad.scoring.gallery import Gallery, compress
from panda_ad.scoring.whitening import fit_whitening
from panda_ad.system.files import write_json


def brute(gallery: np.ndarray, queries: np.ndarray, k: int, leave_out: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances and indices of the k nearest, one pair at a time."""
    d = np.array([[((q.astype(float) - g.astype(float)) ** 2).sum() for g in gallery] for q in queries])
    if leave_out:
        np.fill_diagonal(d, np.inf)
    order = np.argsort(d, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(d, order, 1), order


@pytest.fixture(scope="module")
def features() -> np.ndarray:
    return np.random.default_rng(0).normal(5, 1, (300, 24)).astype(np.float32)


def test_search_equals_brute_force(features):
    queries = np.random.default_rng(1).normal(5, 1, (40, 24)).astype(np.float32)
    distances, indices = Gallery(features).search(queries, 5)
    expected = brute(features, queries, 5)
    np.testing.assert_array_equal(indices, expected[1])
    np.testing.assert_allclose(distances, expected[0], rtol=1e-14)
    assert distances.dtype == np.float64 and indices.dtype == np.int64
    np.testing.assert_allclose(
        Gallery(features).score(queries, 2), expected[0][:, :2].sum(axis=1), rtol=1e-14
    )  # DN2: k = 2


def test_exact_where_float32_is_blind():
    """Features far from the origin, almost equal: float32's |q|^2 - 2 q g + |g|^2 has no digit left."""
    rng = np.random.default_rng(0)
    features = (1000 + rng.normal(0, 1e-3, (200, 16))).astype(np.float32)
    queries = (1000 + rng.normal(0, 1e-3, (30, 16))).astype(np.float32)
    np.testing.assert_array_equal(Gallery(features).search(queries, 3)[1], brute(features, queries, 3)[1])


def test_exact_among_more_near_ties_than_candidates():
    """All candidates equally far but for less than float32 resolves, and one far outlier that inflates the error bound."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(200, 8))
    features = (
        directions / np.linalg.norm(directions, axis=1, keepdims=True) * (1 + rng.normal(0, 3e-8, (200, 1)))
    ).astype(np.float32)
    features[17] = 1e4
    queries = np.zeros((25, 8), np.float32)
    np.testing.assert_array_equal(Gallery(features).search(queries, 3)[1], brute(features, queries, 3)[1])


def test_ties_go_to_the_lower_index():
    features = np.zeros((100, 4), np.float32)
    distances, indices = Gallery(features).search(np.ones((30, 4), np.float32), 3)
    np.testing.assert_array_equal(indices, np.tile([0, 1, 2], (30, 1)))
    np.testing.assert_array_equal(distances, np.full((30, 3), 4.0))


def test_leave_one_out_equals_brute_force(features):
    expected = brute(features, features, 2, leave_out=True)[0].sum(axis=1)
    np.testing.assert_allclose(Gallery(features).leave_one_out(2), expected, rtol=1e-14)


@pytest.mark.parametrize("copies", [1, 2, 50])
def test_leave_one_out_keeps_exact_duplicates(features, copies):
    """A copy of an image is another image; with one copy the second neighbor is a different image, with two it is a copy."""
    doubled = np.concatenate([features, np.repeat(features[:1], copies, axis=0)])
    expected = brute(doubled, doubled, 2, leave_out=True)[0].sum(axis=1)
    scores = Gallery(doubled).leave_one_out(2)
    np.testing.assert_allclose(scores, expected, rtol=1e-14)
    assert (scores[0] == 0) == (copies >= 2)


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 4), st.integers(1, 40), st.booleans())
@settings(deadline=None, max_examples=40)
def test_scores_do_not_depend_on_batch_order_or_threads(seed, k, threads, batch, grid):
    rng = np.random.default_rng(seed)
    features = rng.normal(3, 1, (120, 8)).astype(np.float32)
    queries = rng.normal(3, 1, (40, 8)).astype(np.float32)
    if grid:  # many exact ties
        features, queries = features.round(), queries.round()
    gallery = Gallery(features)
    before = faiss.omp_get_max_threads()
    distances, indices = gallery.search(queries, k)
    order = rng.permutation(len(queries))
    faiss.omp_set_num_threads(threads)
    try:
        parts = [gallery.search(queries[order[i : i + batch]], k) for i in range(0, len(order), batch)]
    finally:
        faiss.omp_set_num_threads(before)
    np.testing.assert_array_equal(np.concatenate([p[0] for p in parts]), distances[order])
    np.testing.assert_array_equal(np.concatenate([p[1] for p in parts]), indices[order])


def test_k_larger_than_the_gallery_is_a_users_mistake(features):
    gallery = Gallery(features[:3])
    assert gallery.search(features, 3)[0].shape == (300, 3)
    with pytest.raises(UserError, match="gallery.k: 4 neighbors are asked for, the gallery has 3"):
        gallery.search(features, 4)
    with pytest.raises(UserError, match="the gallery has 2"):
        gallery.leave_one_out(3)


def test_unusable_features():
    with pytest.raises(UserError, match="empty"):
        Gallery(np.empty((0, 4), np.float32))
    with pytest.raises(UserError, match="not finite"):
        Gallery(np.array([[1, np.nan]], np.float32))
    with pytest.raises(ValueError, match="queries"):
        Gallery(np.ones((2, 3), np.float32)).search(np.ones((2, 4), np.float32), 1)


def test_a_query_that_is_not_finite_gets_no_finite_score(features):
    query = np.full((1, 24), np.nan, np.float32)
    assert not np.isfinite(Gallery(features).score(query, 2)).any()


def test_save_and_load(features, tmp_path):
    gallery = Gallery(features)
    gallery.save(tmp_path / "gallery.faiss")
    loaded = Gallery.load(tmp_path / "gallery.faiss")
    np.testing.assert_array_equal(loaded.features, features)
    np.testing.assert_array_equal(loaded.search(features, 3)[0], gallery.search(features, 3)[0])
    assert faiss.read_index(str(tmp_path / "gallery.faiss")).ntotal == 300
    assert [p.name for p in tmp_path.iterdir()] == ["gallery.faiss"]


def test_load_of_what_is_no_gallery(tmp_path):
    with pytest.raises(FileNotFoundError):
        Gallery.load(tmp_path / "absent.faiss")
    (tmp_path / "bad.faiss").write_bytes(b"not faiss")
    with pytest.raises(UserError, match=r"bad\.faiss: not a gallery"):
        Gallery.load(tmp_path / "bad.faiss")


def test_compress_none_and_small_galleries(features):
    for method, size in (("none", 5), ("kmeans", 300), ("coreset", 1000)):
        kept, indices = compress(features, method, size, 0)
        np.testing.assert_array_equal(kept, features)
        np.testing.assert_array_equal(indices, np.arange(300))
    with pytest.raises(ValueError, match="unknown"):
        compress(features, "pca", 5, 0)


def test_kmeans_finds_clusters():
    rng = np.random.default_rng(0)
    means = rng.normal(0, 20, (4, 6))
    features = (means[np.arange(200) % 4] + rng.normal(0, 0.1, (200, 6))).astype(np.float32)
    centers, indices = compress(features, "kmeans", 4, 0)
    assert centers.dtype == np.float32
    assert sorted(indices % 4) == [0, 1, 2, 3]
    np.testing.assert_allclose(centers[np.argsort(indices % 4)], means, atol=0.2)
    np.testing.assert_array_equal(compress(features, "kmeans", 4, 0)[0], centers)


def test_coreset_is_greedy_k_center(features):
    kept, indices = compress(features, "coreset", 20, 3)
    np.testing.assert_array_equal(kept, features[indices])
    for i in range(1, 20):  # each is the farthest from all before it
        nearest = brute(kept[:i], features, 1)[0][:, 0]
        assert nearest[indices[i]] == pytest.approx(nearest.max(), rel=1e-4)


def test_coreset_never_takes_an_image_twice():
    features = np.ones((50, 3), np.float32)
    assert len(set(compress(features, "coreset", 10, 0)[1])) == 10


@pytest.mark.parametrize("compression", ["none", "kmeans", "coreset"])
@pytest.mark.parametrize("whiten", [False, True])
def test_out_of_fold_scores_are_by_a_model_of_the_other_folds(features, compression, whiten):
    """By hand, fold by fold, for two snapshots."""
    params = GalleryParams(k=3, normalize=False, whiten=whiten, compression=compression, size=20)
    snapshots = [features[:47], features[100:147] ** 2]
    folds = split_folds(47, 5)
    assert sorted(np.concatenate([fold for fold, _ in folds])) == list(range(47)) and len(folds) == 5
    scores = out_of_fold(snapshots, folds, params, whiten, 5).scores
    for fold, rest in folds:
        assert not set(fold) & set(rest) and len(fold) + len(rest) == 47
        for s, x in enumerate(snapshots):
            to = fit_whitening(x[rest]) if whiten else (lambda x: x)
            gallery = fit_galleries([y[rest] for y in snapshots], params, whiten, 5).galleries[s].features
            np.testing.assert_allclose(scores[s, fold], brute(gallery, to(x[fold]), 3)[0].sum(axis=1), rtol=1e-6)
            if compression == "none":
                np.testing.assert_array_equal(gallery, to(x[rest]))


def test_few_images_are_folds_of_their_own(features):
    params = GalleryParams(k=2, normalize=False, whiten=False, compression="none", size=20)
    scores = out_of_fold([features[:4]], split_folds(4, 0), params, False, 0).scores[0]
    assert scores == pytest.approx(brute(features[:4], features[:4], 2, leave_out=True)[0].sum(axis=1))
    with pytest.raises(UserError, match="one normal training image is too few"):
        out_of_fold([features[:1]], split_folds(1, 0), params.model_copy(update={"k": 1}), False, 0)


def test_more_neighbors_than_a_gallery_has_are_refused(features):
    params = GalleryParams(k=17, normalize=False, whiten=True, compression="none", size=20)
    assert out_of_fold([features[:30]], split_folds(30, 0), params, True, 0).scores.shape == (1, 30)
    with pytest.raises(UserError, match=r"gallery\.k: 17 neighbors are asked for, the gallery has 15; lower it"):
        out_of_fold([features[:16]], split_folds(16, 0), params, True, 0)


@pytest.mark.parametrize("compression", ["none", "kmeans", "coreset"])
def test_left_out_scores_are_those_of_new_images(compression):
    """Whitened, an image that shaped the whitening scores half of what a new one does; SES and the score's scale need the latter."""
    rng = np.random.default_rng(0)
    spread = np.logspace(0, -1, 64)
    train, new = ((rng.normal(size=(n, 64)) * spread).astype(np.float32) for n in (100, 400))
    params = GalleryParams(k=2, normalize=False, whiten=True, compression=compression, size=20)
    scores = out_of_fold([train, 2 * train], split_folds(100, 0), params, True, 0).scores
    normal = fit_galleries([train], params, True, 0)
    expected = normal.score([new], 2)[0].mean()
    assert scores.shape == (2, 100)
    assert scores[0].mean() == pytest.approx(expected, rel=0.15)
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-3)  # whitening takes the scale out
    if compression == "none":
        assert normal.galleries[0].leave_one_out(2).mean() < 0.9 * expected


def test_a_cluster_is_the_same_images_under_every_snapshot(tmp_path, monkeypatch):
    """Neighbors are shown as images: the n-th cluster of the deciding snapshot must be the one whose image is n-th in the bundle."""
    import shutil

    import pandas as pd
    import yaml
    from registry_project import make_project

    from panda_ad.data.images import read_image
    from panda_ad.scoring.bundle import load_bundle
    from panda_ad.stages import adapt, evaluate, extract, index

    folder = make_project(tmp_path / "plant")
    for name in ("adapt", "bundle"):
        shutil.rmtree(folder / "build" / name)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["adapt"] |= {"method": "ses", "epochs": 1, "snapshots": 2}
    params["gallery"] |= {"compression": "kmeans", "size": 5, "k": 1}
    params["localize"]["method"], params["verdict"]["score"] = "none", "features"
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(folder)
    extract.main()
    for stage in (adapt, index):
        stage.main("fabric")
    made = json.loads(Path("build/network/network.json").read_text())
    write_json(
        Path("build/network/network.json"), made | {"fingerprint": "0" * 64}
    )  # another file under the weights' name
    for stage, again in (
        (index, "adapt@fabric"),
        (adapt, "extract"),
    ):  # each names the stage before it, down to the first
        with pytest.raises(UserError, match=f"--single-item {again}`"):
            stage.main("fabric")
    with pytest.raises(UserError, match="--single-item index@fabric"):
        evaluate.main("fabric")

    detector = load_bundle("build/bundle/fabric")
    rows = pd.read_csv("build/features/fabric/rows.csv")
    train = rows[rows["split"] != "test"]
    number = {path: i for i, path in enumerate(train["path"])}
    network = detector.network
    x = network.preprocess([read_image(folder / "data" / path) for path in train["path"]])
    features = detector.transformed(network.features(network.activations(x)))
    members = detector.galleries[-1].search(features[-1], 1)[1][:, 0]
    assert len(detector.galleries[0]) == len(detector.images) == 5
    for gallery, under in zip(detector.galleries, features, strict=True):
        for cluster, image in enumerate(detector.images):
            np.testing.assert_allclose(
                gallery.features[cluster], under[members == cluster].mean(axis=0), rtol=1e-5, atol=1e-6
            )
            assert members[number[image["path"]]] == cluster
