"""The gallery: features of normal training images, and exact k-nearest-neighbour search in it (paper, section 3.1)."""

from __future__ import annotations

from pathlib import Path

import faiss
import numpy as np

from panda_ad.errors import UserError
from panda_ad.files import atomic_file

_MARGIN = 8  # candidates beyond k that are measured again in float64
_BLOCK = 1024  # queries at a time


class Gallery:
    """Features of M normal images.

    Attributes
    ----------
    features : float32 (M, D).
    """

    def __init__(self, features: np.ndarray):
        self.features = np.ascontiguousarray(features, dtype=np.float32)
        if self.features.ndim != 2 or not len(self.features):
            raise UserError("the gallery is empty: no normal training images")
        if not np.isfinite(self.features).all():
            raise UserError("a training image's features are not finite numbers; lower adapt.learning_rate, or use adapt.method: none")
        self._index = faiss.IndexFlatL2(self.features.shape[1])
        self._index.add(self.features)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest gallery images of each query.

        faiss finds candidates in float32; their distances are then computed anew in float64, a query at a time, so that the
        result does not depend on the batch a query comes in. Ties go to the lower index.

        Parameters
        ----------
        queries : float32 (N, D).
        k : 1 to M.

        Returns
        -------
        squared L2 distances (N, k) float64, ascending, and gallery indices (N, k) int64.

        Raises
        ------
        UserError
            k exceeds the number of images in the gallery.
        """
        m = len(self.features)
        if k > m:
            raise UserError(f"gallery.k: {k} neighbours asked for, the gallery holds {m} images; lower it or add normal images")
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        distances, indices = np.empty((len(queries), k)), np.empty((len(queries), k), np.int64)
        for start in range(0, len(queries), _BLOCK):
            block = queries[start : start + _BLOCK]
            _, candidates = self._index.search(block, min(m, k + _MARGIN))
            for i, (query, found) in enumerate(zip(block, candidates, strict=True), start):
                exact = np.square(self.features[found].astype(np.float64) - query).sum(axis=1)
                order = np.lexsort((found, exact))[:k]
                distances[i], indices[i] = exact[order], found[order]
        return distances, indices

    def score(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Anomaly score: the sum of squared L2 distances to the k nearest, (N,) float64."""
        return self.search(queries, k)[0].sum(axis=1)

    def leave_one_out(self, k: int) -> np.ndarray:
        """Score of each gallery image against the others, (M,) float64; an exact copy of it is another image. UserError if M <= k."""
        if len(self.features) <= k:
            raise UserError(f"gallery.k: {k} neighbours asked for, a training image has {len(self.features) - 1} others; add normal images")
        distances, indices = self.search(self.features, k + 1)
        own = indices == np.arange(len(indices))[:, None]
        own[~own.any(axis=1), -1] = True  # more than k exact copies with lower indices: any one of them stands for itself
        return distances[~own].reshape(-1, k).sum(axis=1)

    def save(self, path: Path | str) -> None:
        """Write a faiss index file, atomically."""
        with atomic_file(path) as temporary:
            faiss.write_index(self._index, str(temporary))

    @classmethod
    def load(cls, path: Path | str) -> Gallery:
        """Read what `save` wrote. FileNotFoundError or RuntimeError where that cannot be read."""
        if not Path(path).exists():
            raise FileNotFoundError(2, "no such file", str(path))
        index = faiss.read_index(str(path))
        return cls(faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(index.ntotal, index.d).copy())


def compress(features: np.ndarray, method: str, size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a gallery to `size` features (paper, section 4: k-means as a trade of speed for accuracy).

    Parameters
    ----------
    features : float32 (M, D).
    method : `none`; `kmeans`, cluster centres; `coreset`, a subset that covers the rest (greedy k-centre).

    Returns
    -------
    float32 (K, D), K <= size, and int64 (K,): the original image that each is, or is nearest to.
    """
    features = np.ascontiguousarray(features, dtype=np.float32)
    if method == "none" or size >= len(features):
        return features, np.arange(len(features))
    if method == "coreset":
        kept = greedy_coreset(features, size, seed)
        return features[kept], kept
    if method == "kmeans":
        kmeans = faiss.Kmeans(features.shape[1], size, niter=50, seed=seed, min_points_per_centroid=1, max_points_per_centroid=10**9)
        kmeans.train(features)
        return kmeans.centroids, Gallery(features).search(kmeans.centroids, 1)[1][:, 0]
    raise ValueError(f"unknown compression {method!r}")


def greedy_coreset(features: np.ndarray, size: int, seed: int = 0) -> np.ndarray:
    """Greedy k-centre (Sener and Savarese, 2018): each next point is the one farthest from all chosen. int64 (size,), first by seed."""
    chosen = np.empty(size, np.int64)
    chosen[0] = np.random.default_rng(seed).integers(len(features))
    nearest = np.full(len(features), np.inf)
    for i in range(size):
        if i:
            chosen[i] = int(nearest.argmax())
        nearest = np.minimum(nearest, np.square(features - features[chosen[i]]).sum(axis=1, dtype=np.float64))
    return chosen
