# SPDX-License-Identifier: Apache-2.0
"""A regular structure: brushed sheet metal with round perforations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from sample.shapes import (
    OVERSAMPLE,
    SIZE,
    Field,
    Surface,
    blob,
    distance_to,
    mix,
    path,
    pixel_grid,
    rotate,
    smooth_noise,
    step,
)


@dataclass(frozen=True)
class Sheet:
    """Position on the sheet of every canvas point, and the sheet's finish.

    `u` and `v` are in pixels, holes at multiples of `pitch`.
    """

    u: Field
    v: Field
    pitch: float
    radius: float
    angle: float
    wall: tuple[float, float]
    brushed: Field
    patches: Field
    color: NDArray[np.float64]
    backing: NDArray[np.float64]


def draw(rng: np.random.Generator) -> Sheet:
    """Draw how the sheet lies under the camera, its finish and what is behind it."""
    x, y = pixel_grid()
    pitch, angle = rng.uniform(23.5, 25), np.deg2rad(rng.normal(0, 2.5))
    u, v = rotate(x - SIZE / 2, y - SIZE / 2, angle)
    keystone = 1 + rng.normal(0, 0.012) * u / SIZE + rng.normal(0, 0.012) * v / SIZE
    u, v = u * keystone + rng.uniform(10, 12) * pitch, v * keystone + rng.uniform(10, 12) * pitch
    fine, coarse = smooth_noise(rng, (0.5, 10)), smooth_noise(rng, (1.2, 26))
    brushed = 0.04 * fine + 0.025 * coarse
    brushed = ndimage.rotate(
        np.pad(brushed, 60, mode="wrap"), -np.rad2deg(angle), reshape=False, order=1, mode="nearest"
    )[60:-60, 60:-60]
    patches = 0.03 * smooth_noise(rng, 18)
    color = np.array([0.62, 0.63, 0.64]) * rng.uniform(0.95, 1.06) + rng.normal(0, 0.006, 3)
    backing = np.array([0.13, 0.14, 0.16]) * rng.uniform(0.8, 1.3)
    wall_angle, depth = rng.uniform(0, 2 * np.pi), rng.uniform(1.0, 1.6)
    wall = (depth * np.cos(wall_angle), depth * np.sin(wall_angle))
    return Sheet(u, v, pitch, pitch * rng.uniform(0.295, 0.315), angle, wall, brushed, patches, color, backing)


def _to_hole(sheet: Sheet, u: Field, v: Field) -> tuple[Field, Field]:
    """Offset to the center of the nearest hole, pixels."""
    half = sheet.pitch / 2
    return np.mod(u + half, sheet.pitch) - half, np.mod(v + half, sheet.pitch) - half


def render(sheet: Sheet, u: Field | None = None, v: Field | None = None, opened: Field | None = None) -> Surface:
    """Render the sheet's surface.

    `u`, `v` replace its own coordinates; `opened` (pixels, positive inside) is a further opening.
    """
    u = sheet.u if u is None else u
    v = sheet.v if v is None else v
    du, dv = _to_hole(sheet, u, v)
    inside = sheet.radius - np.hypot(du, dv)
    below = sheet.radius - np.hypot(du - sheet.wall[0], dv - sheet.wall[1])  # the far edge, seen through the hole
    if opened is not None:
        shift = [round(w * OVERSAMPLE) for w in (sheet.wall[1], sheet.wall[0])]
        inside, below = np.maximum(inside, opened), np.maximum(below, np.roll(opened, shift, axis=(0, 1)))
    metal = (1 + sheet.brushed + sheet.patches)[..., None] * sheet.color
    slope = (
        np.gradient(inside, axis=1) * 0.6 + np.gradient(inside, axis=0) * 0.8
    )  # the bevel catches light from the lower right
    rim = np.exp(-(((inside + 0.9) / 0.9) ** 2))
    metal = metal * (1 + 0.55 * rim * slope * OVERSAMPLE)[..., None]
    wall = sheet.color * 0.62
    out = mix(metal, np.broadcast_to(wall, metal.shape), step(inside, 0.8))
    return mix(out, np.broadcast_to(sheet.backing, metal.shape), step(np.minimum(inside, below), 0.9))


def _hole_center(sheet: Sheet, rng: np.random.Generator, margin: float = 32) -> tuple[float, float]:
    """Image coordinates of a hole's center in the middle of the image."""
    x, y = pixel_grid()
    du, dv = _to_hole(sheet, sheet.u, sheet.v)
    inner = (np.minimum(x, y) > margin) & (np.maximum(x, y) < SIZE - margin)
    candidates = np.argwhere(inner & (np.hypot(du, dv) < 0.8))
    row, column = candidates[rng.integers(len(candidates))]
    return float(x[row, column]), float(y[row, column])


def blocked(sheet: Sheet, rng: np.random.Generator) -> Surface:
    """Clog a hole with paint or dirt that spills over its rim."""
    x, y = pixel_grid()
    center = _hole_center(sheet, rng, 24)
    lump = blob(rng, x, y, center, sheet.radius * rng.uniform(1.3, 2.6), 0.35)
    color = np.array([[0.50, 0.49, 0.46], [0.30, 0.24, 0.19], [0.66, 0.62, 0.52]][rng.integers(3)])
    relief = np.gradient(ndimage.gaussian_filter(np.clip(lump, 0, 4) + 0.7 * smooth_noise(rng, 1.5), 2), axis=0)
    shade = 1 + 0.9 * relief + 0.06 * smooth_noise(rng, 1.0)
    return mix(render(sheet), shade[..., None] * color, step(lump, 1.2))


def broken(sheet: Sheet, rng: np.random.Generator) -> Surface:
    """Tear out the bridge between two neighboring holes, or two or three in a row."""
    x, y = pixel_grid()
    cx, cy = _hole_center(sheet, rng)
    angle = sheet.angle + rng.integers(4) * np.pi / 2
    d, _ = distance_to(path(rng, (cx, cy), angle, sheet.pitch * rng.integers(1, 4), 0.02, 0.06), x, y)
    return render(sheet, opened=rng.uniform(3.6, 5.8) - d + 0.8 * smooth_noise(rng, 1.2))


def bent(sheet: Sheet, rng: np.random.Generator) -> Surface:
    """Dent the sheet: holes pushed out of line, light falling differently."""
    x, y = pixel_grid()
    cx, cy = _hole_center(sheet, rng, 44)
    sigma, angle = rng.uniform(15, 21), rng.uniform(0, 2 * np.pi)
    dx, dy = (x - cx) / sigma, (y - cy) / sigma
    bump = np.exp(-(dx**2 + dy**2) / 2)
    push = rng.uniform(7, 10)
    u = sheet.u + push * bump * np.cos(angle)
    v = sheet.v + push * bump * np.sin(angle)
    shade = 1 + rng.uniform(0.45, 0.65) * bump * (dx * np.cos(angle) + dy * np.sin(angle))
    return render(sheet, u, v) * np.clip(shade, 0.3, 1.6)[..., None]


def scratch(sheet: Sheet, rng: np.random.Generator) -> Surface:
    """Draw a few parallel gouges, bright with a dark lip."""
    x, y = pixel_grid()
    out = render(sheet)
    angle, length = rng.uniform(0, np.pi), rng.uniform(75, 120)
    cx, cy = rng.uniform(60, SIZE - 60, 2)
    du, dv = _to_hole(sheet, sheet.u, sheet.v)
    metal = step(np.hypot(du, dv) - sheet.radius - 0.5)
    for _ in range(rng.integers(3, 7)):
        gap = rng.normal(0, 8, 2)
        start = (cx - np.cos(angle) * length / 2 + gap[0], cy - np.sin(angle) * length / 2 + gap[1])
        points = path(rng, start, angle + rng.normal(0, 0.05), length * rng.uniform(0.6, 1), 0.03)
        d, place = distance_to(points, x, y)
        lip, _ = distance_to(points + np.array([0.9, 1.1]), x, y)
        width = rng.uniform(1.0, 1.7) * np.sqrt(np.clip(4 * place * (1 - place), 0.05, 1))
        out = mix(out, sheet.color * 0.45, metal * step(width - lip) * 0.8)
        out = mix(out, np.minimum(sheet.color * 1.5, 1.0), metal * step(width - d))
    return out


def rust(sheet: Sheet, rng: np.random.Generator) -> Surface:
    """Corrosion creeping over the metal, blotchy."""
    x, y = pixel_grid()
    reach = blob(rng, x, y, tuple(rng.uniform(40, SIZE - 40, 2)), rng.uniform(18, 28), 0.35) / 6 + 1.1 * smooth_noise(
        rng, 3.0
    )
    du, dv = _to_hole(sheet, sheet.u, sheet.v)
    metal = step(np.hypot(du, dv) - sheet.radius)
    grain = 1 + 0.16 * smooth_noise(rng, 0.9)
    color = np.array([0.47, 0.29, 0.17]) * rng.uniform(0.85, 1.15)
    return mix(render(sheet), grain[..., None] * color, metal * np.clip(reach * 0.6, 0, 1) * 0.85)


DEFECTS = {"bent": bent, "blocked": blocked, "broken": broken, "rust": rust, "scratch": scratch}
