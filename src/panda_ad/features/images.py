# SPDX-License-Identifier: Apache-2.0
"""Images as fitting and scoring read them: pixels, frozen activations and pretrained features.

They come from a cache, or are computed at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import numpy as np

from panda_ad.features.cache import Activations, Item

if TYPE_CHECKING:
    from panda_ad.features.network import Network

Index = slice | np.ndarray


class Images(Protocol):
    """A sequence of N images."""

    @property
    def names(self) -> Sequence[str]:
        """Paths, for people."""
        ...

    @property
    def keys(self) -> Sequence[str]:
        """sha256 in hex, for machines."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> np.ndarray:
        """Return one image's pixels, uint8 (H, W, 3)."""
        ...

    def activations(self, index: Index, levels: Sequence[str]) -> dict[str, np.ndarray]:
        """Return frozen activations, float16 (B, C, h, w) per level."""
        ...

    def pretrained(self, index: Index) -> np.ndarray | None:
        """Return features under the pretrained layers, float32 (B, D), where they are known."""
        ...


@dataclass(frozen=True)
class CachedImages:
    """Images of the activation cache.

    Attributes
    ----------
    cache : of activations.
    items : the images.
    names : their paths.
    features : float32 (N, D) under the pretrained layers, or None.
    """

    cache: Activations
    items: Sequence[Item]
    names: Sequence[str]
    features: np.ndarray | None = None

    @property
    def keys(self) -> Sequence[str]:
        """See `Images`."""
        return [item.key for item in self.items]

    def __len__(self) -> int:
        return len(self.items)

    def read(self, index: int) -> np.ndarray:
        """See `Images`."""
        return self.items[index].read()

    def activations(self, index: Index, levels: Sequence[str]) -> dict[str, np.ndarray]:
        """See `Images`."""
        chosen = [self.items[i] for i in np.arange(len(self.items))[index]]
        return {level: self.cache.view(chosen, level)[:] for level in levels}

    def pretrained(self, index: Index) -> np.ndarray | None:
        """See `Images`."""
        return None if self.features is None else np.asarray(self.features[index])


@dataclass(frozen=True)
class DecodedImages:
    """A few images in memory, sent through the network at each use.

    Attributes
    ----------
    network : computes their activations.
    pixels : uint8 (H, W, 3) each.
    """

    network: Network
    pixels: Sequence[np.ndarray]

    @cached_property
    def names(self) -> Sequence[str]:
        """See `Images`."""
        return [str(i) for i in range(len(self.pixels))]

    @cached_property
    def keys(self) -> Sequence[str]:
        """See `Images`: sha256 of the pixels."""
        return [hashlib.sha256(np.ascontiguousarray(image).data).hexdigest() for image in self.pixels]

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, index: int) -> np.ndarray:
        """See `Images`."""
        return self.pixels[index]

    def activations(self, index: Index, levels: Sequence[str]) -> dict[str, np.ndarray]:
        """See `Images`."""
        chosen = [self.pixels[i] for i in np.arange(len(self.pixels))[index]]
        found = self.network.activations(self.network.preprocess(chosen))
        return {level: found[level] for level in levels}

    def pretrained(self, _index: Index) -> np.ndarray | None:
        """See `Images`: unknown."""
        return None
