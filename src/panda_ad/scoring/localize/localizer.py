# SPDX-License-Identifier: Apache-2.0
"""Where the defect is: two localizers behind one seam, `heatmaps`, `save` and `load_localizer`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np

from panda_ad.params import LocalizeParams
from panda_ad.scoring.localize.maps import Maps
from panda_ad.scoring.localize.patch_memory import PatchMemory
from panda_ad.scoring.localize.spade import Spade

_KINDS: dict[str, type[Spade] | type[PatchMemory]] = {"spade": Spade, "patch_memory": PatchMemory}


class Localizer(Protocol):
    """What the detector needs of a localizer."""

    @property
    def tiles(self) -> int:
        """Tiles per side of an image, T (`tiling.image_tiles`); 1: maps are those of whole images."""
        ...

    @property
    def levels(self) -> tuple[str, ...]:
        """Levels of the network that it compares."""
        ...

    def heatmaps(self, maps: Mapping[str, np.ndarray], pooled: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Return heat maps of B images; an image's map does not depend on the others.

        Parameters
        ----------
        maps : float16 (B * T^2, C, h, w) per level, image by image.
        pooled : float32 (B, D), features under the same snapshot as the gallery's; only `Spade` looks at them.
        size : network input (height, width), pixels.

        Returns
        -------
        float32 (B, H, W), `tiling.grid`'s shape (without tiles the input size).
        Values are distances in feature space, at least 0; higher is more anomalous.
        """
        ...

    def without(self, images: np.ndarray) -> Localizer:
        """Return the same as if it had never seen the gallery images of these indices.

        Only what `build_localizer` made can.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write into an existing, empty folder."""
        ...


def build_localizer(
    params: LocalizeParams,
    levels: tuple[str, ...],
    maps: Maps,
    pooled: np.ndarray,
    seed: int,
    sources: np.ndarray | None = None,
) -> Localizer:
    """Build what `params.method` ('spade' or 'patch_memory') needs from the normal training images.

    Parameters
    ----------
    levels : those to compare, from fine to coarse.
    maps : callable, maps(i: slice or int array) -> float16 (B, C, h, w) per layer of the images at these indices.
        With `params.tiles`, the indices are of their tiles, image by image.
    pooled : float32 (M, D), pooled features of the same images under the same snapshot.
    seed : of the patches drawn.
    sources : int64 (M,), number of the image that each is or is a copy of; None: there are no copies.
        `Localizer.without` leaves out an image with its copies.
    """
    if params.method == "spade":
        return Spade.build(maps, levels, pooled, params.neighbors, params.sigma)
    if params.method == "patch_memory":
        return PatchMemory.build(maps, levels, np.arange(len(pooled)) if sources is None else sources, params, seed)
    raise ValueError(f"localize.method {params.method!r} builds no localizer")


def load_localizer(folder: Path) -> Localizer:
    """Read a saved localizer; large arrays stay memory-mapped.

    Raises OSError, LookupError or ValueError where it is missing or damaged.
    """
    config = json.loads((folder / "localizer.json").read_text(encoding="utf-8"))
    return _KINDS[config["method"]].load(folder, config)
