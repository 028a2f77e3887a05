# SPDX-License-Identifier: Apache-2.0
"""From a decoded image to a network's input: one function for extraction, scoring, REST and tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from PIL import Image

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class InputRules(Protocol):
    """How a network's input is made, as its training made it."""

    @property
    def interpolation(self) -> str:
        """Of the resize: bilinear or bicubic."""
        ...

    @property
    def mean(self) -> Sequence[float]:
        """Of the channels, on [0, 1]."""
        ...

    @property
    def std(self) -> Sequence[float]:
        """Of the channels, on [0, 1]."""
        ...


def preprocess(rgb: np.ndarray, size: tuple[int, int], rules: InputRules) -> np.ndarray:
    """Resize (antialiased, the whole image: nothing is cropped away) and normalize as the network's training did.

    Parameters
    ----------
    rgb : uint8 (H, W, 3), any size.
    size : network input (height, width), pixels.
    rules : the interpolation, and mean and standard deviation of the channels.

    Returns
    -------
    float32 (3, height, width).
    """
    if rgb.shape[:2] != size:
        image = Image.fromarray(np.ascontiguousarray(rgb))
        rgb = np.asarray(image.resize(size[::-1], _FILTERS[rules.interpolation]))
    x = np.empty((3, *size), np.float32)
    scale, shift = (np.array(v, np.float32)[:, None, None] for v in _affine(rules))
    np.multiply(rgb.transpose(2, 0, 1), scale, out=x)
    x -= shift
    return x


def _affine(rules: InputRules) -> tuple[list[float], list[float]]:
    """Return a and b per channel with (v / 255 - mean) / std = a v - b."""
    return [1 / (255 * s) for s in rules.std], [m / s for m, s in zip(rules.mean, rules.std, strict=True)]
