# SPDX-License-Identifier: Apache-2.0
"""Calibration on a model's own training images: by models that have not seen them, nor their session."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import REPO, noise
from hypothesis import given
from hypothesis import strategies as st

from panda_ad.features.backbones import load_backbone
from panda_ad.features.export import export_network
from panda_ad.features.images import DecodedImages
from panda_ad.params_file import load_params
from panda_ad.scoring.bundle import load_bundle, save_bundle
from panda_ad.scoring.config import FitParams
from panda_ad.scoring.fit import fit_detector, fit_galleries, training_features
from panda_ad.scoring.folds import FEW, FOLDS, SESSION_FOLDS, draw, split_folds


@pytest.fixture(scope="module")
def network():
    return export_network(load_backbone("embedded"), (32, 32))


def fit_params(score):
    loaded = load_params(REPO / "params.yaml")
    verdict = loaded.verdict.model_copy(update={"score": score})
    return FitParams(gallery=loaded.gallery, localize=loaded.localize, verdict=verdict)


@given(st.integers(2, 120), st.integers(0, 99), st.integers(1, 15))
def test_each_image_is_left_out_once_and_sessions_stay_whole(count, seed, kinds):
    for names in ([], [f"s{i % kinds}" for i in range(count)]):
        folds = split_folds(count, seed, names)
        assert sorted(np.concatenate([fold for fold, _ in folds])) == list(range(count))
        for fold, rest in folds:
            assert len(fold) and len(rest) and not set(fold) & set(rest) and len(fold) + len(rest) == count
        distinct = len(set(names))
        if distinct > 1:
            assert len(folds) == min(distinct, SESSION_FOLDS)
            assert all({names[i] for i in fold}.isdisjoint(names[i] for i in rest) for fold, rest in folds)
        else:
            assert len(folds) == (count if count < FEW else FOLDS)


@given(st.integers(2, 120), st.integers(1, 130), st.integers(0, 99))
def test_a_draw_is_as_even_as_the_folds_allow(count, most, seed):
    folds = split_folds(count, seed, [f"s{i**2 % 7}" for i in range(count)])
    chosen = draw(folds, most, seed)
    assert len(set(chosen)) == len(chosen) == min(count, most) and list(chosen) == sorted(chosen)
    taken = [np.isin(fold, chosen).sum() for fold, _ in folds]
    assert all(n >= max(taken) - 1 or n == len(fold) for n, (fold, _) in zip(taken, folds, strict=True))


def test_calibration_scores_are_those_of_a_model_without_the_image(network):
    """By hand: features, and each image against whitening and gallery of all others."""
    images, params = DecodedImages(network, [noise(i) for i in range(12)]), fit_params("features")
    detector = fit_detector(network, images, params)
    (features,) = training_features(replace(detector, whitenings=(), galleries=()), images)
    expected = []
    for i in range(12):
        rest = np.delete(np.arange(12), i)
        expected += list(fit_galleries([features[rest]], params.gallery, True, 0).score([features[i : i + 1]], 2)[0])
    assert detector.calibration == pytest.approx(np.array(expected))
    assert detector.seen == set(images.keys) and len(detector.images) == 12  # none is held out
    assert detector.sessions == () and detector.threshold().sessions is None
    assert len(detector.reference.statistics) == len(detector.reference.features) == 12
    limit = detector.threshold()
    assert not limit.enough and limit.value == detector.calibration.max()
    assert limit.expected == pytest.approx(1 / 13) and "at least 19 are needed" in limit.message


@pytest.mark.parametrize("score", ["features", "heatmap", "both"])
def test_no_image_of_a_session_stands_beside_it(network, score):
    """Two lamps: seen with others of its lamp an image scores as the rest do, without them far higher."""
    sessions = ["bright" if i % 2 else "dim" for i in range(16)]
    images = DecodedImages(network, [noise(i) // (1 if i % 2 else 4) for i in range(16)])
    known = fit_detector(network, images, fit_params(score), sessions=sessions)
    mixed = fit_detector(network, images, fit_params(score))
    assert sorted(known.sessions) == sorted(sessions) and len(known.within) == 16
    if score == "features":
        assert known.within == pytest.approx(mixed.calibration)
    assert np.median(known.calibration) > np.median(known.within)
    limit = known.threshold()
    assert limit.sessions.sessions == 2 and limit.sessions.within <= limit.sessions.unseen
    assert limit.interval == limit.sessions.unseen_interval


def test_only_images_that_the_adaptation_has_not_seen_calibrate_where_it_says_so(network):
    images, params = DecodedImages(network, [noise(i) for i in range(20)]), fit_params("features")
    every = fit_detector(network, images, params)
    some = fit_detector(network, images, params, unadapted=np.arange(15, 20))
    assert some.calibration == pytest.approx(every.calibration[15:])
    assert len(some.images) == 20


def test_a_bundle_keeps_sessions(network, tmp_path):
    images = DecodedImages(network, [noise(i) for i in range(12)])
    detector = fit_detector(network, images, fit_params("both"), sessions=["a", "b", "ü c"] * 4)
    save_bundle(detector, tmp_path)
    again = load_bundle(tmp_path)
    assert again.sessions == detector.sessions and again.within.tolist() == detector.within.tolist()
    assert again.threshold() == detector.threshold()
    assert load_bundle(tmp_path, 0.2).threshold().sessions.unseen >= again.threshold().sessions.unseen
