"""A backbone with the adapted layers of each snapshot: images become activations, activations become features and maps."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from panda_ad.features.backbones import AdaptedLayers, Backbone, frozen_activations, in_micro_batches, preprocess

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
    def frozen_level(self) -> str:
        """Level at which the frozen layers end: what the adapted layers read."""
        return "layer2"

    @property
    def frozen_levels(self) -> tuple[str, ...]:
        """Levels of `activations`."""
        return ("layer1", "layer2")

    def preprocess(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 (H, W, 3) of any size -> float32 (N, 3, *size)."""
        return torch.stack([preprocess(image, self.size) for image in images])

    def activations(self, pixels: Tensor) -> dict[str, np.ndarray]:
        """Frozen activations of preprocessed images, float32 (N, 3, H, W)."""
        values = frozen_activations(self.backbone, pixels, self.precision)
        return {level: value.numpy() for level, value in zip(self.frozen_levels, values, strict=True)}

    def features(self, activations: Activations, pretrained: np.ndarray | None = None) -> list[np.ndarray]:
        """Pooled features of N images under each snapshot, S arrays (N, D) float32.

        `pretrained` (N, D) are those under the pretrained layers, where they are known already.
        """
        values = torch.from_numpy(activations[self.frozen_level])
        out: list[np.ndarray] = []
        for adapted, step in zip(self.adapted, self.steps, strict=True):
            if pretrained is not None and step == 0:
                out.append(pretrained)
            else:
                (pooled,) = in_micro_batches(lambda x, adapted=adapted: adapted(x.float()), values)
                out.append(pooled.numpy())
        return out

    def features_and_maps(
        self, activations: Activations, pretrained: np.ndarray | None = None
    ) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
        """`features`, and activations with the levels that the last snapshot adds; its layers are run once for both."""
        last = self.adapted[-1]

        def pooled_and_map(x: Tensor) -> tuple[Tensor, Tensor]:
            layer3, layer4 = last.maps(x.float())
            return layer4.mean(dim=(2, 3)), layer3

        others = Network(self.backbone, self.adapted[:-1], self.steps[:-1], self.size, self.precision)
        pooled, layer3 = in_micro_batches(pooled_and_map, torch.from_numpy(activations[self.frozen_level]))
        maps = {**activations, "layer3": layer3.half().numpy()}
        return [*others.features(activations, pretrained), pooled.numpy()], maps

    def maps(self, activations: Activations) -> dict[str, np.ndarray]:
        """Activations with the levels that the last snapshot adds, float16."""
        values = torch.from_numpy(activations[self.frozen_level])
        (layer3,) = in_micro_batches(lambda x: self.adapted[-1].layer3(x.float()), values)
        return {**activations, "layer3": layer3.half().numpy()}


def with_state(adapted: AdaptedLayers, state: Mapping[str, Tensor]) -> AdaptedLayers:
    """Return a copy of the adapted layers with other weights."""
    other = copy.deepcopy(adapted)
    other.load_state_dict(dict(state), strict=False)
    return other
