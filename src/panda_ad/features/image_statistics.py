# SPDX-License-Identifier: Apache-2.0
"""What a photograph is like, whatever it shows: light, contrast, focus, color. One number each, none needs a network.

Values are the decoded sRGB bytes divided by 255, not linear light.
Luma is Y = 0.2126 R + 0.7152 G + 0.0722 B (Rec. 709).
Contrast, sharpness and color are ratios, so that a dimmer lamp alone moves brightness and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

LONGEST = 1024
"""Pixels; a larger image is first reduced by whole factors, so that a camera's image always ends at the same size."""
FINE, COARSE = 1.0, 4.0  # pixels, of the Laplacian of Gaussian
_LUMA = (np.float32(0.2126), np.float32(0.7152), np.float32(0.0722))
_TINY = 1e-7  # below the noise of rounding to bytes (1 / 255)^2 / 12, under the fine filter


@dataclass(frozen=True)
class Statistic:
    """One image statistic.

    Attributes
    ----------
    name : column of the log and key of `image_statistics`.
    unit : what it is counted in.
    resolution : a spread below this counts as this: smaller changes are no change, however steady the camera.
    lower, higher : what a shift down or up is called.
    """

    name: str
    unit: str
    resolution: float
    lower: str
    higher: str


STATISTICS: tuple[Statistic, ...] = (
    Statistic("brightness", "mean luma, 0 to 1", 1 / 255, "darker", "brighter"),
    Statistic("contrast", "standard deviation of luma / mean luma", 1 / 255, "lower contrast", "higher contrast"),
    Statistic("sharpness", "ln of the ratio of fine to coarse detail", 0.05, "out of focus", "sharper or noisier"),
    Statistic(
        "red_green",
        "(mean R - mean G) / mean of R, G, B",
        1 / 255,
        "color cast towards green",
        "color cast towards red",
    ),
    Statistic(
        "yellow_blue",
        "(mean of R and G - mean B) / mean of R, G, B",
        1 / 255,
        "color cast towards blue",
        "color cast towards yellow",
    ),
    Statistic("saturation", "mean of (max - min of R, G, B) / mean of max", 1 / 255, "paler colors", "stronger colors"),
)
NAMES: tuple[str, ...] = tuple(s.name for s in STATISTICS)


def as_float16(values: np.ndarray) -> np.ndarray:
    """Return the values rounded to float16, those beyond its range at its end: infinity has no distance.

    Whitened features of a part that never varied may lie beyond it.
    """
    limit = np.finfo(np.float16).max
    return values.clip(-limit, limit).astype(np.float16)


@dataclass(frozen=True)
class Reference:
    """What a model's calibration images are like; their scores are the model's calibration.

    Attributes
    ----------
    statistics : (M, S) float32, columns as `NAMES`.
    features : (M, D) float16, under the last snapshot, whitened by images of the other folds.
    """

    statistics: np.ndarray
    features: np.ndarray


def image_statistics(rgb: np.ndarray) -> dict[str, float]:
    """Return the statistics of one image.

    brightness   mean of luma Y, in [0, 1]
    contrast     standard deviation of Y / mean of Y (RMS contrast, Peli 1990), >= 0
    sharpness    ln(V(1) / V(4)), V(s) the variance of Y's Laplacian of Gaussian at s pixels, as s^2 LoG (Lindeberg
                 1998). The variance of a Laplacian is a common measure of focus (Pech-Pacheco et al. 2000).
                 The coarse one in the denominator takes out contrast and uneven light.
                 No unit; a flat image has 0.
    red_green    (mean R - mean G) / mean of R, G and B
    yellow_blue  ((mean R + mean G) / 2 - mean B) / mean of R, G and B
    saturation   mean of (max - min over R, G, B) / mean of max, in [0, 1]

    Parameters
    ----------
    rgb : uint8 (H, W, 3).

    Returns
    -------
    Finite floats by the names of `STATISTICS`, in their order.
    """
    x = _reduced(rgb)
    luma = x[..., 0] * _LUMA[0] + x[..., 1] * _LUMA[1] + x[..., 2] * _LUMA[2]
    red, green, blue = (float(v) for v in x.mean(axis=(0, 1), dtype=np.float64))
    gray = max((red + green + blue) / 3, 1 / 255)  # a black image has no color
    largest = x.max(axis=2)
    brightness = float(luma.mean(dtype=np.float64))
    fine, coarse = (float((s**2 * ndimage.gaussian_laplace(luma, s)).var(dtype=np.float64)) for s in (FINE, COARSE))
    values = (
        brightness,
        float(luma.std(dtype=np.float64)) / max(brightness, 1 / 255),
        float(np.log((fine + _TINY) / (coarse + _TINY))),
        (red - green) / gray,
        ((red + green) / 2 - blue) / gray,
        float((largest - x.min(axis=2)).mean(dtype=np.float64)) / max(float(largest.mean(dtype=np.float64)), 1 / 255),
    )
    return dict(zip(NAMES, values, strict=True))


def statistics_matrix(images: Sequence[dict[str, float]]) -> np.ndarray:
    """Return statistics of N images as float64 (N, S), columns as in `NAMES`."""
    return np.array([[image[name] for name in NAMES] for image in images], np.float64).reshape(len(images), len(NAMES))


def _reduced(rgb: np.ndarray) -> np.ndarray:
    """Return float32 (h, w, 3) on [0, 1], at most LONGEST pixels a side.

    Its pixels are means of whole blocks; what is left at the edges is cut off.
    """
    factor = -(-max(rgb.shape[:2]) // LONGEST)
    if factor == 1:
        return rgb.astype(np.float32) / np.float32(255)
    h, w = (max(1, n // factor) for n in rgb.shape[:2])
    total = np.zeros((h, w, 3), np.float32)
    count = 0
    for i in range(min(factor, rgb.shape[0])):
        for j in range(min(factor, rgb.shape[1])):  # one slice at a time: an image may have 100 million pixels
            total += rgb[i::factor, j::factor][:h, :w]
            count += 1
    return total / np.float32(255 * count)
