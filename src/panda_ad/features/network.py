# SPDX-License-Identifier: Apache-2.0
"""A backbone with the adapted layers of each snapshot.

Images become activations, activations become features and maps.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from panda_ad.features.backbones import AdaptedLayers, Backbone, frozen_activations, in_micro_batches
from panda_ad.features.preprocessing import preprocess

Activations = Mapping[str, np.ndarray]
"""Level name to float16 (N, C, h, w)."""


@dataclass(frozen=True)
class Network:
    """What scoring needs of a network. All arrays are NumPy's; only this class knows how they are computed.

    Attributes
    ----------
    backbone : its frozen layers, and the pretrained state of the adapted ones.
    adapted : adapted layers of each snapshot.
    steps : training step of each snapshot; 0 is the pretrained one.
    size : network input (height, width), pixels.
    precision : of the frozen layers at training; kept when served elsewhere, so that scores keep their scale.
    """

    backbone: Backbone
    adapted: tuple[AdaptedLayers, ...]
    steps: tuple[int, ...]
    size: tuple[int, int]
    precision: torch.dtype

    @property
    def frozen_levels(self) -> tuple[str, ...]:
        """Levels of `activations`; the adapted layers read the last."""
        return self.backbone.frozen.levels

    @property
    def inner_levels(self) -> tuple[str, ...]:
        """Levels before the pooled features, from fine to coarse: those that heat maps may compare."""
        return (*self.frozen_levels, *self.backbone.adapted.levels[:-1])

    @property
    def map_levels(self) -> tuple[str, ...]:
        """Levels that a patch memory compares."""
        return self.backbone.architecture.map_levels

    def preprocess(self, images: Sequence[np.ndarray], size: tuple[int, int] | None = None) -> np.ndarray:
        """Resize and normalize images, uint8 (H, W, 3) of any size: float32 (N, 3, H, W), of `size` or the input's."""
        return np.stack([preprocess(image, size or self.size, self.backbone.architecture) for image in images])

    def activations(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Return frozen activations of preprocessed images, float32 (N, 3, H, W)."""
        values = frozen_activations(self.backbone, torch.from_numpy(pixels), self.precision)
        return {level: value.numpy() for level, value in zip(self.frozen_levels, values, strict=True)}

    def features(self, activations: Activations, pretrained: np.ndarray | None = None) -> list[np.ndarray]:
        """Return pooled features of N images under each snapshot, S arrays (N, D) float32.

        `pretrained` (N, D) are those under the pretrained layers, where they are known already.
        """
        values = torch.from_numpy(activations[self.frozen_levels[-1]])
        out: list[np.ndarray] = []
        for adapted, step in zip(self.adapted, self.steps, strict=True):
            if pretrained is not None and step == 0:
                out.append(pretrained)
            else:
                (pooled,) = in_micro_batches(lambda x, adapted=adapted: adapted(x.float()), values)
                out.append(pooled.numpy())
        return out

    def features_and_maps(
        self, activations: Activations, levels: Sequence[str], pretrained: np.ndarray | None = None
    ) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
        """Return `features`, and maps of some levels under the last snapshot, whose layers are run once for both."""
        if set(levels) <= set(self.frozen_levels):
            return self.features(activations, pretrained), {level: activations[level] for level in levels}
        last = self.adapted[-1]

        def pooled_and_maps(x: Tensor) -> tuple[Tensor, ...]:
            x = x.float()
            maps = last.maps(x)
            return (last.pool(x, maps), *maps)

        others = replace(self, adapted=self.adapted[:-1], steps=self.steps[:-1])
        pooled, *maps = in_micro_batches(pooled_and_maps, torch.from_numpy(activations[self.frozen_levels[-1]]))
        known = {**activations, **_halves(dict(zip(last.levels, maps, strict=False)))}
        features = [*others.features(activations, pretrained), pooled.numpy()]
        return features, {level: known[level] for level in levels}

    def maps(self, activations: Activations, levels: Sequence[str]) -> dict[str, np.ndarray]:
        """Return maps of some levels under the last snapshot, float16 (N, C, h, w) each."""
        wanted = set(levels) - set(self.frozen_levels)
        known = dict(activations)
        if wanted:
            last = self.adapted[-1]
            values = torch.from_numpy(activations[self.frozen_levels[-1]])
            maps = in_micro_batches(lambda x: _first_levels(last, x.float(), wanted), values)
            known |= _halves(dict(zip(last.levels, maps, strict=False)))
        return {level: known[level] for level in levels}


def _first_levels(layers: AdaptedLayers, x: Tensor, wanted: set[str]) -> tuple[Tensor, ...]:
    """Run layers until all wanted levels are there; return every level on the way."""
    found: dict[str, Tensor] = {}
    for name, module in layers.named_children():
        x = module(x)
        if name in layers.levels:
            found[name] = x
        if wanted <= found.keys():
            break
    return tuple(found.values())


def _halves(maps: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    limit = torch.finfo(torch.float16).max
    return {level: values.clamp(-limit, limit).half().numpy() for level, values in maps.items()}


def with_state(adapted: AdaptedLayers, state: Mapping[str, Tensor]) -> AdaptedLayers:
    """Return a copy of the adapted layers with other weights."""
    other = copy.deepcopy(adapted)
    other.load_state_dict(dict(state), strict=False)
    return other
