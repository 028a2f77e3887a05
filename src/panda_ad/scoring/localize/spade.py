# SPDX-License-Identifier: Apache-2.0
"""SPADE, the paper's way to segment anomalies.

Source: Cohen and Hoshen 2020, https://arxiv.org/abs/2005.02357, sections 3.2-3.3.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from safetensors.numpy import load_file, save_file

from panda_ad.scoring.localize.maps import BATCH, Maps, positions, resize
from panda_ad.scoring.localize.search import Packed, nearest, pack
from panda_ad.system.files import write_json

_PART = 2**13  # positions of the gallery read at a time


@dataclass(frozen=True, eq=False)
class Spade:
    """The K normal images nearest by pooled feature; per position the distance to the nearest position among theirs.

    A level's distances are Euclidean; the maps are brought to input size (bilinear), averaged and smoothed.

    Attributes
    ----------
    pooled : float32 (M, D).
    values : float16 (M, h * w, C) per level, memory-mapped.
    neighbors : K.
    sigma : pixels at input size.
    left_out : indices of gallery images that count as not there.
    """

    tiles: ClassVar[int] = 1  # it compares whole images

    pooled: np.ndarray
    values: dict[str, np.ndarray]
    neighbors: int
    sigma: float
    left_out: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), repr=False)

    @classmethod
    def build(cls, maps: Maps, levels: tuple[str, ...], pooled: np.ndarray, neighbors: int, sigma: float) -> Spade:
        """Write the gallery's maps to a temporary folder, `BATCH` images at a time, and map it into memory."""
        folder = Path(tempfile.mkdtemp(prefix="panda-ad-spade-"))
        count = len(pooled)
        values: dict[str, np.ndarray] = {}
        for i in range(0, count, BATCH):
            batch = maps(slice(i, i + BATCH))
            for level in levels:
                rows = np.stack([positions(layer) for layer in batch[level]])
                if level not in values:
                    shape = (count, *rows.shape[1:])
                    values[level] = np.lib.format.open_memmap(folder / f"{level}.npy", "w+", np.float16, shape)
                values[level][i : i + len(rows)] = rows
        for array in values.values():
            array.flush()  # type: ignore[attr-defined]
        spade = cls(pooled, values, neighbors, sigma)
        weakref.finalize(spade, shutil.rmtree, folder, ignore_errors=True)
        return spade

    def heatmaps(self, maps: Mapping[str, np.ndarray], pooled: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """See `Localizer.heatmaps`."""
        out = np.zeros((len(pooled), *size), np.float32)
        for b in range(len(pooled)):
            chosen = self.nearest_images(pooled[b])
            for level in self.levels:
                layer = maps[level][b]
                distances = nearest(positions(layer), self._gallery(level, chosen))
                out[b] += resize(distances.reshape(layer.shape[1:]), size, self.sigma)
            out[b] /= len(self.levels)
        return out

    @property
    def levels(self) -> tuple[str, ...]:
        """See `Localizer.levels`."""
        return tuple(self.values)

    def nearest_images(self, pooled: np.ndarray) -> np.ndarray:
        """Return indices of the K gallery images nearest to `pooled` (D,), nearest first."""
        distances = np.square(self.pooled.astype(np.float64) - pooled).sum(axis=1)
        order = np.argsort(distances, kind="stable")
        return order[~np.isin(order, self.left_out)][: self.neighbors]

    def without(self, images: np.ndarray) -> Spade:
        """See `Localizer.without`. A gallery that holds nothing else is left as it is."""
        return replace(self, left_out=images) if len(np.unique(images)) < len(self.pooled) else self

    def _gallery(self, level: str, chosen: np.ndarray) -> Iterator[Packed]:
        values = self.values[level]
        step = max(1, _PART // values.shape[1])
        for i in range(0, len(chosen), step):
            yield pack(values[chosen[i : i + step]].reshape(-1, values.shape[2]))

    def save(self, folder: Path) -> None:
        """Write localizer.json, small.safetensors and a .npy file per level."""
        for level, array in self.values.items():
            shutil.copyfile(str(array.filename), folder / f"{level}.npy")  # type: ignore[attr-defined]
        save_file({"pooled": np.ascontiguousarray(self.pooled)}, folder / "small.safetensors")
        config = {"method": "spade", "neighbors": self.neighbors, "sigma": self.sigma, "levels": self.levels}
        write_json(folder / "localizer.json", config)

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any]) -> Spade:
        """Read what `save` wrote; maps stay on disk."""
        pooled = load_file(folder / "small.safetensors")["pooled"]
        values = {level: np.load(folder / f"{level}.npy", mmap_mode="r") for level in config["levels"]}
        return cls(pooled, values, config["neighbors"], config["sigma"])
