# SPDX-License-Identifier: Apache-2.0
"""Exact k-nearest-neighbor search among the features of normal images (paper, section 3.3) and its compression.

faiss finds candidates in float32. Their distances are computed again in float64, pair by pair, so that an image's score
is the same number in whatever batch it arrives.
"""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np
from tqdm import tqdm

from panda_ad.errors import UserError
from panda_ad.system.files import atomic_file

_BLOCK = 256  # queries at a time: bounds the float64 differences at 256 * (k + 9) * D * 8 bytes
_MARGINS = (8, 64)  # candidates beyond k: first try, second try; then the whole gallery


class Gallery:
    """Features of normal images, searched exactly.

    Parameters
    ----------
    features : (M, D) float32.

    Attributes
    ----------
    features : as given, C-contiguous float32.

    Raises
    ------
    UserError
        No features, or some that are not finite.
    """

    def __init__(self, features: np.ndarray):
        features = np.ascontiguousarray(features, dtype=np.float32)
        if features.ndim != 2 or not features.size:
            raise UserError("the gallery is empty: no normal training images")
        check_finite(features)
        self.features = features
        # Distances do not change with the origin, but float32's error grows with the norm: search around the mean.
        self._mean = features.mean(axis=0, dtype=np.float64).astype(np.float32)
        centered = features - self._mean
        self._radius = float(np.sqrt(np.square(centered, dtype=np.float64).sum(axis=1).max()))
        self._index = faiss.IndexFlatL2(features.shape[1])
        self._index.add(centered)

    def __len__(self) -> int:
        return len(self.features)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the k nearest gallery features.

        Parameters
        ----------
        queries : (N, D) float32.

        Returns
        -------
        squared L2 distances (N, k) float64, ascending, and gallery indices (N, k) int64.
        Equal distances are in the order of their indices.

        Raises
        ------
        UserError
            k exceeds the gallery.
        """
        return self._search(queries, k, None)

    def score(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Return the sum of squared L2 distances to the k nearest, (N,) float64: the anomaly score of DN2 and PANDA."""
        distances, _ = self.search(queries, k)
        return np.asarray(distances.sum(axis=1))

    def leave_one_out(self, k: int) -> np.ndarray:
        """Score each gallery feature against all others, (M,) float64.

        Only itself is left out, not its exact duplicates.
        """
        distances, _ = self._search(self.features, k, np.arange(len(self)))
        return np.asarray(distances.sum(axis=1))

    def _search(self, queries: np.ndarray, k: int, own: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        available = len(self) - (own is not None)
        if not 1 <= k <= available:
            raise UserError(
                f"gallery.k: {k} neighbors are asked for, the gallery has {available}; "
                "lower gallery.k or give more normal images"
            )
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if queries.ndim != 2 or queries.shape[1] != self.features.shape[1]:
            raise ValueError(f"queries (N, {self.features.shape[1]}) are expected, found shape {queries.shape}")
        distances, indices = np.empty((len(queries), k)), np.empty((len(queries), k), dtype=np.int64)
        for start in range(0, len(queries), _BLOCK):
            stop = start + _BLOCK
            block = queries[start:stop], k, None if own is None else own[start:stop]
            distances[start:stop], indices[start:stop] = self._block(*block)
        return distances, indices

    def _block(self, queries: np.ndarray, k: int, own: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Run `_search` for a few queries.

        faiss gives candidates, and more of them where float32 cannot tell that they suffice.
        """
        n, m, dimension = len(queries), len(self), queries.shape[1]
        distances, indices = np.empty((n, k)), np.empty((n, k), dtype=np.int64)
        centered = queries - self._mean
        # |error of faiss| <= gamma (|q| + |g|)^2 for sums of D float32 products, and the rounding of q - mean
        radius = np.sqrt(np.square(centered, dtype=np.float64).sum(axis=1)) + self._radius
        error = (dimension + 8) * 2.0**-24 * (radius + float(np.abs(self._mean).max()) * 4) ** 2
        left = np.arange(n)
        for margin in _MARGINS:
            wanted = k + (own is not None) + margin
            if wanted >= m or not len(left):
                break
            rough, candidates = self._index.search(centered[left], wanted)
            candidates.sort(axis=1)
            found = self._rank(queries[left], candidates, k, None if own is None else own[left])
            sure = found[0][:, -1] < rough[:, -1] - error[left]  # whatever is no candidate lies beyond the last one
            distances[left[sure]], indices[left[sure]] = found[0][sure], found[1][sure]
            left = left[~sure]
        for i in left:  # ties at the margin, or a gallery hardly larger than k
            mine = None if own is None else own[i : i + 1]
            distances[i], indices[i] = self._scan(queries[i : i + 1], k, mine)
        return distances, indices

    def _scan(self, query: np.ndarray, k: int, own: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Compare one query (1, D) with the whole gallery, in blocks."""
        distances, indices = np.empty((1, 0)), np.empty((1, 0), dtype=np.int64)
        for start in range(0, len(self), 4096):
            candidates = np.arange(start, min(start + 4096, len(self)))[None]
            nearest = self._rank(query, candidates, min(k, candidates.shape[1]), own)
            distances, indices = (
                np.concatenate([distances, nearest[0]], axis=1),
                np.concatenate([indices, nearest[1]], axis=1),
            )
            order = np.argsort(distances, axis=1, kind="stable")[:, :k]
            distances, indices = np.take_along_axis(distances, order, 1), np.take_along_axis(indices, order, 1)
        return distances[0], indices[0]

    def _rank(
        self, queries: np.ndarray, candidates: np.ndarray, k: int, own: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the k nearest of each query's candidates (N, C), by float64 distance and then by index.

        The candidates' indices ascend.
        """
        difference = self.features[candidates].astype(np.float64)  # (N, C, D)
        difference -= queries[:, None]
        exact = np.square(difference, out=difference).sum(axis=2)
        if own is not None:
            exact[candidates == own[:, None]] = np.inf
        order = np.argsort(exact, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(exact, order, 1), np.take_along_axis(candidates, order, 1)

    def save(self, path: Path | str) -> None:
        """Write the features as a faiss IndexFlatL2 file, atomically."""
        index = faiss.IndexFlatL2(self.features.shape[1])
        index.add(self.features)
        with atomic_file(path) as temporary:
            faiss.write_index(index, str(temporary))

    @classmethod
    def load(cls, path: Path | str) -> Gallery:
        """Read what `save` wrote. FileNotFoundError where it is missing, UserError where it is no such file."""
        path = Path(path)
        with open(path, "rb"):
            pass
        try:
            index = faiss.read_index(str(path))
            return cls(index.reconstruct_n(0, index.ntotal))
        except (RuntimeError, ValueError) as e:
            raise UserError(
                f"{path}: not a gallery ({' '.join(str(e).split())[-100:]}); build the model again"
            ) from None


def check_finite(features: np.ndarray) -> None:
    """Raise UserError where a feature of the training images, (M, D), is NaN or infinite."""
    if not np.isfinite(features).all():
        raise UserError(
            "a training image's features are not finite numbers; lower adapt.learning_rate, or use adapt.method: none"
        )


def cluster_means(features: np.ndarray, members: np.ndarray) -> Gallery:
    """Return a gallery of the means of clusters.

    Parameters
    ----------
    features : (M, D) float32.
    members : (M,) number of each image's cluster, 0 to K - 1, none of them empty.
    """
    sums = np.zeros((int(members.max()) + 1, features.shape[1]))
    np.add.at(sums, members, features.astype(np.float64))
    return Gallery((sums / np.bincount(members)[:, None]).astype(np.float32))


def compress(features: np.ndarray, method: str, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Make a gallery smaller.

    Parameters
    ----------
    features : (M, D) float32.
    method : `none`; `kmeans`: `size` centers (paper, table of gallery sizes);
        `coreset`: greedy k-center choice of `size` features (Sener and Savarese, ICLR 2018).
    size : K; a gallery not larger than that is kept whole.

    Returns
    -------
    features (K, D) float32, and indices (K,) int64 of the original image at (coreset) or nearest to (kmeans) each.
    """
    features = np.ascontiguousarray(features, dtype=np.float32)
    if method not in ("none", "kmeans", "coreset"):
        raise ValueError(f"unknown compression {method!r}")
    if method == "none" or size >= len(features):
        return features, np.arange(len(features))
    if method == "coreset":
        chosen = greedy_coreset(features, size, int(np.random.default_rng(seed).integers(len(features))))
        return features[chosen], chosen
    # nredo: the best of five starts; min_points: no warning for few images; max_points: no subsampling
    options = {
        "niter": 25,
        "nredo": 5,
        "seed": seed % 2**31,
        "min_points_per_centroid": 1,
        "max_points_per_centroid": len(features),
    }
    kmeans = faiss.Kmeans(features.shape[1], size, **options)
    kmeans.train(features)
    centers = np.ascontiguousarray(kmeans.centroids, dtype=np.float32)
    return centers, Gallery(features).search(centers, 1)[1][:, 0]


def greedy_coreset(rows: np.ndarray, size: int, first: int, least: float = -1.0) -> np.ndarray:
    """Choose rows by greedy k-center: `first`, then always the row farthest from all that are chosen.

    Parameters
    ----------
    rows : (M, D) float32.
    size : 1 to M.
    least : ends earlier where all that is left lie at most this squared distance from a chosen row.

    Returns
    -------
    chosen (size,) int64 or fewer, each once.
    """
    x = rows - rows.mean(axis=0)
    norms = np.einsum("md,md->m", x, x)
    away, latest = np.full(len(x), np.inf, np.float32), np.empty(len(x), np.float32)
    chosen = np.full(size, first)
    for i in tqdm(range(1, size), desc="coreset", unit="row", disable=None, leave=False):
        last = chosen[i - 1]
        np.dot(x, x[last], out=latest)
        latest *= -2
        latest += norms
        latest += norms[last]
        np.minimum(away, np.maximum(latest, 0, out=latest), out=away)  # float32 may put copies at less than 0
        away[last] = -np.inf
        chosen[i] = away.argmax()
        if away[chosen[i]] <= least:
            return chosen[:i]
    return chosen
