# SPDX-License-Identifier: Apache-2.0
"""Training images in the light of other sessions: who is copied, how they are lit, and that none leaks."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import REPO, noise
from hypothesis import given
from hypothesis import strategies as st
from inspect_site import part

from panda_ad.features.backbones import load_backbone
from panda_ad.features.export import export_network
from panda_ad.features.images import DecodedImages
from panda_ad.params import GalleryParams
from panda_ad.params_file import load_params
from panda_ad.scoring.config import FitParams
from panda_ad.scoring.fit import fit_detector, out_of_fold
from panda_ad.scoring.fit_localizer import fit_localizer
from panda_ad.scoring.folds import split_folds
from panda_ad.scoring.relight import COPIES, MOST, Relit, lit, relit


@pytest.fixture(scope="module")
def network():
    return export_network(load_backbone("embedded"), (32, 32))


def fit_params(relight: bool, method: str = "patch_memory") -> FitParams:
    own = load_params(REPO / "params.yaml")
    return FitParams(
        gallery=own.gallery.model_copy(update={"relight": relight}),
        localize=own.localize.model_copy(update={"memory_limit": 100_000, "method": method}),
        verdict=own.verdict,
    )


def lamps(gains: list[float], each: int = 6) -> tuple[list[np.ndarray], list[str]]:
    """Parts under lamps of these strengths, and their sessions."""
    pixels = [lit(part(10 * g + i) // 2, np.full(3, gain)) for g, gain in enumerate(gains) for i in range(each)]
    return pixels, [f"shift {g}" for g in range(len(gains)) for _ in range(each)]


@given(st.integers(1, 200), st.integers(0, 5), st.integers(0, 99))
def test_copies_follow_the_images_and_name_their_source(count, known, seed):
    images = DecodedImages(None, [noise(0, (2, 2))] * count)  # type: ignore[arg-type]
    shown, sources = relit(images, [f"s{i % known}" for i in range(count)] if known else [], None, seed)  # type: ignore[arg-type]
    assert sources[:count].tolist() == list(range(count)) and len(shown) == len(sources)
    if min(known, count) < 3:
        assert shown is images
        return
    assert len(sources) == count + min(MOST, COPIES * count)
    assert np.bincount(sources[count:]).max() <= COPIES and shown.keys[-1] == images.keys[sources[-1]]


def test_images_of_no_session_are_not_copied_and_are_no_session():
    """A taught image has none: it must not turn two sessions into three."""
    images = DecodedImages(None, [noise(i, (2, 2)) for i in range(20)])  # type: ignore[arg-type]
    assert relit(images, ["a"] * 9 + ["b"] * 9 + ["", ""], None, 0)[0] is images  # type: ignore[arg-type]
    _, sources = relit(images, ["a", "b", "c"] * 6 + ["", ""], None, 0)  # type: ignore[arg-type]
    assert sources[:20].tolist() == list(range(20)) and np.bincount(sources[20:], minlength=20).tolist() == [2] * 18 + [
        0,
        0,
    ]


def test_copies_are_lit_as_sessions_drawn_like_the_known_ones():
    """Their channels' log means have the mean of the sessions', and their covariance (1 + 1 / G)."""
    rng = np.random.default_rng(0)
    light = rng.multivariate_normal([-1.2] * 3, [[0.04, 0.03, 0.03], [0.03, 0.04, 0.03], [0.03, 0.03, 0.05]], 8)
    pixels = [np.broadcast_to(np.rint(255 * np.exp(x)).astype(np.uint8), (4, 4, 3)) for x in light for _ in range(60)]
    sessions = [f"s{g}" for g in range(8) for _ in range(60)]
    shown, _ = relit(DecodedImages(None, pixels), sessions, None, 0)  # type: ignore[arg-type]
    copies = np.log(np.array([shown.read(i).mean(axis=(0, 1)) for i in range(480, len(shown))]) / 255)
    means = np.log(np.array(pixels[::60]).mean(axis=(1, 2)) / 255)
    assert len(copies) == 960
    np.testing.assert_allclose(copies.mean(axis=0), means.mean(axis=0), atol=0.03)
    np.testing.assert_allclose(np.cov(copies.T), 1.125 * np.cov(means.T), rtol=0.2)


def test_activations_come_in_the_order_asked_for(network):
    pixels, sessions = lamps([0.8, 1.0, 1.2])
    shown, _ = relit(DecodedImages(network, pixels), sessions, network, 0)
    asked = np.array([40, 2, 18, 0, 53])
    found = shown.activations(asked, network.frozen_levels)
    plain = network.activations(network.preprocess([shown.read(int(i)) for i in asked]))
    for level, values in found.items():
        np.testing.assert_array_equal(values, plain[level])
    assert (shown.read(0) == pixels[0]).all() and (shown.read(20) != pixels[int(shown.sources[20])]).any()
    assert shown.pretrained(asked) is None


def test_no_copy_of_an_image_helps_to_score_it(network):
    """Out of fold an image is scored as without its own copies, and without those of its session."""
    rng = np.random.default_rng(0)
    features, sources = rng.normal(size=(30, 8)).astype(np.float32), np.concatenate([np.arange(20), np.arange(10)])
    features[20:] = features[:10]  # the copies give their images away
    params = GalleryParams(k=1, normalize=False, whiten=False, compression="none", size=1)
    folds = split_folds(20, 0, [f"s{i % 5}" for i in range(20)])
    found = out_of_fold([features], folds, params, False, 0, sources)
    plain = out_of_fold([features[:20]], folds, params, False, 0)
    np.testing.assert_array_equal(found.scores, plain.scores)
    assert found.scores.shape == (1, 20) and found.features.shape == (20, 8)

    pixels, sessions = lamps([0.8, 1.0, 1.2])
    shown, sources = relit(DecodedImages(network, pixels), sessions, network, 0)
    detector = fit_detector(network, DecodedImages(network, pixels), fit_params(True), sessions=sessions)
    features = np.zeros((len(sources), 4), np.float32)
    memory = fit_localizer(detector, shown, features, fit_params(True), sources)
    kept = memory.without(np.arange(6)).memories  # type: ignore[attr-defined]
    assert all(set(level.sources) <= set(range(6, 18)) for level in kept.values())


@pytest.mark.parametrize("method", ["patch_memory", "spade"])
def test_a_lamp_of_the_usual_kind_is_nearer(network, method):
    """By the features as they are, and by the patch memory. Rates and real images: benchmarks/new_lamp.py."""
    pixels, sessions = lamps([0.7, 0.85, 1.0, 1.2], each=8)
    images = DecodedImages(network, pixels)
    models = []
    for on in (False, True):
        params = fit_params(on, method)
        as_they_are = params.gallery.model_copy(update={"whiten": False, "normalize": False})
        params = params.model_copy(update={"gallery": as_they_are})
        models.append(fit_detector(network, images, params, sessions=sessions))
    plain, shown = models
    assert len(shown.calibration) == len(plain.calibration) == 32 and shown.seen == plain.seen
    assert len(shown.images) == 3 * len(plain.images) and {i["sha256"] for i in shown.images} == set(images.keys)
    new = network.activations(network.preprocess([lit(part(500 + i) // 2, np.full(3, 1.1)) for i in range(8)]))
    (features,) = network.features(new, None)
    far, near = (model.galleries[0].score(features, 2).mean() for model in models)
    assert near < 0.9 * far
    if method == "patch_memory":
        maps = network.maps(new, plain.localizer.levels)
        scaled = [
            np.mean([m.distances(maps[level][0]).mean() * m.scale for level, m in model.localizer.memories.items()])
            for model in models
        ]
        assert scaled[1] < scaled[0]


def test_an_image_is_shown_once_among_the_nearest(network):
    pixels, sessions = lamps([0.8, 1.0, 1.2])
    model = fit_detector(network, DecodedImages(network, pixels), fit_params(True), sessions=sessions)
    own = [i for i, image in enumerate(model.images) if image["sha256"] == model.images[5]["sha256"]]
    assert len(own) == 1 + COPIES
    assert model.distinct(np.array([own[1], 0, own[0], own[2], 1])) == [own[1], 0, 1]
    assert model.distinct(np.array([-1, len(model.images)])) == []


def test_outlier_exposure_is_scaled_by_the_images_alone(network):
    """Its score is the classifier's, of the features as they are: copies in other light say nothing of the images."""
    pixels, sessions = lamps([0.7, 0.85, 1.0, 1.2])
    images, wide = DecodedImages(network, pixels), network.features(network.activations(network.preprocess(pixels)))
    classifier = {"weight": np.ones((1, wide[0].shape[1]), np.float32), "bias": np.zeros(1, np.float32)}
    plain, shown = (fit_detector(network, images, fit_params(on), None, classifier, sessions) for on in (False, True))
    assert shown.scales[0] == plain.scales[0]


def test_a_black_picture_stays_black():
    images = DecodedImages(None, [np.zeros((3, 3, 3), np.uint8)] * 6)  # type: ignore[arg-type]
    shown, _ = relit(images, list("aabbcc"), None, 0)  # type: ignore[arg-type]
    assert isinstance(shown, Relit) and all((shown.read(i) == 0).all() for i in range(len(shown)))
