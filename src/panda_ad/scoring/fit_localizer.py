# SPDX-License-Identifier: Apache-2.0
"""Fit the localizer, and the scales of the two scores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np

from panda_ad.features.images import Images
from panda_ad.features.network import Network
from panda_ad.scoring.config import FitParams
from panda_ad.scoring.detector import Detector
from panda_ad.scoring.folds import Folds, draw
from panda_ad.scoring.image_score import fit_robust_scale, map_scores
from panda_ad.scoring.localize.localizer import Localizer, build_localizer
from panda_ad.scoring.localize.maps import Maps
from panda_ad.scoring.localize.tiling import image_tiles

_AT_A_TIME = 8  # images whose maps are made together
_MAPS = 128  # most training images whose heat maps the scale of map scores is from


def fit_localizer(
    detector: Detector, train: Images, features: np.ndarray, params: FitParams, sources: np.ndarray | None = None
) -> Localizer:
    """Fit `params.localize` to the training images.

    Parameters
    ----------
    features : float32 (N, D), the images' under the last snapshot.
    sources : int64 (N,), of M images and their copies (`relight.Relit`); None: there are no copies. SPADE compares with
        the images alone.
    """
    spade = params.localize.method == "spade"
    levels = detector.network.inner_levels if spade else detector.network.map_levels
    maps = image_maps(detector.network, train, levels, params.localize.tiles or 1)
    sources = np.arange(len(features)) if sources is None else sources
    if spade:
        sources = np.unique(sources)
    return build_localizer(params.localize, levels, maps, features[: len(sources)], params.seed, sources)


def fit_scales(
    detector: Detector, train: Images, features: np.ndarray, knn: np.ndarray, folds: Folds, seed: int
) -> Detector:
    """Add the scales of score `both`, from out-of-fold scores.

    Parameters
    ----------
    detector : with its localizer, as `fit_localizer` returned it.
    features : float32 (M, D), of the training images under the last snapshot.
    knn : float64 (S, M), their out-of-fold kNN scores.
    folds : of all training images; of at most `_MAPS` of them maps are made.
    """
    chosen = draw(folds, _MAPS, seed)
    feature_scores, _ = detector.aggregate(knn, features)
    peaks = out_of_fold_map_scores(detector, train, features, folds, chosen)
    return replace(detector, scales=(fit_robust_scale(feature_scores), fit_robust_scale(peaks)))


def out_of_fold_map_scores(
    detector: Detector, train: Images, features: np.ndarray, folds: Folds, chosen: np.ndarray
) -> np.ndarray:
    """Return map scores (N,) of the chosen images, each by the localizer without the images of its fold."""
    found = np.empty(len(chosen))
    for at, heatmaps in out_of_fold_maps(detector, train, features, folds, chosen):
        found[at] = map_scores(heatmaps)
    return found


def out_of_fold_maps(
    detector: Detector, train: Images, features: np.ndarray, folds: Folds, chosen: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield places in `chosen`, (B,), and their heat maps float32 (B, H, W), a few at a time.

    Each map is by the localizer without the images of its fold.
    """
    localizer = detector.localizer
    assert localizer is not None
    tiles = localizer.tiles**2
    maps = image_maps(detector.network, train, localizer.levels, localizer.tiles)
    at_a_time = max(1, _AT_A_TIME // tiles)
    for fold, _ in folds:
        others = localizer.without(fold)
        places = np.flatnonzero(np.isin(chosen, fold))
        for start in range(0, len(places), at_a_time):
            at = places[start : start + at_a_time]
            layers = maps((chosen[at][:, None] * tiles + np.arange(tiles)).ravel())
            yield at, others.heatmaps(layers, features[chosen[at]], detector.size)


def image_maps(network: Network, images: Images, levels: tuple[str, ...], tiles: int) -> Maps:
    """Return a function of indices that gives maps under the last snapshot.

    The indices are of the images or, with `tiles` above 1, of their `tiles`^2 tiles each.
    """
    needed = tuple(level for level in network.frozen_levels if level in {*levels, network.frozen_levels[-1]})

    def whole(index: slice | np.ndarray) -> dict[str, np.ndarray]:
        return network.maps(images.activations(index, needed), levels)

    @lru_cache(maxsize=1)
    def tiles_of(image: int) -> np.ndarray:
        return image_tiles(images.read(image), network, tiles)

    def tiled(index: slice | np.ndarray) -> dict[str, np.ndarray]:
        chosen = np.arange(len(images) * tiles**2)[index].tolist()
        pixels = np.stack([tiles_of(i // tiles**2)[i % tiles**2] for i in chosen])
        return network.maps(network.activations(pixels), levels)

    return whole if tiles == 1 else tiled
