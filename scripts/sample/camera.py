# SPDX-License-Identifier: Apache-2.0
"""From a surface to a photograph: light, exposure, focus and sensor noise; and the mask of what a defect changed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sample.shapes import OVERSAMPLE, SIZE, Surface

VISIBLE = 0.045
"""Change of brightness, on 0..1, from which a pixel belongs to a defect's mask."""


@dataclass(frozen=True)
class Camera:
    """One exposure.

    `light` is (SIZE, SIZE, 3) and multiplies the surface; `noise` is (SIZE, SIZE, 3), on 0..1; `blur` in pixels.
    """

    light: NDArray[np.float64]
    noise: NDArray[np.float64]
    blur: float


def draw_camera(rng: np.random.Generator, light: float = 0.0) -> Camera:
    """Draw exposure, a gradient across the image, white balance, focus and noise.

    `light` shifts the lamp: 0 as in the training set; towards 1 dimmer, warmer and more one-sided, towards -1 the
    opposite. The draws are the same for every `light`.
    """
    axis = (np.arange(SIZE) + 0.5) / SIZE * 2 - 1
    x, y = np.meshgrid(axis, axis)
    angle, slope = rng.uniform(0, 2 * np.pi), abs(rng.normal(0, 0.07)) + 0.22 * max(light, 0.0)
    gradient = 1 + slope * (x * np.cos(angle) + y * np.sin(angle))
    vignette = 1 - rng.uniform(0.02, 0.10) * (x**2 + y**2)
    exposure = np.exp(rng.normal(0, 0.07) - 0.4 * light)
    warmth = rng.normal(0, 0.012) + 0.09 * light
    balance = np.array([1 + warmth, 1 + rng.normal(0, 0.005), 1 - warmth])
    blur, grain = rng.uniform(0.4, 0.65), rng.uniform(0.008, 0.014)
    luma = rng.standard_normal((SIZE, SIZE, 1)) * grain
    chroma = rng.standard_normal((SIZE, SIZE, 3)) * grain * 0.35
    return Camera((gradient * vignette * exposure)[..., None] * balance, luma + chroma, blur)


def reduce(surface: Surface) -> NDArray[np.float64]:
    """Canvas (CANVAS, CANVAS, 3) -> image (SIZE, SIZE, 3), by averaging."""
    return surface.reshape(SIZE, OVERSAMPLE, SIZE, OVERSAMPLE, 3).mean(axis=(1, 3))


def photograph(image: NDArray[np.float64], camera: Camera) -> NDArray[np.uint8]:
    """Reflectance (SIZE, SIZE, 3) -> uint8 sRGB-like image; bright parts roll off instead of clipping hard."""
    lit = ndimage.gaussian_filter(image * camera.light, (camera.blur, camera.blur, 0))
    lit = np.where(lit > 0.8, 0.8 + 0.2 * np.tanh((lit - 0.8) / 0.2), lit)
    noisy = lit + camera.noise * np.sqrt(
        np.clip(lit, 0.05, None) * 2
    )  # shot noise grows with the square root of the light
    return np.round(np.clip(noisy, 0, 1) * 255).astype(np.uint8)


def apply_defect(
    normal: NDArray[np.float64], flawed: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Keep of `flawed` what is visible, and say where.

    Parameters
    ----------
    normal, flawed : float64 (SIZE, SIZE, 3), the same surface without and with the defect.

    Returns
    -------
    The flawed image, equal to `normal` farther than 6 pixels from the mask, and the mask, bool (SIZE, SIZE).
    """
    change = ndimage.gaussian_filter(np.abs(flawed - normal).max(axis=2), 0.7)
    mask = ndimage.binary_closing(np.pad(change > VISIBLE, 4), iterations=2)[4:-4, 4:-4]
    mask = ndimage.binary_fill_holes(mask)
    labels, n = ndimage.label(mask, np.ones((3, 3)))
    sizes = np.asarray(ndimage.sum_labels(mask, labels, np.arange(n + 1)))
    mask = mask & (sizes >= 10)[labels]
    mask = ndimage.gaussian_filter(mask.astype(float), 1.2) > 0.42  # an annotator's outline is not ragged
    near = ndimage.gaussian_filter(ndimage.binary_dilation(mask, iterations=2).astype(float), 1.0, truncate=3.0)
    return normal + near[..., None] * (flawed - normal), mask
