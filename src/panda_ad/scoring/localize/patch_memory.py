# SPDX-License-Identifier: Apache-2.0
"""Patch memory: a heat map per level of the network, averaged in units of what is usual for normal images.

Source: Roth et al. 2022 (PatchCore), https://arxiv.org/abs/2106.08265, sections 3.1-3.3, whose one memory joins the
levels on the finest grid. Apart, each level counts alike whatever its number of channels and their size, and coarse
levels are searched on their own grids. Left out: the re-weighting of the image score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from scipy import ndimage

from panda_ad.params import LocalizeParams
from panda_ad.scoring.folds import split_folds
from panda_ad.scoring.gallery import greedy_coreset
from panda_ad.scoring.localize.maps import BATCH, Maps, local_means, positions, resize
from panda_ad.scoring.localize.search import Packed, nearest, pack
from panda_ad.scoring.localize.tiling import blend, grid
from panda_ad.system.files import write_json

POOL = 20_000
"""Patches of a level, drawn at random from all images alike, that the memory is chosen from (as many as it holds)."""
_PROJECTED = 32  # dimensions in which the choice measures distances (Johnson-Lindenstrauss, section 3.2)


@dataclass(frozen=True, eq=False)
class LevelMemory:
    """Some patches of one level of the normal images.

    Attributes
    ----------
    values : float16 (K, C).
    scale : mean distance of normal images' patches to the nearest of other images, above 0.
    sources : int64 (K,), index of the image that each value is of; known until it is saved.
    """

    values: np.ndarray
    scale: float
    sources: np.ndarray | None = field(default=None, repr=False)

    @cached_property
    def _packed(self) -> Packed:
        return pack(self.values)

    def distances(self, layer: np.ndarray) -> np.ndarray:
        """Return each position's distance to the nearest value, in units of `scale`: (C, h, w) -> float32 (h, w)."""
        found = nearest(positions(local_means(layer)), [self._packed]) / np.float32(self.scale)
        return np.asarray(found.reshape(layer.shape[1:]))


@dataclass(frozen=True, eq=False)
class PatchMemory:
    """A memory per level; the heat map is the mean of the levels' distances, 1 where all is as usual.

    Attributes
    ----------
    memories : per level of the network, from fine to coarse.
    sigma : pixels of the heat map.
    tiles : tiles per side of an image; 1: the whole image is one.
    """

    memories: Mapping[str, LevelMemory]
    sigma: float
    tiles: int = 1

    @property
    def levels(self) -> tuple[str, ...]:
        """See `Localizer.levels`."""
        return tuple(self.memories)

    @classmethod
    def build(
        cls, maps: Maps, levels: tuple[str, ...], sources: np.ndarray, params: LocalizeParams, seed: int
    ) -> PatchMemory:
        """Build memories of at most `params.memory_limit` patches each; arguments as of `build_localizer`."""
        tiles = params.tiles or 1
        count = len(sources) * tiles**2
        quota = math.ceil(max(POOL, params.memory_limit) / count)  # patches drawn from each
        rng = np.random.default_rng(seed)
        drawn: dict[str, list[np.ndarray]] = {level: [] for level in levels}
        for i in range(0, count, BATCH):
            batch = maps(slice(i, i + BATCH))
            for level in levels:
                for layer in batch[level]:
                    rows = positions(local_means(layer))
                    drawn[level].append(rows[rng.permutation(len(rows))[:quota]])
        of = np.repeat(sources, tiles**2)
        memories = {level: _memory(parts, of, params.memory_limit, seed) for level, parts in drawn.items()}
        return cls(memories, params.sigma, tiles)

    def heatmaps(self, maps: Mapping[str, np.ndarray], _pooled: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """See `Localizer.heatmaps`."""
        shape, overlap = grid(size, self.tiles)
        per_image = self.tiles**2
        out = np.empty((len(maps[self.levels[0]]) // per_image, *shape), np.float32)
        for i in range(len(out)):
            if per_image == 1:
                out[i] = self._heatmap(maps, i, size, self.sigma)
                continue
            parts = [self._heatmap(maps, b, size, 0.0) for b in range(i * per_image, (i + 1) * per_image)]
            out[i] = ndimage.gaussian_filter(blend(parts, shape, size, overlap), self.sigma)
        return out

    def _heatmap(self, maps: Mapping[str, np.ndarray], b: int, size: tuple[int, int], sigma: float) -> np.ndarray:
        """Return the heat map of row `b`, float32 (height, width)."""
        total = np.zeros(size, np.float32)
        for level, memory in self.memories.items():
            total += resize(memory.distances(maps[level][b]), size, sigma)
        return total / len(self.memories)

    def without(self, images: np.ndarray) -> PatchMemory:
        """See `Localizer.without`. A memory that holds nothing else is left as it is."""
        return replace(self, memories={level: _without(memory, images) for level, memory in self.memories.items()})

    def save(self, folder: Path) -> None:
        """Write localizer.json and memory.safetensors."""
        save_file({level: memory.values for level, memory in self.memories.items()}, folder / "memory.safetensors")
        scales = {level: memory.scale for level, memory in self.memories.items()}
        config = {"method": "patch_memory", "sigma": self.sigma, "scales": scales, "tiles": self.tiles}
        write_json(folder / "localizer.json", config)

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any]) -> PatchMemory:
        """Read what `save` wrote."""
        values = load_file(folder / "memory.safetensors")
        memories = {level: LevelMemory(values[level], scale) for level, scale in config["scales"].items()}
        return cls(memories, config["sigma"], config["tiles"])


def _memory(parts: list[np.ndarray], sources: np.ndarray, limit: int, seed: int) -> LevelMemory:
    """Choose a memory of at most `limit` rows of parts (P, C), whose images are `sources`, and measure its scale."""
    pool = np.concatenate(parts)
    of = np.repeat(sources, [len(part) for part in parts])
    chosen = choose(pool, min(limit, len(pool)), seed)
    memory = LevelMemory(pool[chosen], 1.0, of[chosen])
    away = []
    for fold, _ in split_folds(int(sources.max()) + 1, seed):
        own = np.isin(of, fold)
        away.append(nearest(pool[own], [pack(_without(memory, fold).values)]))
    return replace(memory, scale=float(np.concatenate(away).mean(dtype=np.float64)) or 1.0)


def choose(rows: np.ndarray, size: int, seed: int) -> np.ndarray:
    """Return indices of rows chosen by `greedy_coreset`, int64, at most `size`, without copies of chosen rows.

    Distances are those in a Gaussian random projection to 32 dimensions.
    """
    rng = np.random.default_rng(seed)
    x = rows.astype(np.float32)
    x -= x.mean(axis=0)
    if x.shape[1] > _PROJECTED:
        x = x @ (rng.standard_normal((x.shape[1], _PROJECTED), np.float32) / np.float32(_PROJECTED**0.5))
    first = int(rng.integers(len(x)))
    return greedy_coreset(x, size, first, least=1e-6 * float(np.square(x).sum(axis=1).max()))


def _without(memory: LevelMemory, images: np.ndarray) -> LevelMemory:
    assert memory.sources is not None
    kept = ~np.isin(memory.sources, images)
    if not kept.any():
        return memory
    return replace(memory, values=memory.values[kept], sources=memory.sources[kept])
