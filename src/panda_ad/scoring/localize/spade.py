"""SPADE (Cohen and Hoshen 2020, https://arxiv.org/abs/2005.02357, sections 3.2-3.3), the paper's way to segment anomalies."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from panda_ad.scoring.localize.maps import BATCH, Maps, positions, smooth, tensors, upsample
from panda_ad.scoring.localize.search import Basis, Packed, Rows, bounds, fit_basis, nearest, pack
from panda_ad.system.files import write_json

_PART = 2**25  # numbers of the gallery (64 MB) read at a time


@dataclass(frozen=True, eq=False)
class Spade:
    """The K normal images nearest by pooled feature; per position the distance to the nearest position among theirs.

    A layer's distances are Euclidean; the maps are brought to input size (bilinear), averaged and smoothed.

    Attributes
    ----------
    pooled : float32 (M, D).
    values, lengths : per layer, memory-mapped: float16 (M, h * w, C) and float32 (M, h * w, 2) (`search.Rows`).
    bases : per layer.
    neighbors : K.  sigma : pixels at input size.
    left_out : indices of gallery images that count as not there.
    """

    tiles: ClassVar[int] = 1  # it compares whole images

    pooled: np.ndarray
    values: dict[str, np.ndarray]
    lengths: dict[str, np.ndarray]
    bases: dict[str, Basis]
    neighbors: int
    sigma: float
    left_out: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), repr=False)

    @classmethod
    def build(cls, maps: Maps, levels: tuple[str, ...], pooled: np.ndarray, neighbors: int, sigma: float) -> Spade:
        """Write the gallery's maps to a temporary folder, `BATCH` images at a time, and map it into memory."""
        folder = Path(tempfile.mkdtemp(prefix="panda-ad-spade-"))
        count = len(pooled)
        spread = np.unique(np.linspace(0, count - 1, min(count, 2 * BATCH)).astype(np.int64))  # images for the bases
        bases: dict[str, Basis] = {}
        values: dict[str, np.ndarray] = {}
        lengths: dict[str, np.ndarray] = {}
        for layer, sample in tensors(maps(spread), levels).items():
            rows = positions(sample)
            bases[layer] = fit_basis(rows.flatten(0, 1)[:: max(1, rows.shape[0] * rows.shape[1] // 50_000)])
            shape = (count, rows.shape[1], rows.shape[2])
            values[layer] = np.lib.format.open_memmap(folder / f"{layer}.npy", "w+", np.float16, shape)
            lengths[layer] = np.lib.format.open_memmap(
                folder / f"{layer}-lengths.npy", "w+", np.float32, (*shape[:2], 2)
            )
        for i in range(0, count, BATCH):
            for layer, batch in tensors(maps(slice(i, i + BATCH)), levels).items():
                for j, rows in enumerate(positions(batch), start=i):
                    values[layer][j] = rows.numpy()
                    lengths[layer][j] = bounds(rows, bases[layer]).numpy()
        for array in (*values.values(), *lengths.values()):
            array.flush()  # type: ignore[attr-defined]
        spade = cls(pooled, values, lengths, bases, neighbors, sigma)
        weakref.finalize(spade, shutil.rmtree, folder, ignore_errors=True)
        return spade

    def heatmaps(self, maps: Mapping[str, np.ndarray], pooled: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """See `Localizer.heatmaps`."""
        layers = tensors(maps, self.levels)
        out = np.empty((len(pooled), *size), np.float32)
        for b in range(len(pooled)):
            chosen = self.nearest_images(pooled[b])
            total = torch.zeros(size)
            for layer, values in layers.items():
                distances = nearest(positions(values[b : b + 1])[0], self._gallery(layer, chosen), self.bases[layer])
                total += upsample(distances, (values.shape[2], values.shape[3]), size)
            out[b] = smooth(total / len(layers), self.sigma)
        return out

    @property
    def levels(self) -> tuple[str, ...]:
        """See `Localizer.levels`."""
        return tuple(self.values)

    def nearest_images(self, pooled: np.ndarray) -> np.ndarray:
        """Indices of the K gallery images nearest to `pooled` (D,), nearest first."""
        distances = np.square(self.pooled.astype(np.float64) - pooled).sum(axis=1)
        order = np.argsort(distances, kind="stable")
        return order[~np.isin(order, self.left_out)][: self.neighbors]

    def without(self, images: np.ndarray) -> Spade:
        """See `Localizer.without`. A gallery that holds nothing else is left as it is."""
        return replace(self, left_out=images) if len(np.unique(images)) < len(self.pooled) else self

    def _gallery(self, layer: str, chosen: np.ndarray) -> Iterator[Packed]:
        values, lengths = self.values[layer], self.lengths[layer]
        step = max(1, _PART // (values.shape[1] * values.shape[2]))
        for i in range(0, len(chosen), step):
            part = chosen[i : i + step]
            rows = Rows(*(torch.from_numpy(np.asarray(a[part])).flatten(0, 1) for a in (values, lengths)))
            yield pack(rows, self.bases[layer])

    def save(self, folder: Path) -> None:
        """Write localizer.json, small.safetensors and two .npy files per layer."""
        small = {"pooled": torch.from_numpy(np.ascontiguousarray(self.pooled))}
        for layer, basis in self.bases.items():
            small |= {f"{layer}.mean": basis.mean, f"{layer}.axes": basis.axes}
            for array, name in ((self.values[layer], f"{layer}.npy"), (self.lengths[layer], f"{layer}-lengths.npy")):
                shutil.copyfile(str(array.filename), folder / name)  # type: ignore[attr-defined]
        save_file(small, folder / "small.safetensors")
        config = {
            "method": "spade",
            "neighbors": self.neighbors,
            "sigma": self.sigma,
            "ranks": {k: b.rank for k, b in self.bases.items()},
        }
        write_json(folder / "localizer.json", config)

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any]) -> Spade:
        """Read what `save` wrote; maps stay on disk."""
        small = load_file(folder / "small.safetensors")
        values = {layer: np.load(folder / f"{layer}.npy", mmap_mode="r") for layer in config["ranks"]}
        lengths = {layer: np.load(folder / f"{layer}-lengths.npy", mmap_mode="r") for layer in values}
        bases = {
            layer: Basis(small[f"{layer}.mean"], small[f"{layer}.axes"], rank)
            for layer, rank in config["ranks"].items()
        }
        return cls(small["pooled"].numpy(), values, lengths, bases, config["neighbors"], config["sigma"])
