# SPDX-License-Identifier: Apache-2.0
"""The audit's plot over time, as SVG: the rate of alarms on good parts per session, against what was promised."""

from __future__ import annotations

import math
from collections.abc import Callable
from html import escape

from panda_ad.monitor.promise import Verdicts, realized

WIDTH, HEIGHT = 900, 380
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 52, 92
MOST = 40
"""Newest sessions that are drawn."""
INK, QUIET, RULE, GOOD, BAD = "#1f2933", "#66727f", "#dfe4e8", "#2368a2", "#c2362b"


def plot(title: str, verdicts: Verdicts, rate: float, interval: tuple[float, float], confidence: float) -> str:
    """Return the plot.

    A dot per session with its interval, red where the rate is certainly above the promise; a line where another version
    took over.

    Parameters
    ----------
    verdicts : each part's first.  rate : promised.  interval : in which the calibration put the true rate.
    confidence : of the bars.
    """
    sessions = verdicts.by_session()[-MOST:]
    found = [realized(part, confidence) for _, part in sessions]
    top = min(1.0, 1.15 * max([2 * rate, interval[1], *(r.interval[1] for r in found)]))
    step = (WIDTH - LEFT - RIGHT) / max(1, len(sessions))

    def y(share: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - math.sqrt(min(share, top) / top))  # small rates are the promise

    legend = f"dashed: promised, {100 * rate:.3g} %; band: where the calibration put the true rate"
    legend += f"; dots: alarms on good parts, per session, with the {100 * confidence:.3g} % interval of the rate"
    parts = [_text(LEFT, 20, title, INK, "start", 15), _text(LEFT, 36, legend, QUIET, "start"), *_axis(top, y)]
    parts.append(_box(LEFT, y(interval[1]), WIDTH - LEFT - RIGHT, y(interval[0]) - y(interval[1]), GOOD, 0.12))
    parts.append(_line(LEFT, y(rate), WIDTH - RIGHT, y(rate), GOOD, dash="6 4"))
    before = ""
    for i, ((name, part), r) in enumerate(zip(sessions, found, strict=True)):
        x = LEFT + (i + 0.5) * step
        if part.versions[0] != before:
            before = str(part.versions[0])
            parts.append(_line(x - step / 2, TOP, x - step / 2, HEIGHT - BOTTOM, QUIET, dash="2 3"))
            parts.append(_text(x - step / 2 + 3, TOP + 10, f"v{before}", QUIET, "start"))
        color = BAD if r.at_least > rate else INK
        parts.append(_line(x, y(r.interval[0]), x, y(r.interval[1]), color, 2))
        parts.append(f'<circle cx="{x:.1f}" cy="{y(r.rate):.1f}" r="5" fill="{color}"/>')
        label = _text(0, 0, f"{name} ({r.alarms} of {r.images})", QUIET, "end")
        parts.append(f'<g transform="translate({x + 4:.1f} {HEIGHT - BOTTOM + 14}) rotate(-35)">{label}</g>')
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="system-ui, sans-serif" font-size="11">'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def _axis(top: float, y: Callable[[float], float]) -> list[str]:
    parts = []
    for share in (0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1):
        if share <= top:
            parts.append(_line(LEFT, y(share), WIDTH - RIGHT, y(share), RULE))
            parts.append(_text(LEFT - 8, y(share) + 4, f"{100 * share:.3g} %", QUIET, "end"))
    return parts


def _line(x0: float, y0: float, x1: float, y1: float, color: str, width: float = 1, dash: str = "") -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    at = f'x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"'
    return f'<line {at} stroke="{color}" stroke-width="{width}"{dashed}/>'


def _box(x: float, y: float, width: float, height: float, color: str, opacity: float) -> str:
    at = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{max(height, 0):.1f}"'
    return f'<rect {at} fill="{color}" fill-opacity="{opacity}"/>'


def _text(x: float, y: float, text: str, color: str, anchor: str, size: int = 11) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
    )
