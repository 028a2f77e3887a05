# SPDX-License-Identifier: Apache-2.0
"""Whitening against what it is defined by, and through the pipeline's stages and the bundle."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from registry_project import make_project
from sklearn.covariance import LedoitWolf, ledoit_wolf

from panda_ad.scoring.bundle import load_bundle
from panda_ad.scoring.gallery import Gallery
from panda_ad.scoring.whitening import FLOOR, fit_whitening, ledoit_wolf_shrinkage


def correlated(m: int, d: int, seed: int = 0, center: float = 3.0) -> np.ndarray:
    """(m, d) float32, directions of different variance, off the origin."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(m, d)) @ rng.normal(size=(d, d)) + center).astype(np.float32)


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 12), st.integers(0, 10**6), st.floats(-30, 30))
def test_unshrunk_whitened_training_features_have_identity_covariance(d, seed, center):
    x = correlated(20 * d, d, seed, center)
    z = fit_whitening(x, shrinkage=0.0)(x).astype(np.float64)
    assert z.dtype == np.float64 and z.shape == x.shape
    variances = np.linalg.eigvalsh(np.cov(x.T.astype(np.float64), bias=True))
    if variances[0] > 1e-4 * variances[-1]:  # beyond, float32 rounds visibly
        np.testing.assert_allclose(np.cov(z.T, bias=True), np.eye(d), atol=2e-3)
    np.testing.assert_allclose(z.mean(axis=0), 0, atol=1e-2)


@pytest.mark.parametrize(("m", "d"), [(300, 24), (9, 24)])
def test_distances_are_mahalanobis_distances(m, d):
    """With fewer images than dimensions too."""
    x, queries = correlated(m, d), correlated(20, d, seed=1)
    white = fit_whitening(x)
    inverse = np.linalg.inv(LedoitWolf().fit(x.astype(np.float64)).covariance_)
    naive = np.array([[(q - g) @ inverse @ (q - g) for g in x.astype(np.float64)] for q in queries.astype(np.float64)])
    distances, _ = Gallery(white(x)).search(white(queries), m)
    np.testing.assert_allclose(distances, np.sort(naive, axis=1), rtol=1e-3)


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 60), st.integers(1, 30), st.integers(0, 10**6))
def test_shrinkage_is_that_of_ledoit_and_wolf(m, d, seed):
    x = correlated(m, d, seed).astype(np.float64)
    centered = x - x.mean(axis=0)
    found = ledoit_wolf_shrinkage(centered, centered.T @ centered / m)
    assert found == pytest.approx(ledoit_wolf(x)[1], abs=1e-9)
    assert 0 <= found <= 1


def test_equal_features_are_not_shrunk():
    assert ledoit_wolf_shrinkage(np.zeros((4, 3)), np.zeros((3, 3))) == 0


def test_an_image_is_whitened_alone_as_in_company():
    x = correlated(70, 96)
    white = fit_whitening(x)
    together = white(x)
    for part in (white(x[5:6]), white(x[5:40]), white(x[[5, 3, 60]]), white(np.asfortranarray(x)[5:])):
        np.testing.assert_array_equal(part[0], together[5])
    assert together.dtype == np.float32


def test_a_feature_that_never_changes_neither_breaks_nor_decides_by_rounding():
    x = correlated(200, 6)
    x[:, 2] = 7.0
    white = fit_whitening(x, shrinkage=0.0)
    largest = np.linalg.eigvalsh(np.cov(x.T.astype(np.float64), bias=True))[-1]
    moved = x[:1].copy()
    moved[0, 2] += 0.01
    np.testing.assert_allclose(np.square(white(moved) - white(x[:1])).sum(), 0.01**2 / (FLOOR * largest), rtol=1e-2)
    # equal images: nothing to whiten by; what differs stands out, by a finite distance
    for value in (0.0, 0.1):
        same = np.full((7, 5), value, np.float32)
        white = fit_whitening(same)
        inside, outside = Gallery(white(same)).score(white(np.stack([same[0], same[0] + 1])), 2)
        assert np.isfinite(outside) and outside > 1e6 * inside


def test_the_stages_whiten_what_is_normalized_and_the_bundle_keeps_it_to_the_digit(tmp_path, monkeypatch):
    """Two snapshots and a compressed gallery; scores of the loaded bundle from a naive computation, and as evaluated."""
    import pandas as pd

    from panda_ad.data.images import read_image
    from panda_ad.stages import adapt, evaluate, extract, index

    folder = make_project(tmp_path / "plant")
    for name in ("adapt", "bundle", "evaluation"):
        shutil.rmtree(folder / "build" / name)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["adapt"] |= {"method": "ses", "epochs": 1, "snapshots": 2}
    params["gallery"] |= {"whiten": True, "normalize": True, "compression": "coreset", "size": 6, "k": 2}
    params["localize"]["method"], params["verdict"]["score"] = "none", "features"
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(folder)
    extract.main()
    for stage in (adapt, index, evaluate):
        stage.main("fabric")

    detector = load_bundle("build/bundle/fabric")
    rows = pd.read_csv("build/evaluation/fabric/scores.csv")
    images = [read_image(folder / "data" / path) for path in rows["path"]]
    verdicts = detector.score(images)
    assert [v.score for v in verdicts] == rows["score"].tolist()
    assert detector.score(images[3:4])[0] == verdicts[3]

    network = detector.network

    def plain(paths) -> list[np.ndarray]:
        """Normalized features under each head, float64, not whitened."""
        x = network.preprocess([read_image(folder / "data" / path) for path in paths])
        features = replace(detector, whitenings=()).transformed(network.features(network.activations(x)))
        return [f.astype(np.float64) for f in features]

    manifest = pd.read_csv("build/features/fabric/rows.csv")
    train, test = plain(manifest[manifest["split"] != "test"]["path"]), plain(rows["path"])
    kept = plain(image["path"] for image in detector.images)
    ratios = []
    for s, whitening in enumerate(detector.whitenings):
        np.testing.assert_allclose(np.linalg.norm(train[s], axis=1), 1, rtol=1e-5)
        fitted = LedoitWolf().fit(train[s])
        inverse = np.linalg.inv(fitted.covariance_)
        np.testing.assert_allclose(
            whitening.matrix.astype(np.float64) @ whitening.matrix, inverse, rtol=0, atol=1e-3 * inverse.max()
        )
        squared = np.array([[(a - b) @ inverse @ (a - b) for b in kept[s]] for a in test[s]])
        ratios.append(np.sort(squared, axis=1)[:, :2].sum(axis=1) / detector.train_means[s])
    np.testing.assert_allclose(np.max(ratios, axis=0), rows["score"], rtol=2e-3)
