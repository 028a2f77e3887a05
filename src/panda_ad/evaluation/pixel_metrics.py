# SPDX-License-Identifier: Apache-2.0
"""Pixel metrics over a test set: AUROC, AU-PRO and best F1, exact over all thresholds, and their intervals.

Masks are bool: a pixel is defective where its mask's value is at least half (`data.masks.read_mask` binarizes).

For each metric it is enough to know, per defective pixel, how many normal pixels score above it and how many score the
same. So only the defective pixels are held, and the normal ones pass by in sorted blocks of 16 million.
Nothing is binned, and memory stays bounded by the number of defective pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from panda_ad.errors import UserError
from panda_ad.evaluation.image_metrics import percentiles

_BLOCK = 2**24
_BINS = 2000

Masks = Sequence[np.ndarray]
Maps = Sequence[np.ndarray]


def pixel_auroc(masks: Masks, maps: Maps) -> float:
    """Compute AUROC over all pixels of all images; ties count half.

    Parameters
    ----------
    masks : bool (H, W) per image, True where defective; all False for a good image.
    maps : float (H, W) per image, the mask's size, higher is more anomalous.

    Raises
    ------
    UserError
        Sizes differ, a value is not finite, or there is no defective or no normal pixel at all.
        All functions of this module raise it for these.
    """
    _check(masks, maps)
    scores = np.concatenate([m[mask] for mask, m in zip(masks, maps, strict=True)])
    unique, inverse = np.unique(scores, return_inverse=True)
    above, tied, normal = _normal_counts(unique, masks, maps)
    beaten = normal - above - tied / 2  # normal pixels that a defective one of this score outranks
    return float(np.average(beaten[inverse] / normal))


def au_pro(masks: Masks, maps: Maps, limit: float = 0.3) -> float:
    """Compute AU-PRO: the area under the per-region overlap curve up to a false-positive rate, divided by that rate.

    Source: Bergmann et al., IJCV 2021, section 4.2.

    The overlap at a threshold is the share of a connected defect (8-neighborhood, per image) at or above it.
    It is averaged over all defects of the set, so that small defects weigh as much as large ones.
    The false-positive rate is over all normal pixels of all images.
    The curve is linear between neighboring thresholds, and is cut at `limit` by interpolation.

    Each defective pixel raises the overlap by its weight 1 / (size of its defect x number of defects), while the
    false-positive rate goes from `a` (normal pixels above it) to `b` (above or tied).
    So the area is a sum over defective pixels in closed form.
    """
    if not 0 < limit <= 1:
        raise UserError(f"au_pro: the limit must lie in (0, 1], not {limit}")
    _check(masks, maps)
    regions = [m[component] for mask, m in zip(masks, maps, strict=True) for component in _components(mask)]
    unique, inverse = np.unique(np.concatenate(regions), return_inverse=True)
    above, tied, normal = _normal_counts(unique, masks, maps)
    weights = np.concatenate([np.full(len(r), 1.0 / (len(r) * len(regions))) for r in regions])
    area = _ramp_area(above / normal, (above + tied) / normal, limit)
    return float(weights @ area[inverse] / limit)


def pixel_f1(masks: Masks, maps: Maps) -> float:
    """Compute the largest F1 = 2 TP / (2 TP + FP + FN) over all thresholds, pixels of all images together.

    The best threshold is the score of some defective pixel: a lower one, short of the next, only adds false positives.
    """
    _check(masks, maps)
    scores = np.concatenate([m[mask] for mask, m in zip(masks, maps, strict=True)])
    unique, counts = np.unique(scores, return_counts=True)
    above, tied, _ = _normal_counts(unique, masks, maps)
    tp = counts[::-1].cumsum()[::-1]  # defective pixels at or above each score
    return float((2 * tp / (tp + above + tied + len(scores))).max())


def pixel_intervals(
    masks: Masks, maps: Maps, n: int = 1000, confidence: float = 0.95, seed: int = 0, limit: float = 0.3
) -> dict[str, tuple[float, float]]:
    """Compute percentile bootstrap intervals of the three metrics, by image (pixels of an image are not independent).

    Images with and without defects are resampled apart. For the intervals only, scores are binned at 2,000 quantiles
    (half of them of the defective pixels, half of the normal ones), which moves a metric by less than 0.001.
    The metrics above stay exact.

    Returns
    -------
    {'pixel_auroc': (low, high), 'au_pro': (low, high), 'pixel_f1': (low, high)}
    """
    _check(masks, maps)
    edges = _edges(masks, maps)
    normal, defect, overlap = (np.zeros((len(maps), len(edges) + 1)) for _ in range(3))
    regions = np.zeros(len(maps))
    for i, (mask, m) in enumerate(zip(masks, maps, strict=True)):
        normal[i], defect[i] = _histogram(m[~mask], edges), _histogram(m[mask], edges)
        for component in _components(mask):
            overlap[i] += _histogram(m[component], edges) / len(component[0])
            regions[i] += 1
    # descending cumulative sums commute with the sum over images
    normal, defect, overlap = (np.cumsum(h[:, ::-1], axis=1) for h in (normal, defect, overlap))
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero((regions > 0) == has) for has in (False, True)]
    values: dict[str, list[float]] = {"pixel_auroc": [], "au_pro": [], "pixel_f1": []}
    for _ in range(n):
        drawn = np.concatenate([group[rng.integers(0, len(group), len(group))] for group in groups if len(group)])
        counts = np.bincount(drawn, minlength=len(maps)).astype(np.float64)
        fp, tp, pro = counts @ normal, counts @ defect, counts @ overlap
        if fp[-1] == 0:  # every drawn image is defective all over; such a resample says nothing
            continue
        fpr = np.r_[0, fp / fp[-1]]
        tpr, pro = np.r_[0, tp / tp[-1]], np.r_[0, pro / (counts @ regions)]
        values["pixel_auroc"].append(float(np.trapezoid(tpr, fpr)))
        values["au_pro"].append(float(np.diff(pro) @ _ramp_area(fpr[:-1], fpr[1:], limit) / limit))
        values["pixel_f1"].append(float((2 * tp / (tp + fp + tp[-1])).max()))
    return {name: percentiles(np.array(v), confidence) for name, v in values.items()}


def _ramp_area(a: np.ndarray, b: np.ndarray, limit: float) -> np.ndarray:
    """Return the area up to `limit` under a unit ramp that rises from 0 at `a` to 1 at `b` (a <= b) and stays there."""
    width = np.where(b > a, b - a, 1.0)
    area: np.ndarray = np.where(b <= limit, limit - (a + b) / 2, np.maximum(limit - a, 0.0) ** 2 / (2 * width))
    return area


def _components(mask: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield pixel indices (rows, columns) of each connected defect of a mask, 8-neighborhood."""
    from scipy import ndimage

    labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    for number, box in enumerate(ndimage.find_objects(labels), start=1):
        rows, columns = np.nonzero(labels[box] == number)
        yield rows + box[0].start, columns + box[1].start


def _normal_counts(unique: np.ndarray, masks: Masks, maps: Maps) -> tuple[np.ndarray, np.ndarray, int]:
    """Count the normal pixels above and equal to each of the ascending scores (U,), and all normal pixels.

    The first two are (U,) int64.
    """
    above, tied = np.zeros(len(unique), np.int64), np.zeros(len(unique), np.int64)
    total = 0
    for block in _normal_blocks(masks, maps):
        block.sort()
        right = np.searchsorted(block, unique, side="right")
        above += len(block) - right
        tied += right - np.searchsorted(block, unique, side="left")
        total += len(block)
    return above, tied, total


def _normal_blocks(masks: Masks, maps: Maps) -> Iterator[np.ndarray]:
    """Yield scores of the normal pixels, in blocks of whole images of about 16 million pixels."""
    held: list[np.ndarray] = []
    for mask, m in zip(masks, maps, strict=True):
        held.append(m[~mask])
        if sum(map(len, held)) >= _BLOCK:
            yield np.concatenate(held)
            held = []
    if held:
        yield np.concatenate(held)


def _edges(masks: Masks, maps: Maps) -> np.ndarray:
    """Return ascending, distinct bin edges: quantiles of the defective and of the normal pixels.

    Each comes from at most a few million pixels.
    """
    parts = []
    for defective in (True, False):
        pixels = sum(int((mask == defective).sum()) for mask in masks)
        step = max(1, pixels // (_BLOCK // 4))
        sample = np.sort(np.concatenate([m[mask == defective][::step] for mask, m in zip(masks, maps, strict=True)]))
        parts.append(sample[np.linspace(0, len(sample) - 1, _BINS // 2).astype(np.int64)])
    return np.unique(np.concatenate(parts))


def _histogram(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Count values per bin (E + 1,): below the first edge, [edge, next edge), ..., from the last edge on."""
    return np.diff(np.searchsorted(np.sort(values), edges, side="left"), prepend=0, append=len(values))


def _check(masks: Masks, maps: Maps) -> None:
    if len(masks) != len(maps):
        raise UserError(f"pixel metrics: {len(masks)} masks for {len(maps)} heat maps")
    defective = normal = 0
    for i, (mask, m) in enumerate(zip(masks, maps, strict=True)):
        if mask.dtype != bool or mask.ndim != 2:
            raise UserError(f"pixel metrics: mask {i} must be a bool array (H, W), not {mask.dtype} {mask.shape}")
        if m.shape != mask.shape:
            raise UserError(
                f"pixel metrics: heat map {i} is {m.shape}, its mask {mask.shape}; resize the map to the mask"
            )
        if not np.isfinite(m).all():
            raise UserError(f"pixel metrics: heat map {i} holds a value that is not finite; the model is damaged")
        count = int(np.count_nonzero(mask))
        defective, normal = defective + count, normal + mask.size - count
    if not defective or not normal:
        raise UserError(
            f"pixel metrics: {defective} defective and {normal} normal pixels; at least one of each is needed"
        )
