# SPDX-License-Identifier: Apache-2.0
"""The detector: scores images. Evaluation, command line, REST and UI all go through it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from panda_ad.errors import UserError
from panda_ad.features.image_statistics import Reference
from panda_ad.features.images import Images
from panda_ad.features.network import Network
from panda_ad.scoring.calibration import Threshold, p_values, threshold
from panda_ad.scoring.config import DetectorConfig
from panda_ad.scoring.gallery import Gallery
from panda_ad.scoring.image_score import RobustScale, image_scores, map_scores
from panda_ad.scoring.localize.localizer import Localizer
from panda_ad.scoring.ses import ses_scores
from panda_ad.scoring.verdict import Scores, Verdict, region, resize_map
from panda_ad.scoring.whitening import Whitening
from panda_ad.system.cores import side_by_side

_BATCH = 64  # images whose activations are read together


@dataclass(frozen=True, eq=False)
class Detector:
    """A fitted model, as `fit_detector` and `load_bundle` return it.

    Attributes
    ----------
    config : how it scores, and what it is of.
    network : makes activations, features and maps of images.
    galleries : per snapshot, features of the normal training images, normalized and whitened as those of any image.
    train_means : float64 (S,), mean out-of-fold score of the training images per snapshot; SES divides by it.
    whitenings : one per snapshot, fitted on the training images; empty: none.
    classifier : outlier exposure's linear layer {weight (1, D), bias (1,)}, float32, else None.
    localizer : makes heat maps; None without.
    scales : of the feature score and of the map score, for score 'both'.
    calibration : float64 (M,), scores of normal images by models that have not seen them; with sessions, their session.
    sessions : of each of these; () where fewer than two are known.
    within : float64 (W,), scores by models that have seen others of their session; empty without sessions.
    reference : what these images are like; None in bundles from before monitoring.
    images : path and sha256 of each gallery image.
    thumbnails : its picture as JPEG bytes.
    seen : sha256 (hex) of the files of all training and calibration images; empty in bundles from before.
    """

    config: DetectorConfig
    network: Network
    galleries: tuple[Gallery, ...]
    train_means: np.ndarray
    whitenings: tuple[Whitening, ...] = ()
    classifier: Mapping[str, np.ndarray] | None = None
    localizer: Localizer | None = None
    scales: tuple[RobustScale, RobustScale] | None = None
    calibration: np.ndarray = field(default_factory=lambda: np.empty(0))
    sessions: tuple[str, ...] = ()
    within: np.ndarray = field(default_factory=lambda: np.empty(0))
    reference: Reference | None = None
    images: tuple[dict[str, str], ...] = ()
    thumbnails: tuple[bytes, ...] = ()
    seen: frozenset[str] = frozenset()

    @property
    def size(self) -> tuple[int, int]:
        """Network input (height, width), pixels."""
        return self.network.size

    @property
    def levels(self) -> tuple[str, ...]:
        """Levels of the frozen activations that scoring reads."""
        compared = self.localizer.levels if self.localizer is not None else ()
        wanted = {self.network.frozen_levels[-1], *compared}
        return tuple(level for level in self.network.frozen_levels if level in wanted)

    def threshold(self, rate: float | None = None) -> Threshold:
        """Return the threshold for a false-alarm rate, by default the bundle's; another rate needs no retraining."""
        rate = self.config.false_alarm_rate if rate is None else rate
        return threshold(self.calibration, rate, sessions=self.sessions, within=self.within)

    def score(self, images: Sequence[np.ndarray], heatmaps: bool = False) -> list[Verdict]:
        """Score decoded images, uint8 (H, W, 3) of any size. An image's verdict does not depend on the others."""

        def one(image: np.ndarray) -> Verdict:
            activations = self.network.activations(self.network.preprocess([image]))
            scores = self.score_activations(activations, heatmaps=heatmaps, pixels=[image])
            return self.verdicts(scores, [image.shape[:2]])[0]

        return side_by_side(one, images, _one_thread)

    def score_images(self, images: Images, heatmaps: bool = True) -> Iterator[Scores]:
        """Score images batch by batch, with heat maps where the model has a localizer and they are asked for.

        Tiles are computed from the pixels; a batch holds as many tiles as it would images.
        """
        from tqdm import tqdm

        batch = _BATCH if self.localizer is None else max(1, _BATCH // self.localizer.tiles**2)
        with tqdm(total=len(images), desc="score", unit="img", disable=None) as bar:
            for i in range(0, len(images), batch):
                at = slice(i, min(i + batch, len(images)))
                yield self._score_batch(images, at, heatmaps)
                bar.update(at.stop - at.start)

    def _score_batch(self, images: Images, at: slice, heatmaps: bool) -> Scores:
        """Score images of a range, each alone and side by side."""
        activations, pretrained = images.activations(at, self.levels), images.pretrained(at)

        def one(i: int) -> Scores:
            row = slice(i, i + 1)
            alone = {level: values[row] for level, values in activations.items()}
            pixels = (images.read(at.start + j) for j in (i,))  # read where there are tiles
            return self.score_activations(alone, None if pretrained is None else pretrained[row], heatmaps, pixels)

        return joined(side_by_side(one, range(at.stop - at.start), _one_thread))

    def score_activations(
        self,
        activations: Mapping[str, np.ndarray],
        pretrained: np.ndarray | None = None,
        heatmaps: bool = False,
        pixels: Iterable[np.ndarray] = (),
    ) -> Scores:
        """Score images by their frozen activations, float16 (N, C, h, w) per level of `levels`.

        Parameters
        ----------
        activations : level name to array.
        pretrained : float32 (N, D), features under the pretrained layers where they are known already.
        heatmaps : whether they are wanted; they are computed where the score needs them as well, and then not given.
        pixels : uint8 (H, W, 3) each, read only for heat maps from tiles.

        Raises
        ------
        UserError
            A score is not finite: the model is damaged.
        """
        localizer = self.localizer if heatmaps or self.config.score != "features" else None
        maps: np.ndarray | None = None
        if localizer is not None and localizer.tiles == 1:
            plain, layers = self.network.features_and_maps(activations, localizer.levels, pretrained)
            features = self.transformed(plain)
            maps = localizer.heatmaps(layers, features[-1], self.size)
        else:
            features = self.transformed(self.network.features(activations, pretrained))
            if localizer is not None:
                maps = self._tiled_heatmaps(localizer, pixels, features[-1])
        feature_score, snapshot, neighbors, distances = self.score_features(features)
        map_score = None if maps is None else map_scores(maps)
        score = image_scores(self.config.score, feature_score, map_score, self.scales)
        if not np.isfinite(score).all():
            raise UserError(
                f"category {self.config.category}: a score is not a finite number; the model is damaged, retrain it"
            )
        shown = maps if heatmaps else None
        return Scores(score, snapshot, neighbors, distances, features[-1], shown, feature_score, map_score)

    def distinct(self, neighbors: np.ndarray) -> list[int]:
        """Return those of neighbors, (k,), that are in the gallery; of an image and its copies the nearest alone."""
        first: dict[str, int] = {}
        for k in neighbors:
            if 0 <= k < len(self.images):
                first.setdefault(self.images[k].get("sha256", str(k)), int(k))
        return list(first.values())

    def transformed(self, features: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Normalize and whiten features per snapshot, S times (N, D) float32, each where the model was built so."""
        out = [normalize(x) for x in features] if self.config.normalize else list(features)
        return [whiten(x) for whiten, x in zip(self.whitenings, out, strict=True)] if self.whitenings else out

    def score_features(self, features: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return score (N,), deciding snapshot (N,), neighbors (N, k), distances (N, k) of `transformed` features."""
        k = min(self.config.k, *(len(g.features) for g in self.galleries))
        found = [gallery.search(f, k) for gallery, f in zip(self.galleries, features, strict=True)]
        distances, neighbors = (np.stack(part) for part in zip(*found, strict=True))  # (S, N, k)
        score, decided = self.aggregate(distances.sum(axis=2), features[-1])
        rows = np.arange(len(score))
        return score, decided, neighbors[decided, rows], distances[decided, rows]

    def aggregate(self, knn: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the feature score (N,) over snapshots and the deciding snapshot (N,).

        Parameters
        ----------
        knn : float64 (S, N), kNN scores under each snapshot.
        features : float32 (N, D), under the last; outlier exposure's classifier reads them.
        """
        if self.classifier is not None:
            weight, bias = (self.classifier[name].astype(np.float64) for name in ("weight", "bias"))
            # one row at a time, so that the sum's order does not depend on the batch
            score = np.array([row.astype(np.float64) @ weight[0] + bias[0] for row in features])
            return score, np.full(len(score), len(knn) - 1)
        if len(knn) == 1:
            return knn[0], np.zeros(len(knn[0]), dtype=np.int64)
        return ses_scores(knn, self.train_means)

    def _tiled_heatmaps(self, localizer: Localizer, images: Iterable[np.ndarray], features: np.ndarray) -> np.ndarray:
        from panda_ad.scoring.localize.tiling import image_tiles

        parts = []
        for i, image in enumerate(images):
            tiles = image_tiles(image, self.network, localizer.tiles)
            maps = self.network.maps(self.network.activations(tiles), localizer.levels)
            parts.append(localizer.heatmaps(maps, features[i : i + 1], self.size))
        return np.concatenate(parts)

    def components(self, scores: Scores) -> np.ndarray | None:
        """Return the components of each score, (N, 2) float64, as in `Verdict.components`; None unless it is 'both'."""
        if self.scales is None or scores.map_score is None:
            return None
        return np.stack([self.scales[0](scores.feature_score), self.scales[1](scores.map_score)], axis=1)

    def verdicts(self, scores: Scores, sizes: Sequence[tuple[int, ...]]) -> list[Verdict]:
        """Return scores with p-values and decisions; heat maps are brought to `sizes`, each (H, W) in pixels."""
        p = p_values(self.calibration, scores.score)
        limit = self.threshold().value
        components = self.components(scores)
        verdicts = []
        for i, size in enumerate(sizes):
            heatmap = None if scores.heatmaps is None else resize_map(scores.heatmaps[i], size)
            verdicts.append(
                Verdict(
                    float(scores.score[i]),
                    float(p[i]),
                    bool(scores.score[i] > limit),
                    heatmap,
                    None if heatmap is None else region(heatmap),
                    scores.features[i],
                    None if components is None else (float(components[i, 0]), float(components[i, 1])),
                )
            )
        return verdicts


def normalize(features: np.ndarray) -> np.ndarray:
    """Scale rows (N, D) to unit L2 norm, float32; a zero row stays zero."""
    return np.asarray(features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12))


def joined(parts: Sequence[Scores]) -> Scores:
    """Return scores of several sets of images as those of one."""
    columns: dict[str, Any] = {}
    for name in Scores.__dataclass_fields__:
        values = [getattr(part, name) for part in parts]
        columns[name] = None if values[0] is None else np.concatenate(values)
    return Scores(**columns)


def _one_thread() -> None:
    """Let faiss stay in the thread that calls it, where images are scored side by side."""
    import faiss

    faiss.omp_set_num_threads(1)
