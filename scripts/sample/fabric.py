# SPDX-License-Identifier: Apache-2.0
"""A texture: two-colored twill, two warp threads over, one under."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sample.shapes import SIZE, Field, Surface, blob, distance_to, mix, path, pixel_grid, rotate, smooth_noise, step


@dataclass(frozen=True)
class Cloth:
    """Position in the cloth of every canvas point, and the cloth's yarn.

    It is counted in threads, `u` across the warp and `v` across the weft.
    """

    u: Field
    v: Field
    pitch: float
    angle: float
    warp_tone: NDArray[np.float64]
    weft_tone: NDArray[np.float64]
    fuzz: Field
    dye: Field
    warp_color: NDArray[np.float64]
    weft_color: NDArray[np.float64]


def draw(rng: np.random.Generator) -> Cloth:
    """Draw how the cloth lies under the camera and what its yarn and dye are like."""
    x, y = pixel_grid()
    pitch, angle = rng.uniform(6.6, 7.0), np.deg2rad(rng.normal(0, 3.5))
    x = x + smooth_noise(rng, 22) * 1.1  # the cloth is never quite flat
    y = y + smooth_noise(rng, 22) * 1.1
    u, v = rotate(x - SIZE / 2, y - SIZE / 2, angle)
    u, v = u / pitch + rng.uniform(60, 90), v / (pitch * rng.uniform(0.97, 1.03)) + rng.uniform(60, 90)
    warp_tone, weft_tone = 1 + rng.normal(0, 0.05, 160), 1 + rng.normal(0, 0.05, 160)
    fuzz = smooth_noise(rng, 0.8)
    dye = 1 + 0.05 * smooth_noise(rng, 14) + 0.04 * smooth_noise(rng, 4)
    warp = np.array([0.27, 0.38, 0.55]) * rng.uniform(0.92, 1.1) + rng.normal(0, 0.008, 3)
    weft = np.array([0.66, 0.67, 0.66]) * rng.uniform(0.95, 1.05) + rng.normal(0, 0.006, 3)
    return Cloth(u, v, pitch, angle, warp_tone, weft_tone, fuzz, dye, warp, weft)


def render(cloth: Cloth, missing: Field | None = None) -> Surface:
    """Render the cloth's surface; `missing` (0..1) takes warp threads away."""
    u, v = cloth.u, cloth.v
    i, j = np.floor(u).astype(int), np.floor(v).astype(int)
    x, y = (u - i) * 2 - 1, (v - j) * 2 - 1
    place = np.mod(i - v, 3.0)  # along the warp: over for 0..2, under the weft for 2..3
    over = ((i - j) % 3 != 0).astype(float)
    warp = np.sqrt(np.clip(1 - (0.95 * x) ** 2, 0, 1)) * (0.55 + 0.45 * np.sin(np.pi * np.clip(place, 0, 2) / 2))
    weft = np.sqrt(np.clip(1 - (0.95 * y) ** 2, 0, 1)) * (0.55 + 0.45 * np.cos(np.pi * x / 2))
    twist = 0.07 * np.sin(2 * np.pi * (v * 2 + x * 0.5))
    warp_shade = (0.30 + 0.80 * warp + twist + 0.10 * x) * cloth.warp_tone[i % 160]
    weft_shade = (0.30 + 0.75 * weft + 0.07 * np.sin(2 * np.pi * (u * 2 + y * 0.5))) * cloth.weft_tone[j % 160]
    warp_rgb, weft_rgb = warp_shade[..., None] * cloth.warp_color, weft_shade[..., None] * cloth.weft_color
    out = np.where(over[..., None] > 0, warp_rgb, weft_rgb)
    if missing is not None:  # the weft lies bare, with a dark gap where the thread was
        bare = (0.22 + 0.55 * np.sqrt(np.clip(1 - y**2, 0, 1)) * (0.65 + 0.35 * np.abs(x)))[
            ..., None
        ] * cloth.weft_color
        out = mix(out, bare, missing)
    return out * (cloth.dye + 0.07 * cloth.fuzz)[..., None]


def _spot(rng: np.random.Generator, margin: float = 28) -> tuple[float, float]:
    return float(rng.uniform(margin, SIZE - margin)), float(rng.uniform(margin, SIZE - margin))


def hole(cloth: Cloth, rng: np.random.Generator) -> Surface:
    """Worn through: dark inside, stray ends at the rim."""
    x, y = pixel_grid()
    inside = blob(rng, x, y, _spot(rng), rng.uniform(10, 16), 0.45) + 0.8 * cloth.fuzz
    out = render(cloth)
    rim = np.exp(-((inside / 2.2) ** 2)) * np.clip(0.5 + 0.5 * cloth.fuzz, 0, 1)
    out = mix(out, np.array([0.10, 0.11, 0.13]), step(inside, 2.0) * 0.93)
    return mix(out, cloth.weft_color * 1.15, 0.7 * rim)


def stain(cloth: Cloth, rng: np.random.Generator) -> Surface:
    """Spill a liquid that dried: tinted, darker towards the edge."""
    x, y = pixel_grid()
    inside = blob(rng, x, y, _spot(rng), rng.uniform(19, 30), 0.4) + 1.5 * smooth_noise(rng, 4)
    tint = np.array([[0.62, 0.46, 0.26], [0.36, 0.37, 0.38], [0.52, 0.30, 0.26]][rng.integers(3)])
    amount = step(inside, 3.5) * (0.6 + 0.4 * np.exp(-((np.clip(inside, 0, None) / 4) ** 2))) * rng.uniform(0.85, 1.0)
    out = render(cloth)
    return out * (1 - amount[..., None] * (1 - tint))


def missing_thread(cloth: Cloth, rng: np.random.Generator) -> Surface:
    """One or two warp threads broken and lost over part of their length."""
    x, y = pixel_grid()
    cx, cy = _spot(rng, 40)
    at = np.unravel_index(np.argmin((x - cx) ** 2 + (y - cy) ** 2), x.shape)
    first, width = np.floor(cloth.u[at]), int(rng.integers(2, 4))
    across = np.minimum(cloth.u - first, first + width - cloth.u) * cloth.pitch
    along = rng.uniform(40, 90) - np.abs(cloth.v - cloth.v[at]) * cloth.pitch
    return render(cloth, missing=step(across, 1.0) * step(along, 4.0))


def cut(cloth: Cloth, rng: np.random.Generator) -> Surface:
    """Cut a clean slit with frayed lips, gaping in the middle."""
    x, y = pixel_grid()
    angle, length = rng.uniform(0, np.pi), rng.uniform(45, 80)
    cx, cy = _spot(rng, 40)
    start = (cx - np.cos(angle) * length / 2, cy - np.sin(angle) * length / 2)
    d, place = distance_to(path(rng, start, angle, length, 0.03, 0.06), x, y)
    gape = rng.uniform(3.0, 5.0) * np.sqrt(np.clip(4 * place * (1 - place), 0, 1)) + 0.3
    edge = gape - d + 0.5 * cloth.fuzz
    out = mix(
        render(cloth),
        cloth.weft_color * 1.2,
        0.75 * np.exp(-(((edge + 1.0) / 1.5) ** 2)) * np.clip(0.7 + 0.4 * cloth.fuzz, 0, 1),
    )
    return mix(out, np.array([0.08, 0.09, 0.11]), step(edge, 1.2) * 0.95)


def foreign_fibre(cloth: Cloth, rng: np.random.Generator) -> Surface:
    """Lay a loose fiber of another yarn on the cloth, with its shadow."""
    x, y = pixel_grid()
    angle = rng.uniform(0, 2 * np.pi)
    points = path(rng, _spot(rng, 48), angle, rng.uniform(70, 120), 0.28)
    points = points + (np.array([SIZE / 2, SIZE / 2]) - points.mean(axis=0)) * 0.5
    color = np.array([[0.72, 0.20, 0.17], [0.92, 0.89, 0.80], [0.12, 0.11, 0.12], [0.80, 0.62, 0.18]][rng.integers(4)])
    thick = rng.uniform(1.5, 2.2)
    shadow, _ = distance_to(points + np.array([1.3, 1.6]), x, y)
    d, _ = distance_to(points, x, y)
    out = render(cloth) * (1 - 0.4 * step(thick - shadow, 2.5))[..., None]
    shade = 0.65 + 0.45 * np.sqrt(np.clip(1 - (d / thick) ** 2, 0, 1)) + 0.06 * cloth.fuzz
    return mix(out, shade[..., None] * color, step(thick - d))


DEFECTS = {"cut": cut, "foreign_fibre": foreign_fibre, "hole": hole, "missing_thread": missing_thread, "stain": stain}
