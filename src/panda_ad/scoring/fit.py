# SPDX-License-Identifier: Apache-2.0
"""Fit a detector: galleries of normal features, a localizer, and calibration, in bounded memory.

Whatever describes normal images (SES's means, the robust scales of the two scores) comes from training images scored
by a model of the other folds.
An image that has shaped a model looks too normal to it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from tqdm import trange

from panda_ad.errors import UserError
from panda_ad.features.image_statistics import Reference, as_float16, image_statistics, statistics_matrix
from panda_ad.features.images import Images
from panda_ad.features.network import Network
from panda_ad.params import GalleryParams
from panda_ad.scoring.config import DetectorConfig, FitParams
from panda_ad.scoring.detector import Detector
from panda_ad.scoring.fit_localizer import fit_localizer, fit_scales
from panda_ad.scoring.folds import Folds, split_folds
from panda_ad.scoring.gallery import Gallery, check_finite, cluster_means, compress
from panda_ad.scoring.verdict import Scores
from panda_ad.scoring.whitening import Whitening, fit_whitening

_BATCH = 64  # images whose activations are read together
_THUMBNAIL = 96  # pixels, longest side
_COLORED = 256  # most calibration images whose heat maps set the overlays' colors


def fit_detector(
    network: Network,
    train: Images,
    calibration: Images,
    params: FitParams,
    config: DetectorConfig | None = None,
    classifier: Mapping[str, np.ndarray] | None = None,
) -> Detector:
    """Fit a detector to normal images.

    Parameters
    ----------
    network : with the adapted layers of each snapshot.
    train : normal images.
    calibration : other normal images, which set the threshold and nothing else.
    params : how to score.
    config : what the model is of (dataset, category, method, provenance); `params` decides the rest.
    classifier : outlier exposure's linear layer {weight (1, D), bias (1,)}.
        Its features are neither normalized nor whitened, as they were in its training.

    Raises
    ------
    UserError
        Features are not finite, or `gallery.k` exceeds the gallery of all images or of four folds.
    """
    adapted = classifier is None
    config = (config or DetectorConfig()).model_copy(
        update={
            "k": params.gallery.k,
            "normalize": params.gallery.normalize and adapted,
            "whiten": params.gallery.whiten and adapted,
            "score": params.verdict.score,
            "false_alarm_rate": params.verdict.false_alarm_rate,
        }
    )
    empty = Detector(config, network, (), np.empty(0), classifier=classifier)
    features = training_features(empty, train)  # per snapshot
    folds = split_folds(len(train), params.seed)
    normal = fit_galleries(features, params.gallery, config.whiten, params.seed)
    knn = out_of_fold_scores(features, folds, params.gallery, config.whiten, params.seed)
    detector = replace(
        empty,
        galleries=normal.galleries,
        whitenings=normal.whitenings,
        train_means=knn.mean(axis=1),
        images=tuple({"path": train.names[i], "sha256": train.keys[i]} for i in normal.chosen),
        thumbnails=tuple(thumbnail(train.read(int(i))) for i in normal.chosen),
        seen=frozenset(train.keys) | frozenset(calibration.keys),
    )
    if params.localize.method != "none":
        last = detector.transformed(features)[-1]
        detector = replace(detector, localizer=fit_localizer(detector, train, last, params))
        if config.score == "both":
            detector = fit_scales(detector, train, last, knn, folds, params.seed)
    return calibrated(detector, calibration)


@dataclass(frozen=True)
class NormalFeatures:
    """Features of normal images, ready for search.

    Attributes
    ----------
    whitenings : one per snapshot, or none.
    galleries : one per snapshot.
    chosen : int64 (K,), index of the image that each gallery row is of, or nearest to.
    """

    whitenings: tuple[Whitening, ...]
    galleries: tuple[Gallery, ...]
    chosen: np.ndarray

    def score(self, features: Sequence[np.ndarray], k: int) -> np.ndarray:
        """Return kNN scores float64 (S, N) of features per snapshot, S times (N, D), not whitened."""
        white = whitened(self.whitenings, features)
        return np.stack([gallery.score(x, k) for gallery, x in zip(self.galleries, white, strict=True)])


def fit_galleries(features: Sequence[np.ndarray], params: GalleryParams, whiten: bool, seed: int) -> NormalFeatures:
    """Fit a whitening and a gallery for each snapshot to features per snapshot, S times (M, D).

    One choice of images for all snapshots, made on the last one's features, so that neighbors mean the same images.
    """
    whitenings = tuple(fit_whitening(x) for x in features) if whiten else ()
    white = whitened(whitenings, features)
    centers, chosen = compress(white[-1], params.compression, params.size, seed)
    if params.compression == "kmeans" and len(chosen) < len(white[-1]):
        filled, members = np.unique(Gallery(centers).search(white[-1], 1)[1][:, 0], return_inverse=True)
        chosen = chosen[filled]
        galleries = tuple(cluster_means(x, members) for x in white)
    else:
        galleries = tuple(Gallery(x[chosen]) for x in white)
    if params.k > len(galleries[0]):
        raise UserError(f"gallery.k: {params.k} neighbors are asked for, the gallery has {len(galleries[0])}; lower it")
    return NormalFeatures(whitenings, galleries, chosen)


def out_of_fold_scores(
    features: Sequence[np.ndarray], folds: Folds, params: GalleryParams, whiten: bool, seed: int
) -> np.ndarray:
    """Return kNN scores float64 (S, M) of training images, by whitening and gallery of the other folds' images alone.

    An image left out of the gallery only would still have shaped the whitening, which brings it
    far nearer than a new image (their spread was 0.02 to 0.5 of that of new ones on six sets).
    """
    scores = np.empty((len(features), len(features[0])))
    if len(folds) < 2:
        raise UserError("one normal training image is too few: a score needs others to compare with")
    for fold, rest in folds:
        normal = fit_galleries([x[rest] for x in features], params, whiten, seed)
        scores[:, fold] = normal.score([x[fold] for x in features], params.k)
    return scores


def whitened(whitenings: Sequence[Whitening], features: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Apply each snapshot's whitening to its features; without whitenings return them as they are."""
    return [to(x) for to, x in zip(whitenings, features, strict=True)] if whitenings else list(features)


def training_features(detector: Detector, train: Images) -> list[np.ndarray]:
    """Return features per snapshot, S times (M, D) float32, not whitened. UserError where they are not finite."""
    parts: list[list[np.ndarray]] = [[] for _ in detector.network.steps]
    for start in trange(0, len(train), _BATCH, desc="features", unit="batch", disable=None):
        at = slice(start, min(start + _BATCH, len(train)))
        activations = train.activations(at, detector.levels)
        found = detector.transformed(detector.network.features(activations, train.pretrained(at)))
        for part, values in zip(parts, found, strict=True):
            part.append(values)
    features = [np.concatenate(part) for part in parts]
    for x in features:
        check_finite(x)
    return features


def calibrated(detector: Detector, calibration: Images) -> Detector:
    """Add the calibration images' scores, what monitoring compares with, and the range of the overlays' colors."""
    tiles = detector.localizer.tiles if detector.localizer is not None else 1
    found: list[Scores] = []
    values: list[np.ndarray] = []
    peaks: list[np.ndarray] = []
    for scores in detector.score_images(calibration):
        found.append(replace(scores, heatmaps=None))
        if scores.heatmaps is not None:  # joined maps are large: of each, as many pixels as of an untiled one
            room = max(0, _COLORED - sum(len(maps) for maps in values))
            values.append(scores.heatmaps[:room, ::tiles, ::tiles].copy())
            peaks.append(scores.heatmaps.max(axis=(1, 2)))
    statistics = statistics_matrix([image_statistics(calibration.read(i)) for i in range(len(calibration))])
    reference = Reference(statistics.astype(np.float32), as_float16(np.concatenate([s.features for s in found])))
    config = detector.config
    if values:
        colors = heatmap_range(np.concatenate(values), np.concatenate(peaks))
        config = config.model_copy(update={"heatmap_range": colors})
    return replace(detector, config=config, calibration=np.concatenate([s.score for s in found]), reference=reference)


def heatmap_range(maps: np.ndarray, peaks: np.ndarray) -> tuple[float, float]:
    """Return where an overlay's color starts and where it is full, so that a good part stays nearly clear.

    Parameters
    ----------
    maps : float32 (M, h, w), of the calibration images.
    peaks : float32 (M,), their maxima.
    """
    median, peak = float(np.median(maps)), float(np.median(peaks))
    return (median + 0.8 * (peak - median), median + 2.0 * (peak - median))


def thumbnail(rgb: np.ndarray) -> bytes:
    """Return an image, uint8 (H, W, 3), as JPEG bytes, at most 96 pixels a side."""
    from PIL import Image

    image = Image.fromarray(rgb)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return out.getvalue()
