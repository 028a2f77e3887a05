# SPDX-License-Identifier: Apache-2.0
"""A gallery as data: after any changes the model is, to the digit, the one that is fitted to that set."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from conftest import REPO, noise
from hypothesis import given, settings
from hypothesis import strategies as st
from inspect_site import part, scratched

from panda_ad.errors import UserError
from panda_ad.features.backbones import load_backbone
from panda_ad.features.cache import Activations, Item
from panda_ad.features.export import export_network
from panda_ad.features.images import CachedImages, DecodedImages
from panda_ad.params_file import load_params
from panda_ad.scoring.config import DetectorConfig, FitParams
from panda_ad.scoring.fit import fit_detector
from panda_ad.scoring.refit import Change, checked, members, refit, taken_back
from panda_ad.scoring.suspects import suspicion

PIXELS = [noise(i) for i in range(14)]
KEYS = list(DecodedImages(None, PIXELS).keys)  # type: ignore[arg-type]
TRAINED = KEYS[:9]
PROBES = [noise(100 + i) for i in range(2)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model of the first nine pictures, how it is fitted, and a cache of all their activations."""
    network = export_network(load_backbone("embedded"), (32, 32))
    own = load_params(REPO / "params.yaml")
    localize = own.localize.model_copy(update={"memory_limit": 50})
    fit = FitParams(gallery=own.gallery, localize=localize, verdict=own.verdict)
    config = DetectorConfig(category="nut")
    detector = fit_detector(network, DecodedImages(network, PIXELS[: len(TRAINED)]), fit, config)
    cache = Activations(network, tmp_path_factory.mktemp("cache"), 1.0)
    return detector, fit, cache


def cached(cache: Activations, keys: list[str]) -> CachedImages:
    items = [Item(key, functools.partial(PIXELS.__getitem__, KEYS.index(key))) for key in keys]
    cache.warm(items, cache.network.frozen_levels)
    return CachedImages(cache, items, [str(i) for i in range(len(items))])


def figures(detector) -> tuple:
    """Everything that a verdict depends on, and verdicts."""
    verdicts = detector.score(PROBES, heatmaps=True)
    return (
        [v.score for v in verdicts], [v.heatmap.tobytes() for v in verdicts], detector.threshold().value,
        detector.calibration.tolist(), detector.scales, detector.train_means.tolist(),
        [image["sha256"] for image in detector.images], detector.thumbnails, sorted(detector.seen),
    )  # fmt: skip


def walk(steps: list[tuple[str, int]]) -> tuple[list[Change], set[str]]:
    """Take the steps that are allowed; return their log, and the set that sets with a history of their own come to."""
    log: list[Change] = []
    history = [frozenset(TRAINED)]
    for what, number in steps:
        key = KEYS[number]
        if what == "undo":
            if len(history) > 1:
                log.append(Change(what="undo", images=taken_back(log).images))
                history.pop()
        elif (key in history[-1]) == (what == "remove") and (what == "add" or len(history[-1] & set(TRAINED)) > 5):
            log.append(Change(what=what, images=(key,)))  # type: ignore[arg-type]
            history.append(history[-1] ^ {key})
    return log, set(history[-1])


STEPS = st.lists(st.tuples(st.sampled_from(["add", "remove", "undo"]), st.integers(0, len(KEYS) - 1)), max_size=12)


@settings(max_examples=6)
@given(steps=STEPS)
def test_changes_lead_to_the_model_of_their_set(model, steps):
    detector, fit, cache = model
    log, wanted = walk(steps)
    keys = members(TRAINED, log)
    assert set(keys) == wanted and len(keys) == len(wanted)
    changed = detector
    for so_far in (log[: len(log) // 2], log):  # what a model was on the way leaves no trace
        now = members(TRAINED, so_far)
        calibrating = np.flatnonzero([key in TRAINED for key in now])
        changed = refit(changed, cached(cache, now), fit, calibrating)
    pixels = [PIXELS[KEYS.index(key)] for key in keys]
    anew = fit_detector(
        detector.network, DecodedImages(detector.network, pixels), fit, DetectorConfig(category="nut"), None, (),
        calibrating,
    )  # fmt: skip
    assert figures(changed) == figures(anew)
    if wanted == set(TRAINED):
        assert figures(changed) == figures(detector), "back where it was trained"


@given(steps=STEPS)
@settings(max_examples=200)
def test_a_log_and_sets_with_a_history_agree(steps):
    log, wanted = walk(steps)
    held = members(TRAINED, log)
    assert set(held) == wanted
    assert held == [k for k in TRAINED if k in wanted] + sorted(wanted - set(TRAINED)), "the order is the set's"


def test_added_images_do_not_calibrate_and_their_neighbors_become_normal(model):
    detector, fit, cache = model
    keys = members(TRAINED, [Change(what="add", images=(KEYS[12],))])
    changed = refit(detector, cached(cache, keys), fit, np.arange(len(TRAINED)))
    assert len(changed.calibration) == len(detector.calibration) == len(TRAINED)
    assert KEYS[12] in changed.seen and changed.config.provenance["train_images"] == 10
    (before,), (after,) = detector.score([PIXELS[12]]), changed.score([PIXELS[12]])
    assert after.score < before.score


def test_changes_that_make_no_sense_are_refused(model):
    detector, fit, cache = model
    add = Change(what="add", images=(KEYS[12],))
    with pytest.raises(UserError, match="is in the gallery already"):
        checked(TRAINED, [add], "add", [KEYS[12]])
    with pytest.raises(UserError, match="is not in the gallery"):
        checked(TRAINED, [add, Change(what="undo", images=add.images)], "remove", [KEYS[12]])
    with pytest.raises(UserError, match="name an image"):
        checked(TRAINED, [], "add", [])
    with pytest.raises(UserError, match="no change of this gallery is left"):
        taken_back([add, Change(what="undo", images=add.images)])
    with pytest.raises(UserError, match="none of the images that the model was trained on is left"):
        refit(detector, cached(cache, [KEYS[12]]), fit, np.empty(0, np.int64))


def test_what_is_not_like_the_others_is_suspected_first(model):
    detector, fit, cache = model
    pixels = [scratched(i) if i in (4, 17, 23) else part(i) for i in range(30)]
    found = suspicion(detector, DecodedImages(detector.network, pixels), fit)
    assert found.shape == (30,) and set(np.argsort(-found)[:3]) == {4, 17, 23}
