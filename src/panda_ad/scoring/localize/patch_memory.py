# SPDX-License-Identifier: Apache-2.0
"""Patch memory (PatchCore), for comparison with SPADE.

Source: Roth et al. 2022, https://arxiv.org/abs/2106.08265, sections 3.1-3.3.
Left out: PatchCore's pooling of channels to 1,024, and the re-weighting of its image score, the map's maximum
(`panda_ad.scoring.image_score`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from panda_ad.params import LocalizeParams
from panda_ad.scoring.gallery import greedy_coreset
from panda_ad.scoring.localize.maps import BATCH, Maps, positions, smooth, tensors, upsample
from panda_ad.scoring.localize.search import Packed, nearest, pack
from panda_ad.scoring.localize.tiling import blend, grid
from panda_ad.system.files import write_json

POOL = 50_000
"""Most patches the coreset chooses from, drawn at random: keeps the greedy choice in the processor's cache."""
_PROJECTED = 32  # dimensions in which the coreset measures distances (Johnson-Lindenstrauss, section 3.2)


@dataclass(frozen=True, eq=False)
class PatchMemory:
    """A coreset of the normal images' patch features; a position's anomaly is the Euclidean distance to the nearest.

    Attributes
    ----------
    values : the memory, float16 (K, C), C the sum of the levels' channels.
    sigma : pixels of the heat map.
    levels : of the network, from fine to coarse.
    tiles : tiles per side of an image; 1: the whole image is one.
    sources : int64 (K,), index of the image that each value is of; known until it is saved.
    """

    values: Tensor
    sigma: float
    levels: tuple[str, ...]
    tiles: int = 1
    sources: Tensor | None = field(default=None, repr=False)

    @cached_property
    def _packed(self) -> Packed:
        return pack(self.values)

    @classmethod
    def build(cls, maps: Maps, levels: tuple[str, ...], images: int, params: LocalizeParams, seed: int) -> PatchMemory:
        """Build a memory of a fraction of some images' patches, up to a limit, chosen greedily from up to `POOL`."""
        tiles = params.tiles or 1
        count = images * tiles**2
        generator = torch.Generator().manual_seed(seed)
        parts: list[Tensor] = []
        sources: list[int] = []
        total = 0
        quota = max(1, POOL // count)  # patches drawn from each
        for i in range(0, count, BATCH):
            batch = positions(patch_features(tensors(maps(slice(i, i + BATCH)), levels)))  # (B, P, C)
            total += batch.shape[0] * batch.shape[1]
            for j, rows in enumerate(batch, start=i):
                drawn = torch.randperm(len(rows), generator=generator)[:quota].sort().values
                parts.append(rows[drawn])
                sources += [j // tiles**2] * len(drawn)
        pool = torch.cat(parts)
        size = min(max(1, round(params.memory_fraction * total)), params.memory_limit, len(pool))
        chosen = choose(pool, size, generator)
        return cls(pool[chosen], params.sigma, levels, tiles, torch.tensor(sources)[chosen])

    def heatmaps(self, maps: Mapping[str, np.ndarray], _pooled: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """See `Localizer.heatmaps`."""
        shape, overlap = grid(size, self.tiles)
        per_image = self.tiles**2
        layers = tensors(maps, self.levels)
        out = np.empty((len(layers[self.levels[0]]) // per_image, *shape), np.float32)
        for i in range(len(out)):
            parts = [self._sharp(layers, b, size) for b in range(i * per_image, (i + 1) * per_image)]
            out[i] = smooth(torch.from_numpy(blend(parts, shape, size, overlap)), self.sigma)
        return out

    def _sharp(self, maps: dict[str, Tensor], b: int, size: tuple[int, int]) -> np.ndarray:
        """Return the heat map of row `b` before smoothing, float32 (height, width)."""
        features = patch_features({level: values[b : b + 1] for level, values in maps.items()})  # (1, C, h, w)
        distances = nearest(positions(features)[0], [self._packed])
        sharp: np.ndarray = upsample(distances, (features.shape[2], features.shape[3]), size).numpy()
        return sharp

    def without(self, images: np.ndarray) -> PatchMemory:
        """See `Localizer.without`. A memory that holds nothing else is left as it is."""
        assert self.sources is not None
        kept = ~torch.isin(self.sources, torch.from_numpy(images))
        if not kept.any():
            return self
        return replace(self, values=self.values[kept], sources=self.sources[kept])

    def save(self, folder: Path) -> None:
        """Write localizer.json and memory.safetensors."""
        save_file({"values": self.values.contiguous()}, folder / "memory.safetensors")
        config = {"method": "patch_memory", "sigma": self.sigma, "levels": self.levels, "tiles": self.tiles}
        write_json(folder / "localizer.json", config)

    @classmethod
    def load(cls, folder: Path, config: dict[str, Any]) -> PatchMemory:
        """Read what `save` wrote."""
        values = load_file(folder / "memory.safetensors")["values"]
        return cls(values, config["sigma"], tuple(config["levels"]), config["tiles"])


def patch_features(maps: dict[str, Tensor]) -> Tensor:
    """Return locally aware patch features, all levels on the first one's grid.

    Each is the mean of a 3 x 3 neighborhood, of what lies inside the map.

    (B, C1, h, w), (B, C2, h', w'), ... -> float16 (B, C1 + C2 + ..., h, w). Each image is computed alone.
    """
    out = []
    for levels in zip(*maps.values(), strict=True):
        first, *others = (nn.functional.avg_pool2d(x[None].float(), 3, 1, 1, count_include_pad=False) for x in levels)
        shape = first.shape[2:]
        others = [nn.functional.interpolate(x, size=shape, mode="bilinear", align_corners=False) for x in others]
        out.append(torch.cat([first, *others], dim=1).half())
    return torch.cat(out)


def choose(rows: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Return indices of rows chosen by `greedy_coreset`, int64, at most `size`, without copies of chosen rows.

    Distances are those in a Gaussian random projection to 32 dimensions.
    """
    x = rows.float()
    x = x - x.mean(0)
    if x.shape[1] > _PROJECTED:
        x = x @ torch.randn(x.shape[1], _PROJECTED, generator=generator) / _PROJECTED**0.5
    first = int(torch.randint(len(x), (1,), generator=generator))
    return greedy_coreset(x, size, first, least=1e-6 * float(x.square().sum(1).max()))
