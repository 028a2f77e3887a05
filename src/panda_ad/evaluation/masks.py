# SPDX-License-Identifier: Apache-2.0
"""Of stage `evaluate`: what is known of where defects are, and the heat maps that are compared with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from panda_ad.data.images import Decoding
from panda_ad.data.layouts import image_root
from panda_ad.data.masks import read_mask
from panda_ad.params import Params
from panda_ad.scoring.verdict import resize_map

PIXEL_SIDE = 384
"""Longest side of the masks that pixel metrics compare, pixels.

Metrics are taken at the image's own size where that is smaller; larger images are reduced, to bound memory.
"""

Masks = list[np.ndarray | None]
"""Per image a bool (H, W), empty where it is good; None where it is defective and nobody has marked where."""


def load_masks(rows: pd.DataFrame, params: Params) -> Masks | None:
    """Read the ground truth of manifest rows; None where no image has any.

    A mask that is reduced marks each pixel that a defect touches.
    A pixel marked from one half on would make thin or small defects fall apart or vanish.

    Raises
    ------
    UserError
        A mask is not the one that `validate` read.
    """
    if not (rows["mask"] != "").any():
        return None
    root: Path = image_root(params)
    decoding = Decoding.of(params.data)
    masks: Masks = []
    for row in rows.itertuples():
        if row.label and not row.mask:
            masks.append(None)
            continue
        scale = min(1.0, PIXEL_SIDE / max(row.height, row.width))
        size = (max(1, round(row.height * scale)), max(1, round(row.width * scale)))
        mask = read_mask(root / row.mask, row.mask_sha256, decoding) if row.mask else np.zeros(size, bool)
        masks.append(mask if mask.shape == size else reduce_mask(mask, size))
    return masks


def reduce_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Reduce a mask, bool (H, W), to bool `size`, not larger: true where any of the pixels behind is."""

    def rows(marked: np.ndarray, count: int) -> np.ndarray:
        """Reduce (H, W) to (count, W): row i stands for those from floor(i H / count) to ceil((i + 1) H / count)."""
        sums = np.concatenate([np.zeros((1, marked.shape[1]), np.int64), marked.cumsum(axis=0)])
        edges = np.arange(count + 1) * len(marked)
        return sums[-(-edges[1:] // count)] > sums[edges[:-1] // count]

    return rows(rows(mask, size[0]).T, size[1]).T


@dataclass(frozen=True)
class MapsAsMasks(Sequence[np.ndarray]):
    """Heat maps, N times float32 (h, w), each brought to the shape of its mask when it is asked for.

    Together they take more than memory.
    """

    maps: Sequence[np.ndarray] | np.ndarray
    masks: Sequence[np.ndarray]

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, i: int) -> np.ndarray:  # type: ignore[override]
        return resize_map(self.maps[i], self.masks[i].shape)


def with_masks(maps: Sequence[np.ndarray] | np.ndarray, masks: Masks) -> tuple[list[np.ndarray], MapsAsMasks]:
    """Return masks, and heat maps to compare with them, of the images whose defects are marked."""
    known = [(heatmap, mask) for heatmap, mask in zip(maps, masks, strict=True) if mask is not None]
    marked = [mask for _, mask in known]
    return marked, MapsAsMasks([heatmap for heatmap, _ in known], marked)
