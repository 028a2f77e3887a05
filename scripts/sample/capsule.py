# SPDX-License-Identifier: Apache-2.0
"""An object: a printed two-part capsule lying on a conveyor."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sample.shapes import SIZE, Field, Surface, blob, distance_to, mix, path, pixel_grid, rotate, smooth_noise, step

# The imprint's strokes in a box 0..1 wide, 0..1 high, drawn without a font so that it is the same everywhere.
_CURVE = [(0.5 + 0.5 * np.cos(t), 0.3 + 0.3 * np.sin(t)) for t in np.linspace(-2.6, 2.2, 9)]
_GLYPHS: dict[str, list[list[tuple[float, float]]]] = {
    "0": [[(0.5 + 0.5 * np.cos(t), 0.5 + 0.5 * np.sin(t)) for t in np.linspace(0, 2 * np.pi, 13)]],
    "2": [[(x, y) for x, y in _CURVE if y < 0.6 or x > 0.5] + [(0.0, 1.0), (1.0, 1.0)]],
    "5": [
        [
            (0.95, 0.0),
            (0.1, 0.0),
            (0.05, 0.45),
            (0.5, 0.38),
            (0.9, 0.5),
            (1.0, 0.7),
            (0.85, 0.93),
            (0.45, 1.0),
            (0.0, 0.9),
        ]
    ],
}
IMPRINT = "250"


@dataclass(frozen=True)
class Capsule:
    """The lying object. `a`, `b`: position of every canvas point along and across its axis, pixels from its center."""

    a: Field
    b: Field
    angle: float
    half_length: float
    radius: float
    roll: float
    cap: NDArray[np.float64]
    body: NDArray[np.float64]
    ink: float
    lamp: float
    conveyor: Surface
    grain: Field
    strokes: tuple[NDArray[np.float64], ...]


def _imprint() -> tuple[NDArray[np.float64], ...]:
    """Strokes of the imprint in capsule coordinates, on the body."""
    strokes = []
    for n, glyph in enumerate(IMPRINT):
        for stroke in _GLYPHS[glyph]:
            points = np.asarray(stroke, dtype=float)
            strokes.append(points * np.array([7.5, 13.0]) + np.array([9.0 + 11.0 * n, -6.5]))
    return tuple(strokes)


def draw(rng: np.random.Generator) -> Capsule:
    """Draw where the capsule lies, how it has rolled, its colors and the conveyor under it."""
    x, y = pixel_grid()
    angle = np.deg2rad(rng.normal(-20, 4.5))
    a, b = rotate(x - SIZE / 2 - rng.normal(0, 3), y - SIZE / 2 - rng.normal(0, 3), angle)
    size = rng.uniform(1.06, 1.14)
    cap = np.array([0.66, 0.20, 0.13]) * rng.uniform(0.93, 1.07) + rng.normal(0, 0.008, 3)
    body = np.array([0.86, 0.80, 0.66]) * rng.uniform(0.96, 1.03) + rng.normal(0, 0.006, 3)
    belt = np.array([0.40, 0.45, 0.46]) * rng.uniform(0.93, 1.08) + rng.normal(0, 0.006, 3)
    texture = 1 + 0.05 * smooth_noise(rng, 1.0) + 0.035 * smooth_noise(rng, 3) + 0.03 * smooth_noise(rng, 25)
    for _ in range(rng.poisson(2)):  # old marks on the belt: normal, and not to be mistaken for defects
        px, py, heading = rng.uniform(0, SIZE, 2).tolist() + [rng.uniform(0, 2 * np.pi)]
        d, _ = distance_to(path(rng, (px, py), heading, rng.uniform(8, 45), 0.05), x, y)
        texture = texture + rng.normal(0, 0.05) * step(rng.uniform(0.5, 1.2) - d)
    return Capsule(
        a / size, b / size, angle, 39.0, 21.0, rng.normal(0, 2.0), cap, body, rng.uniform(0.8, 0.95),
        rng.uniform(-0.65, -0.45), texture[..., None] * belt, smooth_noise(rng, 0.9), _imprint(),
    )  # fmt: skip


def _outline(c: Capsule) -> Field:
    """Distance to the capsule's edge, positive inside, pixels; the cap (a < 4) is a little wider than the body."""
    radius = c.radius + np.where(c.a < 4, 1.0, 0.0)
    return radius - np.hypot(np.clip(np.abs(c.a) - c.half_length, 0, None), c.b)


def render(c: Capsule, relief: Field | None = None, print_alpha: Field | float = 1.0) -> Surface:
    """Conveyor, shadow, shell and imprint. `relief` changes the shell's shading; `print_alpha` thins the ink."""
    edge = _outline(c)
    x, y = pixel_grid()
    sa, sb = rotate(np.full_like(x, 3.0), np.full_like(x, 5.0), c.angle)
    shadow = _outline(replace(c, a=c.a - sa, b=c.b - sb))
    out = c.conveyor * (1 - 0.5 * step(shadow, 9.0))[..., None]
    h = np.clip(c.b / c.radius, -1, 1)  # sine of the angle around the axis
    end = np.clip((np.abs(c.a) - c.half_length) / c.radius, 0, 1)
    up = np.sqrt(np.clip(1 - h**2 - end**2, 0, 1))
    diffuse = 0.42 + 0.62 * np.clip(up * np.sqrt(1 - c.lamp**2) + h * c.lamp, 0, 1)
    shine = 0.55 * np.exp(-(((h - c.lamp * 0.75) / 0.10) ** 2)) * step(0.45 - end, 0.5)
    if relief is not None:
        diffuse = diffuse + relief
        shine = shine * np.clip(1 - 4 * np.abs(relief), 0, 1)
    shell = np.where((c.a < 4)[..., None], c.cap, c.body) * (1 + 0.025 * c.grain)[..., None]
    seam = np.exp(-(((c.a - 4.6) / 0.9) ** 2)) * 0.45
    shell = shell * (diffuse * (1 - seam))[..., None]
    round_b = np.arcsin(h) * c.radius  # the imprint follows the surface
    ink = np.zeros_like(x)
    for stroke in c.strokes:
        d, _ = distance_to(stroke, c.a, round_b - c.roll)
        ink = np.maximum(ink, step(1.25 - d))
    shell = mix(shell, np.array([0.20, 0.17, 0.20]), ink * c.ink * print_alpha * np.clip(0.9 + 0.12 * c.grain, 0, 1))
    shell = shell + shine[..., None]
    return mix(out, shell, step(edge, 0.9))


def _point(c: Capsule, a: float, b: float) -> tuple[float, float]:
    """Image coordinates of a point given along and across the axis."""
    x, y = pixel_grid()
    at = np.unravel_index(np.argmin((c.a - a) ** 2 + (c.b - b) ** 2), x.shape)
    return float(x[at]), float(y[at])


def crack(c: Capsule, rng: np.random.Generator) -> Surface:
    """Split the shell: a jagged dark line with a branch and chipped edges."""
    x, y = pixel_grid()
    start = _point(c, rng.choice([-1, 1]) * rng.uniform(12, 36), rng.uniform(-15, -8))
    angle = c.angle + np.pi / 2 + rng.normal(0, 0.5)
    main = path(rng, start, angle, rng.uniform(28, 42), 0.05, 0.35)
    fork = path(
        rng,
        tuple(main[len(main) // 2]),
        angle + rng.choice([-1, 1]) * rng.uniform(0.6, 1.0),
        rng.uniform(8, 15),
        0.05,
        0.35,
    )
    out, shell = render(c), step(_outline(c))
    for points, width in ((main, rng.uniform(1.5, 2.3)), (fork, 1.2)):
        d, place = distance_to(points, x, y)
        lip, _ = distance_to(points + np.array([1.2, 1.4]), x, y)
        out = mix(out, np.array([0.95, 0.92, 0.86]), 0.45 * shell * step(width - lip, 1.0))
        out = mix(out, np.array([0.10, 0.07, 0.06]), 0.92 * shell * step(width * (1.1 - 0.6 * place) - d))
    return out


def dent(c: Capsule, rng: np.random.Generator) -> Surface:
    """Push the shell in: one side of the dimple dark, the other bright."""
    x, y = pixel_grid()
    cx, cy = _point(c, rng.choice([-1, 1]) * rng.uniform(10, 34), rng.uniform(-9, 9))
    sigma = rng.uniform(6.0, 8.5)
    inside = blob(rng, x, y, (cx, cy), sigma * 1.7, 0.2)
    dx, dy = (x - cx) / sigma, (y - cy) / sigma
    bowl = np.exp(-(dx**2 + dy**2) / 2)
    relief = rng.uniform(0.65, 0.9) * bowl * (dy * 0.8 + dx * 0.5) - 0.26 * step(inside, 4.0)
    return render(c, relief=relief)


def scratch(c: Capsule, rng: np.random.Generator) -> Surface:
    """Scraped along a rail: a bundle of thin pale lines."""
    x, y = pixel_grid()
    side, heading = rng.choice([-1, 1]), c.angle + rng.normal(0, 0.5)
    out, shell = render(c), step(_outline(c) - 1.0)
    for _ in range(rng.integers(6, 11)):
        start = _point(c, side * rng.uniform(18, 26) - 13, rng.uniform(-14, 14))
        points = path(rng, start, heading + rng.normal(0, 0.06), rng.uniform(26, 44), 0.03)
        d, place = distance_to(points, x, y)
        pale = np.array([0.97, 0.93, 0.86]) if side < 0 else np.array([0.36, 0.29, 0.23])
        out = mix(out, pale, 0.8 * shell * step(rng.uniform(0.9, 1.4) * (1.2 - place) - d))
    return out


def misprint(c: Capsule, rng: np.random.Generator) -> Surface:
    """Smear or double the imprint, or leave part of it out."""
    kind = rng.integers(3)
    if kind == 0:
        drag = rng.uniform(1.2, 1.6)
        steps = [render(replace(c, strokes=tuple(s + np.array([k * drag, 0.0]) for s in c.strokes))) for k in range(5)]
        return np.stack(steps).mean(axis=0)
    if kind == 1:
        shift = np.array([rng.choice([-1, 1]) * rng.uniform(3.0, 5.0), rng.choice([-1, 1]) * rng.uniform(3.0, 5.5)])
        return render(replace(c, strokes=c.strokes + tuple(s + shift for s in c.strokes)))
    x, y = pixel_grid()
    lost = blob(rng, x, y, _point(c, rng.uniform(16, 32), c.roll), rng.uniform(10, 14), 0.3)
    return render(c, print_alpha=1 - step(lost, 3.0))


def squeeze(c: Capsule, rng: np.random.Generator) -> Surface:
    """Pinched: the outline drawn in from one or both sides, the shell creased there."""
    at, width, depth = rng.uniform(-30, 30), rng.uniform(7, 11), rng.uniform(0.22, 0.38)
    pinch = np.exp(-(((c.a - at) / width) ** 2))
    sides = (
        np.where(c.b < 0, 1.0, rng.choice([0.25, 1.0]))
        if rng.random() < 0.5
        else np.where(c.b > 0, 1.0, rng.choice([0.25, 1.0]))
    )
    relief = -0.30 * pinch * sides * np.abs(c.b) / c.radius + 0.12 * np.sin((c.a - at) / 2.2) * pinch
    return render(replace(c, b=c.b / (1 - depth * pinch * sides)), relief=relief)


DEFECTS = {"crack": crack, "dent": dent, "misprint": misprint, "scratch": scratch, "squeeze": squeeze}
