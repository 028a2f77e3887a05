# SPDX-License-Identifier: Apache-2.0
"""Exact nearest-neighbor distance of many positions to many rows, in bounded memory.

`faiss.knn` finds candidates by matrix products in float32. Their distances are computed again as sums of squared
differences, so that a copy of a row is at distance 0 and a distance does not depend on what else is searched.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import faiss
import numpy as np
import torch
from torch import Tensor

_CANDIDATES = 4  # the nearest of them is taken: float32 products cannot tell nearly equal ones apart
_PAIRS = 2**22  # numbers of differences held at a time (16 MB)


@dataclass(frozen=True)
class Packed:
    """Rows made ready for search.

    Attributes
    ----------
    values : float16 (N, C).
    center : float32 (C,); products lose fewer digits around it than around the origin.
    centered : float32 (N, C), values less the center.
    """

    values: Tensor
    center: np.ndarray
    centered: np.ndarray


def pack(values: Tensor) -> Packed:
    """Make rows, float16 (N, C), N >= 1, ready for search."""
    rows: np.ndarray = values.float().numpy()
    center = rows[:: max(1, len(rows) // 1000)].mean(axis=0, dtype=np.float64).astype(np.float32)
    return Packed(values, center, rows - center)


@torch.inference_mode()
def nearest(queries: Tensor, gallery: Iterable[Packed]) -> Tensor:
    """Return the Euclidean distance from each query to the nearest row.

    Parameters
    ----------
    queries : float (P, C).
    gallery : rows in parts of any size, so that only one part need be in memory; at least one row.

    Returns
    -------
    float32 (P,). The winner's distance is a float32 sum of squared differences. No other row is nearer by more than the
    rounding of float32 products, C x 1.2e-7 x (|q| + |g|)^2 of centered vectors, in squared distance.
    """
    queries = queries.float().contiguous()
    best = torch.full((len(queries),), torch.inf)
    for part in gallery:
        k = min(_CANDIDATES, len(part.values))
        _, found = faiss.knn(queries.numpy() - part.center, part.centered, k)
        step = max(1, _PAIRS // (k * queries.shape[1]))
        for i in range(0, len(queries), step):
            rows = part.values[torch.from_numpy(found[i : i + step])].float()  # (pairs, k, C)
            distances = rows.sub_(queries[i : i + step, None]).square_().sum(2).amin(1)
            best[i : i + step] = torch.minimum(best[i : i + step], distances)
    return best.sqrt()
