"""The detector: scores images. Evaluation, command line, REST and UI all go through it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from panda_ad.errors import UserError
from panda_ad.features.backbones import AdaptedLayers, Backbone, frozen_activations, in_micro_batches, preprocess
from panda_ad.features.image_statistics import Reference
from panda_ad.scoring.calibration import Threshold, p_values, threshold
from panda_ad.scoring.gallery import Gallery
from panda_ad.scoring.image_score import PixelStatistics, RobustScale, image_scores
from panda_ad.scoring.ses import ses_scores
from panda_ad.scoring.whitening import Whitening

if TYPE_CHECKING:
    from panda_ad.scoring.localize.localizer import Localizer

_TILES = 32  # tiles of several images computed together, where an image has fewer


@dataclass(frozen=True)
class Verdict:
    """What a user gets for one image.

    Attributes
    ----------
    score : anomaly score, higher is more anomalous, raw and unclamped.
    p_value : share of good parts expected to score at least as high, in (0, 1] (conformal).
    anomalous : whether the score is above the threshold for the false-alarm budget.
    snapshot : index of the head that decided (SES: the one with the largest normalized score).
    neighbors : (gallery index, squared distance) of the nearest normal images, nearest first.
    heatmap : float32 (H, W) at the image's size, higher is more anomalous; None if not asked for or not built.
    region : the part of the heat map that stands out most, (x0, y0, x1, y1) in pixels, end exclusive; None without a heat map.
    features : float32 (D,), pooled, under the last head.
    parts : (whole image, worst spot), whose sum is the score: robust standard deviations above what is usual; None unless the score is 'both'.
    """

    score: float
    p_value: float
    anomalous: bool
    snapshot: int
    neighbors: list[tuple[int, float]]
    heatmap: np.ndarray | None = None
    region: tuple[int, int, int, int] | None = None
    features: np.ndarray | None = field(default=None, compare=False, repr=False)
    parts: tuple[float, float] | None = None


@dataclass(frozen=True)
class Scores:
    """Scores of N images with their evidence.

    Attributes
    ----------
    score : (N,) float64.  snapshot : (N,) int64.  neighbors, distances : (N, k) int64 and float64, of the deciding snapshot.
    whole, peaks : (N,) float64, what `score` is made of: the pooled features' score, and the heat maps' peaks (`PixelStatistics.peaks`; None without maps).
    features : (N, D) float32, of the last head.
    heatmaps : float32 (N, h, w) at network input size, of joined tiles larger (`tiling.grid`), or None.
    """

    score: np.ndarray
    snapshot: np.ndarray
    neighbors: np.ndarray
    distances: np.ndarray
    features: np.ndarray
    heatmaps: np.ndarray | None
    whole: np.ndarray
    peaks: np.ndarray | None


@dataclass
class Detector:
    """A fitted model.

    Attributes
    ----------
    config : the content of bundle.json: dataset, category, input_size, precision, scorer ('knn' or 'logit'), k, normalize, whiten,
        steps, score ('features', 'heatmap' or 'both'), false_alarm_rate, provenance.
    heads : one per snapshot, in the order of `config["steps"]`.
    galleries : features of the normal training images under each head, normalized and whitened as those of any image.
    whitenings : one per head, fitted on these images; empty: none.
    train_means : (S,) mean leave-one-out score of normal training images under each head; SES divides by it.
    classifier : outlier exposure's linear head {weight (1, D), bias (1,)}, else None.
    calibration : (M,) scores of the calibration set.  reference : what these images are like; None in bundles from before monitoring.
    images : path and sha256 of each gallery image.  thumbnails : its picture as JPEG bytes.
    usual : what the heat maps of normal images show at each place; None without a localizer and in bundles from before.
    scales : of the pooled features' scores and of the heat maps' peaks, for score 'both'.
    seen : sha256 (hex) of the files of all training and calibration images; empty in bundles from before.
    """

    config: dict[str, Any]
    backbone: Backbone
    heads: list[AdaptedLayers]
    galleries: list[Gallery]
    train_means: np.ndarray
    classifier: dict[str, Tensor] | None = None
    calibration: np.ndarray = field(default_factory=lambda: np.empty(0))
    localizer: Localizer | None = None
    images: list[dict[str, str]] = field(default_factory=list)
    thumbnails: list[bytes] = field(default_factory=list)
    whitenings: list[Whitening] = field(default_factory=list)
    reference: Reference | None = None
    usual: PixelStatistics | None = None
    scales: tuple[RobustScale, RobustScale] | None = None
    seen: frozenset[str] = frozenset()

    @property
    def size(self) -> tuple[int, int]:
        """Network input (height, width), pixels."""
        return (self.config["input_size"][0], self.config["input_size"][1])

    @property
    def precision(self) -> torch.dtype:
        """The frozen layers's precision at training; kept when served elsewhere, so that scores keep their scale."""
        return {"bf16": torch.bfloat16, "fp32": torch.float32}[self.config["precision"]]

    def threshold(self, rate: float | None = None) -> Threshold:
        """Threshold for a false-alarm rate, by default the bundle's. A change of rate needs no retraining."""
        return threshold(self.calibration, self.config["false_alarm_rate"] if rate is None else rate)

    def features(
        self, layer2: Tensor, raw: np.ndarray | None = None, maps: bool = False
    ) -> tuple[list[np.ndarray], Tensor | None]:
        """Features of N images under each head: pooled, then L2-normalized, then whitened, the latter two where the model was built so.

        Parameters
        ----------
        layer2 : frozen activations (N, C2, h, w).
        raw : float32 (N, D), features under the unadapted head where they are known already (stage `extract`).
        maps : whether layer3 of the last head is wanted as well.

        Returns
        -------
        S arrays (N, D) float32, and layer3 (N, C3, h/2, w/2) or None.
        """
        out: list[np.ndarray] = []
        layer3 = None
        for head, step in zip(self.heads, self.config["steps"], strict=True):
            if maps and head is self.heads[-1]:
                pooled, layer3 = in_micro_batches(lambda x, head=head: _pooled_and_layer3(head, x), layer2)
            elif raw is not None and step == 0:
                pooled = torch.from_numpy(raw)
            else:
                (pooled,) = in_micro_batches(lambda x, head=head: head(x.float()), layer2)
            out.append(normalize(pooled.numpy()) if self.config["normalize"] else pooled.numpy())
        if self.whitenings:
            out = [whiten(x) for whiten, x in zip(self.whitenings, out, strict=True)]
        return out, layer3

    def score_features(self, features: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Features under each head, S times (N, D) -> score (N,), deciding snapshot (N,), neighbors (N, k), distances (N, k)."""
        k = min(self.config["k"], *(len(g.features) for g in self.galleries))
        found = [gallery.search(f, k) for gallery, f in zip(self.galleries, features, strict=True)]
        distances, neighbors = (np.stack(part) for part in zip(*found, strict=True))  # (S, N, k)
        score, decided = self.combined(distances.sum(axis=2), features[-1])
        rows = np.arange(len(score))
        return score, decided, neighbors[decided, rows], distances[decided, rows]

    def combined(self, knn: np.ndarray, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """kNN scores under each head (S, N), and features (N, D) under the last -> score (N,) and deciding snapshot (N,)."""
        if self.classifier is not None:
            weight, bias = (self.classifier[name].double().numpy() for name in ("weight", "bias"))
            # one row at a time, so that the sum's order does not depend on the batch
            score = np.array([row.astype(np.float64) @ weight[0] + bias[0] for row in features])
            return score, np.full(len(score), len(self.heads) - 1)
        if len(self.heads) == 1:
            return knn[0], np.zeros(len(knn[0]), dtype=np.int64)
        return ses_scores(knn, self.train_means)

    def score_activations(
        self,
        layer2: Tensor,
        layer1: Tensor | None = None,
        raw: np.ndarray | None = None,
        heatmaps: bool = False,
        images: Iterable[np.ndarray] = (),
    ) -> Scores:
        """Score images by their frozen activations, float16 (N, C, h, w).

        `layer1` is needed only where the localizer uses it; `raw` as in `features`; `images`, their pixels, are read only for heat maps from tiles.
        Heat maps are computed where they are asked for or the score needs them, and given where they are asked for.
        """
        method = self.config["score"]
        localizer = self.localizer if heatmaps or method != "features" else None
        features, layer3 = self.features(layer2, raw, maps=localizer is not None and localizer.tiles == 1)
        whole, snapshot, neighbors, distances = self.score_features(features)
        maps = None
        if localizer is not None and layer3 is not None:
            layers = {"layer2": layer2, "layer3": layer3.half()} | ({} if layer1 is None else {"layer1": layer1})
            maps = localizer.heatmaps(layers, features[-1], self.size)
        elif localizer is not None:
            maps = self._tiled_heatmaps(localizer, images, features[-1])
        peaks = None if maps is None or self.usual is None else self.usual.peaks(maps)
        score = image_scores(method, whole, peaks, self.scales)
        if not np.isfinite(score).all():
            raise UserError(
                f"category {self.config['category']}: a score is not a finite number; the model is damaged, retrain it"
            )
        return Scores(score, snapshot, neighbors, distances, features[-1], maps if heatmaps else None, whole, peaks)

    def tile_layers(self, tiles: Tensor) -> dict[str, Tensor]:
        """What the localizer compares of tiles (T, 3, h, w), preprocessed: float16 layer2 and, under the last head, layer3."""
        _, layer2 = frozen_activations(self.backbone, tiles, self.precision)
        (layer3,) = in_micro_batches(lambda x: self.heads[-1].layer3(x.float()), layer2)
        return {"layer2": layer2, "layer3": layer3.half()}

    def _tiled_heatmaps(self, localizer: Localizer, images: Iterable[np.ndarray], features: np.ndarray) -> np.ndarray:
        from panda_ad.scoring.localize.tiling import image_tiles

        step, parts, rest = max(1, _TILES // localizer.tiles**2), [], iter(images)
        for i in range(0, len(features), step):
            tiles = torch.cat([image_tiles(image, self.size, localizer.tiles) for image in islice(rest, step)])
            parts.append(localizer.heatmaps(self.tile_layers(tiles), features[i : i + step], self.size))
        return np.concatenate(parts)

    def score(self, images: Sequence[np.ndarray], heatmaps: bool = False) -> list[Verdict]:
        """Score decoded images, uint8 (H, W, 3) of any size. An image's verdict does not depend on the others."""
        if not images:
            return []
        x = torch.stack([preprocess(image, self.size) for image in images])
        layer1, layer2 = frozen_activations(self.backbone, x, self.precision)
        return self.verdicts(
            self.score_activations(layer2, layer1, heatmaps=heatmaps, images=images),
            [image.shape[:2] for image in images],
        )

    def parts(self, scores: Scores) -> np.ndarray | None:
        """What each score is the sum of, (N, 2) float64, as in `Verdict.parts`; None unless the score is 'both'."""
        if self.scales is None or scores.peaks is None:
            return None
        return np.stack([self.scales[0](scores.whole), self.scales[1](scores.peaks)], axis=1)

    def verdicts(self, scores: Scores, sizes: Sequence[tuple[int, ...]]) -> list[Verdict]:
        """Scores with p-values and decisions; heat maps are brought to `sizes`, each (H, W) in pixels."""
        p = p_values(self.calibration, scores.score)
        limit = self.threshold().value
        parts = self.parts(scores)
        verdicts = []
        for i, size in enumerate(sizes):
            heatmap = None if scores.heatmaps is None else resize_map(scores.heatmaps[i], size)
            verdicts.append(
                Verdict(
                    float(scores.score[i]),
                    float(p[i]),
                    bool(scores.score[i] > limit),
                    int(scores.snapshot[i]),
                    [(int(n), float(d)) for n, d in zip(scores.neighbors[i], scores.distances[i], strict=True)],
                    heatmap,
                    None if heatmap is None else region(heatmap),
                    scores.features[i],
                    None if parts is None else (float(parts[i, 0]), float(parts[i, 1])),
                )
            )
        return verdicts


def _pooled_and_layer3(head: AdaptedLayers, layer2: Tensor) -> tuple[Tensor, Tensor]:
    layer3, layer4 = head.maps(layer2.float())
    return layer4.mean(dim=(2, 3)), layer3


def with_state(head: AdaptedLayers, state: dict[str, Tensor]) -> AdaptedLayers:
    """A copy of `head` with other weights."""
    other = copy.deepcopy(head)
    other.load_state_dict(state, strict=False)
    return other


def normalize(features: np.ndarray) -> np.ndarray:
    """(N, D) -> rows of unit L2 norm, float32; a zero row stays zero."""
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def resize_map(heatmap: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Bring a heat map (h, w) to (H, W) pixels, bilinear, float32."""
    if heatmap.shape == tuple(size):
        return heatmap
    x = torch.from_numpy(heatmap)[None, None]
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)[0, 0].numpy()


def region(heatmap: np.ndarray) -> tuple[int, int, int, int]:
    """Box around the connected part that holds the peak and lies above the middle between median and peak: (x0, y0, x1, y1)."""
    from scipy import ndimage

    peak = np.unravel_index(int(heatmap.argmax()), heatmap.shape)
    labels, _ = ndimage.label(heatmap >= (heatmap[peak] + np.median(heatmap)) / 2)
    rows, columns = ndimage.find_objects((labels == labels[peak]).astype(np.int8))[0]
    return (columns.start, rows.start, columns.stop, rows.stop)
