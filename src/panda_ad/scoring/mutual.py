# SPDX-License-Identifier: Apache-2.0
"""Mutual scoring: which of many unlabelled images are odd, with no good ones known.

Source: Li et al., Zero-Shot Industrial Anomaly Classification and Segmentation with Mutual Scoring of the Unlabeled
Images, ICLR 2024 (MuSc), https://arxiv.org/abs/2401.16753. A patch of a good part has its like in most images, a
defect's in few. Convolutional levels take the place of the paper's vision transformer, 3 x 3 means that of its three
neighborhood sizes; its re-scoring by neighboring images is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from tqdm import tqdm

from panda_ad.scoring.localize.maps import local_means, positions, resize
from panda_ad.scoring.localize.search import Packed, nearest, pack

ALIKE = 0.3
"""Share of the other images, the nearest ones, that a patch's score is the mean of (the paper's interval average)."""
COMPARED = 64
"""Most other images that an image is compared with, drawn at random: the time grows with images x compared."""


def mutual_maps(
    layers: Callable[[int], Mapping[str, np.ndarray]],
    count: int,
    levels: Sequence[str],
    size: tuple[int, int],
    sigma: float,
    seed: int = 0,
) -> np.ndarray:
    """Return heat maps of images that know each other only.

    Parameters
    ----------
    layers : of an image's index, float16 (C, h, w) per level.
    count : images, 3 or more.
    levels : that are compared, each in units of its mean distance.
    size : of the heat maps, (height, width) in pixels.
    sigma : of the smoothing, in these pixels.

    Returns
    -------
    float32 (count, height, width); 1 is usual.
    """
    packed = [_packed(layers(i), levels) for i in tqdm(range(count), desc="patches", unit="img", disable=None)]
    shapes = {level: layer.shape[1:] for level, layer in layers(0).items()}
    compared = _partners(count, seed)
    out = np.zeros((count, *size), np.float32)
    with tqdm(total=count * len(levels), desc="compare", unit="map", disable=None) as bar:
        for level in levels:
            found = []
            for rows, others in zip(packed, compared, strict=True):
                found.append(mutual_scores(rows[level], [packed[j][level] for j in others]))
                bar.update()
            unit = float(np.mean(found, dtype=np.float64)) or 1.0
            for i, scores in enumerate(found):
                out[i] += resize(scores.reshape(shapes[level]) / np.float32(unit * len(levels)), size, sigma)
    return out


def mutual_scores(rows: Packed, others: Sequence[Packed]) -> np.ndarray:
    """Return each patch's mean distance to the nearest patch of those other images that hold its nearest.

    Parameters
    ----------
    rows : P patches of an image.
    others : patches of one or more other images each.

    Returns
    -------
    float32 (P,): the mean of the lowest `ALIKE` of the distances to each image, at least one.
    """
    distances = np.stack([nearest(rows.values, [other]) for other in others])
    kept = max(1, round(ALIKE * len(others)))
    return np.asarray(np.partition(distances, kept - 1, axis=0)[:kept].mean(axis=0), dtype=np.float32)


def _packed(layers: Mapping[str, np.ndarray], levels: Sequence[str]) -> dict[str, Packed]:
    return {level: pack(positions(local_means(layers[level]))) for level in levels}


def _partners(count: int, seed: int) -> list[np.ndarray]:
    """Return for each image the indices of the others that it is compared with."""
    rng = np.random.default_rng(seed)
    return [np.sort(rng.permutation(np.delete(np.arange(count), i))[:COMPARED]) for i in range(count)]
