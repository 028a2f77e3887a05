# SPDX-License-Identifier: Apache-2.0
"""Fit a detector: galleries of normal features, a localizer, and calibration, in bounded memory.

Whatever describes normal images (SES's means, the robust scales of the two scores, the calibration scores) comes from
training images scored by a model of the other folds.
An image that has shaped a model looks too normal to it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from tqdm import trange

from panda_ad.errors import UserError
from panda_ad.features.images import Images
from panda_ad.features.network import Network
from panda_ad.params import GalleryParams
from panda_ad.scoring.config import DetectorConfig, FitParams
from panda_ad.scoring.detector import Detector
from panda_ad.scoring.fit_calibration import CALIBRATED, WITHIN, OutOfFold, calibrated, out_of_fold_image_scores
from panda_ad.scoring.fit_localizer import fit_localizer, fit_scales
from panda_ad.scoring.folds import Folds, draw, split_folds
from panda_ad.scoring.gallery import Gallery, check_finite, cluster_means, compress
from panda_ad.scoring.relight import relit
from panda_ad.scoring.whitening import Whitening, fit_whitening

_BATCH = 64  # images whose activations are read together
_THUMBNAIL = 96  # pixels, longest side


def fit_detector(
    network: Network,
    train: Images,
    params: FitParams,
    config: DetectorConfig | None = None,
    classifier: Mapping[str, np.ndarray] | None = None,
    sessions: Sequence[str] = (),
    unadapted: np.ndarray | None = None,
) -> Detector:
    """Fit a detector to normal images.

    Parameters
    ----------
    network : with the adapted layers of each snapshot.
    train : normal images; all of them serve, none is held out.
    params : how to score.
    config : what the model is of (dataset, category, method, provenance); `params` decides the rest.
    classifier : outlier exposure's linear layer {weight (1, D), bias (1,)}.
        Its features are neither normalized nor whitened, as they were in its training.
    sessions : of each image; () where they are not known.
    unadapted : indices of the images that the adaptation has not seen, whose scores alone calibrate; None: all do.

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
    shown, sources = relit(train, sessions if params.gallery.relight else (), network, params.seed)
    features = training_features(empty, shown)  # per snapshot
    normal = fit_galleries(features, params.gallery, config.whiten, params.seed)
    folds = split_folds(len(train), params.seed, sessions)
    known = out_of_fold(features, folds, params.gallery, config.whiten, params.seed, sources)
    rows = sources[normal.chosen]
    detector = replace(
        empty,
        galleries=normal.galleries,
        whitenings=normal.whitenings,
        train_means=known.scores.mean(axis=1),
        images=tuple({"path": train.names[i], "sha256": train.keys[i]} for i in rows),
        thumbnails=tuple(thumbnail(train.read(int(i))) for i in rows),
        seen=frozenset(train.keys),
    )
    if params.localize.method != "none":
        last = detector.transformed(features)[-1]
        detector = replace(detector, localizer=fit_localizer(detector, shown, last, params, sources))
        if config.score == "both":
            detector = fit_scales(detector, train, last[: len(train)], known.scores, folds, params.seed)
    chosen = draw(folds, CALIBRATED, params.seed, unadapted)
    detector = calibrated(detector, train, known, chosen)
    if len(set(sessions)) < 2:
        return detector
    again = split_folds(len(train), params.seed)
    mixed = out_of_fold(features, again, params.gallery, config.whiten, params.seed, sources)
    some = draw(again, WITHIN, params.seed, chosen)
    within, _ = out_of_fold_image_scores(detector, train, mixed, some)
    return replace(detector, sessions=tuple(sessions[i] for i in chosen), within=within)


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


def out_of_fold(
    features: Sequence[np.ndarray],
    folds: Folds,
    params: GalleryParams,
    whiten: bool,
    seed: int,
    sources: np.ndarray | None = None,
) -> OutOfFold:
    """Score training images by whitening and gallery of the other folds' images alone, and of their copies.

    An image left out of the gallery only would still have shaped the whitening, which brings it
    far nearer than a new image (their spread was 0.02 to 0.5 of that of new ones on six sets).

    Parameters
    ----------
    features : per snapshot, S times (N, D), the M images' first.
    folds : of the M images.
    sources : int64 (N,), the image that each row is or is a copy of (`relight.Relit`); None: there are no copies.
    """
    count = sum(len(fold) for fold, _ in folds)
    sources = np.arange(count) if sources is None else sources
    scores = np.empty((len(features), count))
    last = np.empty_like(features[-1][:count])
    if len(folds) < 2:
        raise UserError("one normal training image is too few: a score needs others to compare with")
    for fold, rest in folds:
        others = np.isin(sources, rest)
        normal = fit_galleries([x[others] for x in features], params, whiten, seed)
        scores[:, fold] = normal.score([x[fold] for x in features], params.k)
        last[fold] = normal.whitenings[-1](features[-1][fold]) if whiten else features[-1][fold]
    return OutOfFold(folds, scores, last)


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


def thumbnail(rgb: np.ndarray) -> bytes:
    """Return an image, uint8 (H, W, 3), as JPEG bytes, at most 96 pixels a side."""
    from PIL import Image

    image = Image.fromarray(rgb)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=80)
    return out.getvalue()
