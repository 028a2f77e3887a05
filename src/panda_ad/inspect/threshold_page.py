# SPDX-License-Identifier: Apache-2.0
"""The threshold's page: what each threshold would cost, and a new version with another one."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Annotated, Any
from urllib.parse import quote

import numpy as np
from fastapi import APIRouter, Depends
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse

from panda_ad.errors import UserError
from panda_ad.inspect.access import Refused, checked_form
from panda_ad.inspect.figures import Scored, Step, by_decision, histogram, steps
from panda_ad.inspect.queue import Row
from panda_ad.inspect.site import Site, notify
from panda_ad.registry import audit
from panda_ad.registry.load import Model
from panda_ad.registry.new_threshold import set_threshold
from panda_ad.report.page import script_json

Form = Annotated[dict[str, str], Depends(checked_form)]
_SHOWN = 25
"""Rows of the table that says the same without the slider."""
_WIDTH, _HEIGHT = 800, 220


def routes(site: Site) -> APIRouter:
    """Return the addresses below /threshold."""
    router = APIRouter(prefix="/threshold/{category}")

    @router.get("")
    async def show(request: Request, category: str) -> HTMLResponse:
        site.access.require(request, "look")
        site.queue(category)
        model = await asyncio.wrap_future(site.scorer.model(category))
        values = await asyncio.to_thread(_values, site, category, model)
        may = site.may(request, "promote") and bool(site.access.who(request))
        return site.render(request, "threshold.html.j2", page="threshold", category=category, may_promote=may, **values)

    @router.post("")
    def save(request: Request, category: str, form: Form) -> RedirectResponse:
        site.access.require(request, "promote")
        site.queue(category)
        who, reason = site.access.who(request), form.get("reason", "").strip()
        if not who or not reason:
            raise Refused("say who you are, and why", 422)
        try:
            rate = float(form.get("rate", ""))
        except ValueError:
            raise Refused("rate: a number is expected", 422) from None
        try:
            with audit.on_behalf(who, reason):
                decision = set_threshold(category, rate)
            notify(request, str(decision), "" if decision.outcome == "promoted" else "bad")
        except UserError as e:
            notify(request, str(e), "bad")
        site.moved(category)
        return RedirectResponse(f"/threshold/{quote(category)}", 303)

    return router


def rows_of(site: Site, category: str, model: Model) -> list[Row]:
    """Return the logged verdicts with the scores of a model: by it, or by one of which it is a copy."""
    provenance = model.detector.config.provenance
    versions = {model.version, *map(str, provenance.get("scores_of_versions", []))}
    rows = site.queue(category).rows().values()
    return [row for row in rows if row.model == model.name and row.version in versions]


def _values(site: Site, category: str, model: Model) -> dict[str, Any]:
    detector = model.detector
    rows = rows_of(site, category, model)
    scored = by_decision(rows, site.decisions.standing(category))
    calibration, limit = detector.calibration, detector.threshold()
    if not len(calibration):
        return {"version": model.version, "steps": []}
    found, now = steps(len(calibration), detector.threshold, scored, detector.config.false_alarm_rate)
    return {
        "version": model.version, "steps": found, "now": now, "scored": scored, "images": len(rows),
        "calibration": len(calibration), "limit": limit.value, "few": limit.message,
        "table": _table(found, now), "chart": _chart(calibration, scored, limit.value),
        "data": Markup(script_json([asdict(step) for step in found])),
        "here": f"/threshold/{quote(category)}",
    }  # fmt: skip


def _table(found: list[Step], now: int) -> list[tuple[int, Step]]:
    """Return positions for the table: all, or some of them evenly with the present one."""
    chosen = {*np.linspace(0, len(found) - 1, min(_SHOWN, len(found))).round().astype(int).tolist(), now}
    return [(i, found[i]) for i in sorted(chosen)]


def _chart(calibration: np.ndarray, scored: Scored, limit: float) -> dict[str, Any]:
    """Return the histogram as rectangles (kind, x, y, width, height) in a box of 800 x 220, and its scale.

    The last bar, of all that is higher still, may be a hundred times as tall as the others: it says its number.
    """
    edges, counts = histogram(calibration, scored, limit)
    scale = (_WIDTH - 20) / (edges[-1] - edges[0])
    stacked = counts["undecided"] + counts["good"] + counts["defect"]
    tallest = max(int(stacked[:-1].max()), int(counts["calibration"].max()), 1)
    units = np.full(len(stacked), _HEIGHT / tallest)
    units[-1] = _HEIGHT / max(int(stacked[-1]), tallest)
    bars, width = [], (edges[1] - edges[0]) * scale
    base = np.zeros(len(stacked))
    for kind in ("undecided", "good", "defect"):
        for i, height in enumerate(counts[kind] * units):
            if height:
                bars.append((kind, 10 + i * width, _HEIGHT - base[i] - height, width - 1, height))
                base[i] += height
    points = [(10 + i * width, _HEIGHT - n * units[0]) for i, n in enumerate(counts["calibration"])]
    outline = "".join(f"L{x:.1f} {y:.1f}h{width:.1f}" for x, y in points)
    return {
        "bars": [(kind, *(round(float(v), 1) for v in box)) for kind, *box in bars],
        "outline": f"M10 {_HEIGHT}{outline}V{_HEIGHT}", "low": float(edges[0]), "high": float(edges[-1]),
        "scale": float(scale), "over": int(stacked[-1]) if stacked[-1] > tallest else 0,
    }  # fmt: skip
