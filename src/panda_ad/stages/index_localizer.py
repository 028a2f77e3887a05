"""Of stage `index`: the localizer, and what the image score needs of it, learned from the training images."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from panda_ad.features.backbones import MICRO_BATCH, in_micro_batches
from panda_ad.scoring.detector import Detector
from panda_ad.scoring.image_score import fit_pixel_statistics, fit_robust_scale, out_of_fold_peaks
from panda_ad.stages.common import layers_needed
from panda_ad.system.paths import BUILD

if TYPE_CHECKING:
    from panda_ad.features.cache import Activations, Item
    from panda_ad.params import Params
    from panda_ad.scoring.localize.maps import Maps

_USUAL = 64  # most training images whose heat maps tell what is usual


def add_localizer(
    detector: Detector,
    activations: Activations,
    train: Sequence[Item],
    matrices: Sequence[np.ndarray],
    out_of_fold: np.ndarray | None,
    params: Params,
) -> None:
    """The localizer, and what the image score needs of it.

    Parameters
    ----------
    matrices : features of the training images under each head, S times (M, D), whitened where the model whitens.
    out_of_fold : kNN scores (S, M) of `out_of_fold_scores`; looked at with score `both` only.
    """
    from panda_ad.scoring.localize.localizer import build_localizer

    views = {layer: activations.view(train, layer) for layer in layers_needed(params)}
    tiled = gallery_tiles(detector, train, params.localize.tiles) if params.localize.tiles else None
    maps = tiled or (lambda index: gallery_maps(detector, views, index))
    detector.localizer = build_localizer(params.localize, maps, matrices[-1], params.seed)
    if params.verdict.score == "features":
        return
    normal = out_of_fold_maps(detector, maps, matrices[-1], params.seed)
    detector.usual = fit_pixel_statistics(normal)
    if params.verdict.score == "both":
        assert out_of_fold is not None
        whole = detector.combined(out_of_fold, matrices[-1])[0]
        detector.scales = (fit_robust_scale(whole), fit_robust_scale(out_of_fold_peaks(normal)))


def out_of_fold_maps(detector: Detector, maps: Maps, features: np.ndarray, seed: int) -> np.ndarray:
    """Heat maps (N, H, W) float32, on disk, of at most `_USUAL` training images, each as if the localizer had not seen it.

    Parameters
    ----------
    maps : as for `build_localizer`.  features : float32 (M, D), of the same images.
    """
    localizer = detector.localizer
    assert localizer is not None
    count, per_image = len(features), localizer.tiles**2
    chosen = np.sort(np.random.default_rng(seed).choice(count, min(count, _USUAL), replace=False))
    at_a_time = max(1, MICRO_BATCH // per_image)
    found: np.ndarray | None = None
    for start in range(0, len(chosen), at_a_time):
        images = chosen[start : start + at_a_time]
        layers = maps((images[:, None] * per_image + np.arange(per_image)).ravel())
        for j, image in enumerate(images.tolist()):
            own = {name: values[j * per_image : (j + 1) * per_image] for name, values in layers.items()}
            heatmap = localizer.without(image).heatmaps(own, features[image : image + 1], detector.size)[0]
            if found is None:  # joined maps of tiles may be larger together than memory
                with tempfile.TemporaryFile(dir=BUILD) as file:
                    found = np.memmap(file, np.float32, "w+", shape=(len(chosen), *heatmap.shape))
            found[start + j] = heatmap
    assert found is not None
    return found


def gallery_maps(detector: Detector, views: dict, index):
    """Maps {layer: float16 (B, C, h, w)} of the training images at `index`, layer3 under the last head."""
    import torch

    maps = {layer: torch.from_numpy(view[index]) for layer, view in views.items()}
    (layer3,) = in_micro_batches(lambda x: detector.heads[-1].maps(x.float())[0], maps["layer2"])
    return {**maps, "layer3": layer3.half()}


def gallery_tiles(detector: Detector, train: Sequence[Item], tiles: int) -> Maps:
    """As `gallery_maps`, of the images' tiles, `tiles`^2 for each, computed from the pixels."""
    import torch

    from panda_ad.scoring.localize.tiling import image_tiles

    @lru_cache(maxsize=1)
    def tiles_of(image: int):
        return image_tiles(train[image].read(), detector.size, tiles)

    def maps(index):
        chosen = np.arange(len(train) * tiles**2)[index]
        return detector.tile_layers(torch.stack([tiles_of(int(i) // tiles**2)[int(i) % tiles**2] for i in chosen]))

    return maps
