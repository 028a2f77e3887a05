# SPDX-License-Identifier: Apache-2.0
"""Fields on the drawing canvas: coordinates, smooth noise, blobs, paths.

Lengths are in pixels of the finished image.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

SIZE = 160
"""Side of a finished image, pixels."""
OVERSAMPLE = 2
"""Surfaces are drawn finer by this factor and averaged down, which removes jagged edges."""
CANVAS = SIZE * OVERSAMPLE

Field = NDArray[np.float64]
"""(CANVAS, CANVAS) float64."""
Surface = NDArray[np.float64]
"""(CANVAS, CANVAS, 3) float64, reflectance in 0..1."""


def pixel_grid() -> tuple[Field, Field]:
    """Return x and y of every canvas point, 0..SIZE."""
    axis = (np.arange(CANVAS) + 0.5) / OVERSAMPLE
    x, y = np.meshgrid(axis, axis)
    return x, y


def rotate(x: Field, y: Field, angle: float) -> tuple[Field, Field]:
    """Coordinates in a frame turned by `angle`, radians."""
    c, s = np.cos(angle), np.sin(angle)
    return c * x + s * y, -s * x + c * y


def step(distance: Field, width: float = 0.7) -> Field:
    """Return a smooth step, 0..1: 1 where `distance` (pixels, positive inside) is well above 0.

    `width` is the softness of the edge, pixels.
    """
    return np.clip(distance / width * 0.5 + 0.5, 0.0, 1.0)


def smooth_noise(rng: np.random.Generator, sigma: float | tuple[float, float]) -> Field:
    """Gaussian noise smoothed by `sigma` (pixels; a pair: along y, along x), mean 0, standard deviation 1."""
    sigmas = np.broadcast_to(np.asarray(sigma, dtype=float) * OVERSAMPLE, (2,))
    shrink = max(1, int(sigmas.min() / 3))  # coarse noise is drawn coarsely: the same field for a fraction of the time
    side = CANVAS // shrink + 2
    noise = ndimage.gaussian_filter(rng.standard_normal((side, side)), sigmas / shrink, mode="wrap")
    noise = (noise - noise.mean()) / noise.std()
    if shrink > 1:
        at = np.arange(CANVAS) / shrink
        noise = ndimage.map_coordinates(noise, np.meshgrid(at, at, indexing="ij"), order=1)
    return noise[:CANVAS, :CANVAS]


def blob(
    rng: np.random.Generator, x: Field, y: Field, center: tuple[float, float], radius: float, roughness: float = 0.25
) -> Field:
    """Signed distance, roughly, to the edge of an irregular round patch: positive inside, pixels."""
    stretch = rng.uniform(0.75, 1.3)
    dx, dy = rotate(x - center[0], y - center[1], rng.uniform(0, np.pi))
    dx, dy = dx * stretch, dy / stretch
    angle = np.arctan2(dy, dx)
    edge = np.full_like(x, radius)
    for k in range(2, 7):
        edge += radius * roughness / k * rng.normal() * np.cos(k * angle + rng.uniform(0, 2 * np.pi))
    return edge - np.hypot(dx, dy)


def path(
    rng: np.random.Generator, start: tuple[float, float], angle: float, length: float, bend: float, jag: float = 0.0
) -> NDArray[np.float64]:
    """Return a wandering line: points (n, 2) x, y about 4 pixels apart.

    `bend` is the standard deviation of a slow turn, `jag` of an abrupt one, both in radians per point.
    """
    n = max(3, int(length / 4))
    turn = (
        np.cumsum(ndimage.gaussian_filter1d(rng.normal(0, 1, n), 2, mode="nearest")) * bend + rng.normal(0, 1, n) * jag
    )
    heading = angle + turn
    steps = np.stack([np.cos(heading), np.sin(heading)], axis=1) * (length / n)
    return np.vstack([start, np.asarray(start) + np.cumsum(steps, axis=0)])


def distance_to(points: NDArray[np.float64], x: Field, y: Field, reach: float = 14.0) -> tuple[Field, Field]:
    """Distance to a polyline (n, 2) and the place along it, 0..1, of the nearest point, for every canvas point.

    Farther than `reach` pixels from the line's bounding box the distance is infinite and the place 0.
    This is most of the canvas.
    """
    low, high = points.min(axis=0) - reach, points.max(axis=0) + reach
    near = (x > low[0]) & (x < high[0]) & (y > low[1]) & (y < high[1])
    px, py = x[near], y[near]
    nearest, place = np.full_like(px, np.inf), np.zeros_like(px)
    n = len(points) - 1
    for i in range(n):
        a, ab = points[i], points[i + 1] - points[i]
        t = np.clip(((px - a[0]) * ab[0] + (py - a[1]) * ab[1]) / max(float(ab @ ab), 1e-9), 0, 1)
        d = np.hypot(px - a[0] - t * ab[0], py - a[1] - t * ab[1])
        closer = d < nearest
        nearest = np.where(closer, d, nearest)
        place = np.where(closer, (i + t) / n, place)
    distance, along = np.full_like(x, np.inf), np.zeros_like(x)
    distance[near], along[near] = nearest, place
    return distance, along


def mix(below: Surface, above: Surface | NDArray[np.float64], alpha: Field) -> Surface:
    """`above` (a surface or one color) over `below` with opacity `alpha`, 0..1."""
    return below + alpha[..., None] * (above - below)
