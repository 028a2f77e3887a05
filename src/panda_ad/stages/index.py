"""Stage `index`: build a category's model, the bundle: galleries, localiser, calibration, thumbnails."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from safetensors.torch import load_file

from panda_ad import __version__
from panda_ad.adapt.snapshots import unpack_snapshots
from panda_ad.backbones import MICRO_BATCH, in_micro_batches
from panda_ad.bundle import save_bundle
from panda_ad.calibration import threshold
from panda_ad.detector import Detector, with_state
from panda_ad.errors import UserError
from panda_ad.files import atomic_folder
from panda_ad.gallery import Gallery, check_finite, cluster_means, compress, score_left_out
from panda_ad.image_score import FOLDS, fit_scale, fit_usual, left_out_peaks
from panda_ad.monitor.statistics import Reference, image_statistics, statistics_matrix
from panda_ad.params import load_params
from panda_ad.stages.common import (
    BUILD,
    activations_for,
    backbone_for,
    category_rows,
    items_of,
    layers_needed,
    raw_features,
    run_stage,
    score_items,
    threads,
)
from panda_ad.whitening import fit_whitening

if TYPE_CHECKING:
    from panda_ad.activations import Item
    from panda_ad.localize.maps import Maps

_THUMBNAIL = 96  # pixels, longest side
_USUAL = 64  # most training images whose heat maps tell what is usual


def main(category: str) -> None:
    """Write build/bundle/<category>."""
    params = load_params()
    threads()
    rows = category_rows(category)
    backbone = backbone_for(params)
    activations = activations_for(params, backbone)
    train, calibration = (items_of(rows[split], params) for split in ("train", "calibration"))
    layers = layers_needed(params)
    activations.warm([*train, *calibration], layers)

    adapted_folder = BUILD / "adapt" / category
    facts = json.loads((adapted_folder / "adapt.json").read_text())
    tensors = load_file(adapted_folder / "snapshots.safetensors")
    classifier = {k.removeprefix("classifier."): tensors.pop(k) for k in list(tensors) if k.startswith("classifier.")} or None
    states = iter(unpack_snapshots(backbone.head.state_dict(), tensors))
    steps = facts["steps"] or [0]
    config = {
        "dataset": params.dataset,
        "category": category,
        "input_size": list(params.backbone.size),
        "precision": "bf16" if str(activations.precision) == "torch.bfloat16" else "fp32",
        "scorer": "knn" if classifier is None else "logit",
        "method": facts["method"],
        "k": params.gallery.k,
        # outlier exposure's classifier was trained on features as they come
        "normalize": params.gallery.normalize and classifier is None,
        "whiten": params.gallery.whiten and classifier is None,
        "steps": steps,
        "score": params.verdict.score,
        "false_alarm_rate": params.verdict.false_alarm_rate,
        "provenance": {
            "panda_ad": __version__,
            "backbone": params.backbone.name,
            "weights": params.backbone.weights,
            "fingerprint": backbone.fingerprint,
            "train_images": len(train),
            "calibration_images": len(calibration),
            "collapsed_at": facts["collapsed_at"],
            "adaptation": facts["provenance"],
        },
    }
    heads = [backbone.head if step == 0 else with_state(backbone.head, next(states)) for step in steps]
    detector = Detector(config, backbone, heads, [], np.empty(0), classifier)

    features: list[list[np.ndarray]] = [[] for _ in heads]
    raw = raw_features(category)
    at = 0
    for batch in activations.batches(train, ("layer2",)):
        known = raw[rows["train"].index[at : at + len(batch["layer2"])]]
        for s, part in enumerate(detector.features(batch["layer2"], known)[0]):
            features[s].append(part)
        at += len(known)
    matrices = [np.concatenate(parts) for parts in features]  # S times (M, D)
    for matrix in matrices:
        check_finite(matrix)
    plain = matrices
    if config["whiten"]:
        detector.whitenings = [fit_whitening(matrix) for matrix in matrices]
        matrices = [whiten(matrix) for whiten, matrix in zip(detector.whitenings, matrices, strict=True)]
    # one choice of images for all snapshots, made on the last one's features, so that neighbours mean the same images
    centres, kept = compress(matrices[-1], params.gallery.compression, params.gallery.size, params.seed)
    members = None
    if params.gallery.compression == "kmeans" and len(kept) < len(train):
        filled, members = np.unique(Gallery(centres).search(matrices[-1], 1)[1][:, 0], return_inverse=True)
        kept = kept[filled]
    for matrix in matrices:
        gallery, mean = fit_gallery(matrix, kept, members, params.gallery.k)
        detector.galleries.append(gallery)
        detector.train_means = np.append(detector.train_means, mean)
    chosen = rows["train"].iloc[kept]
    detector.images = [{"path": path, "sha256": key} for path, key in zip(chosen["path"], chosen["sha256"], strict=True)]
    detector.thumbnails = [thumbnail(train[i].read()) for i in kept]

    if params.localize.method != "none":
        from panda_ad.localize import build_localizer

        views = {layer: activations.view(train, layer) for layer in layers}
        tiled = gallery_tiles(detector, train, params.localize.tiles) if params.localize.tiles else None
        maps = tiled or (lambda index: gallery_maps(detector, views, index))
        detector.localizer = build_localizer(params.localize, maps, matrices[-1], params.seed)
        if params.verdict.score != "features":
            normal = left_out_maps(detector, maps, matrices[-1], params.seed)
            detector.usual = fit_usual(normal)
        if params.verdict.score == "both":
            whole = detector.combined(left_out_scores(plain, config["whiten"], params.gallery.k, params.seed), matrices[-1])[0]
            detector.scales = (fit_scale(whole), fit_scale(left_out_peaks(normal)))

    every = params.localize.tiles or 1
    held_out, usual, peaks = [], [], []
    for scores in score_items(detector, activations, calibration, layers):
        held_out.append(replace(scores, heatmaps=None))
        if scores.heatmaps is not None:  # joined maps are large: of each, as many pixels as of an untiled one
            usual.append(scores.heatmaps[:, ::every, ::every].copy())
            peaks.append(scores.heatmaps.max(axis=(1, 2)))
    detector.calibration = np.concatenate([part.score for part in held_out])
    statistics = statistics_matrix([image_statistics(item.read()) for item in calibration])
    detector.reference = Reference(statistics.astype(np.float32), np.concatenate([part.features for part in held_out]).astype(np.float16))
    if detector.localizer is not None:
        config["heatmap_range"] = heatmap_range(np.concatenate(usual), np.concatenate(peaks))
    limit = threshold(detector.calibration, params.verdict.false_alarm_rate)
    with atomic_folder(BUILD / "bundle" / category) as folder:
        save_bundle(detector, folder)
    print(f"{category}: {len(train)} normal images, {len(heads)} snapshot(s), threshold {limit.value:.4g}" + (f"; {limit.message}" if limit.message else ""))


def fit_gallery(features: np.ndarray, kept: np.ndarray, members: np.ndarray | None, k: int) -> tuple[Gallery, float]:
    """Gallery of the training features (M, D), and the mean score of normal images that are not their own neighbours.

    Parameters
    ----------
    kept : images that the gallery consists of, or that stand for its clusters.
    members : (M,) cluster of each image, where the gallery consists of clusters' means.
    """
    if len(kept) == len(features):
        gallery = Gallery(features[kept])
        return gallery, float(gallery.leave_one_out(k).mean())
    if members is None:
        gallery = Gallery(features[kept])
        rest = np.delete(np.arange(len(features)), kept)
        return gallery, float(gallery.score(features[rest], k).mean())
    gallery = cluster_means(features, members)
    scores = score_left_out(gallery, features, members, k)
    if not np.isfinite(scores).any():
        raise UserError(f"gallery.k: {k} neighbours are asked for, the gallery has {len(gallery)} clusters of one image each; lower it")
    return gallery, float(scores[np.isfinite(scores)].mean())


def left_out_scores(matrices: Sequence[np.ndarray], whiten: bool, k: int, seed: int) -> np.ndarray:
    """kNN scores (S, M) of training images, by whitening and gallery of the other folds' images alone.

    An image left out of the gallery only would still have shaped the whitening, which brings it
    far nearer than a new image (their spread was 0.02 to 0.5 of that of new ones on six sets).

    Parameters
    ----------
    matrices : S times (M, D) float32, features under each head, not whitened.
    """
    count = len(matrices[0])
    order = np.random.default_rng(seed).permutation(count)
    scores = np.empty((len(matrices), count))
    for fold in np.array_split(order, min(FOLDS, count)):
        rest = np.setdiff1d(order, fold)
        for s, matrix in enumerate(matrices):
            transform = fit_whitening(matrix[rest]) if whiten else (lambda x: x)
            scores[s, fold] = Gallery(transform(matrix[rest])).score(transform(matrix[fold]), min(k, len(rest)))
    return scores


def left_out_maps(detector: Detector, maps: Maps, features: np.ndarray, seed: int) -> np.ndarray:
    """Heat maps (N, H, W) float32 of at most `_USUAL` training images, each as if the localiser had not seen it.

    Parameters
    ----------
    maps : as for `build_localizer`.  features : float32 (M, D), of the same images.
    """
    localizer = detector.localizer
    assert localizer is not None
    count, per_image = len(features), localizer.tiles**2
    chosen = np.sort(np.random.default_rng(seed).choice(count, min(count, _USUAL), replace=False))
    at_a_time = max(1, MICRO_BATCH // per_image)
    found = []
    for start in range(0, len(chosen), at_a_time):
        images = chosen[start : start + at_a_time]
        layers = maps((images[:, None] * per_image + np.arange(per_image)).ravel())
        for j, image in enumerate(images.tolist()):
            own = {name: values[j * per_image : (j + 1) * per_image] for name, values in layers.items()}
            found.append(localizer.without(image).heatmaps(own, features[image : image + 1], detector.size)[0])
    return np.stack(found)


def gallery_maps(detector: Detector, views: dict, index):
    """Maps {layer: float16 (B, C, h, w)} of the training images at `index`, layer3 under the last head."""
    import torch

    maps = {layer: torch.from_numpy(view[index]) for layer, view in views.items()}
    (layer3,) = in_micro_batches(lambda x: detector.heads[-1].maps(x.float())[0], maps["layer2"])
    return {**maps, "layer3": layer3.half()}


def gallery_tiles(detector: Detector, train: Sequence[Item], tiles: int) -> Maps:
    """As `gallery_maps`, of the images' tiles, `tiles`^2 for each, computed from the pixels."""
    import torch

    from panda_ad.localize.tiling import image_tiles

    @lru_cache(maxsize=1)
    def tiles_of(image: int):
        return image_tiles(train[image].read(), detector.size, tiles)

    def maps(index):
        chosen = np.arange(len(train) * tiles**2)[index]
        return detector.tile_layers(torch.stack([tiles_of(int(i) // tiles**2)[int(i) % tiles**2] for i in chosen]))

    return maps


def heatmap_range(maps: np.ndarray, peaks: np.ndarray) -> list[float]:
    """Where an overlay's colour starts and where it is full, from the calibration images' maps (M, h, w) and their maxima (M,).

    A good part stays nearly clear.
    """
    usual, peak = float(np.median(maps)), float(np.median(peaks))
    return [usual + 0.8 * (peak - usual), usual + 2.0 * (peak - usual)]


def thumbnail(rgb: np.ndarray) -> bytes:
    """uint8 (H, W, 3) -> JPEG bytes of at most 96 pixels a side."""
    from PIL import Image

    image = Image.fromarray(rgb)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return out.getvalue()


if __name__ == "__main__":
    run_stage("index", main)
