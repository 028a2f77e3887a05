# SPDX-License-Identifier: Apache-2.0
"""The state's page: what is in place, how it keeps its promise, drift, the gate's decision; promote and roll back."""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from panda_ad.errors import UserError
from panda_ad.inspect.access import Refused, checked_form
from panda_ad.inspect.figures import kept
from panda_ad.inspect.lookups import servers
from panda_ad.inspect.site import Site, notify
from panda_ad.monitor.check import REPORTS
from panda_ad.monitor.report import ADVICE
from panda_ad.registry import audit
from panda_ad.registry.promote import promote, rollback

Form = Annotated[dict[str, str], Depends(checked_form)]
_MOVES = 20


def routes(site: Site) -> APIRouter:
    """Return the addresses below /state."""
    router = APIRouter(prefix="/state/{category}")

    @router.get("")
    async def show(request: Request, category: str) -> HTMLResponse:
        site.access.require(request, "look")
        site.queue(category)
        values = await asyncio.to_thread(_values, site, category)
        may = site.may(request, "promote") and bool(site.access.who(request))
        return site.render(request, "state.html.j2", page="state", category=category, may_promote=may, **values)

    @router.get("/drift")
    def drift(request: Request, category: str) -> Response:
        site.access.require(request, "look")
        site.queue(category)
        path = REPORTS / f"{category}.html"
        if not path.is_file():
            raise Refused(f"{path}: not there; run `panda-ad monitor`", 404)
        own = {"Content-Security-Policy": "frame-ancestors 'none'"}  # the page brings a stricter one, with its hashes
        return HTMLResponse(path.read_bytes(), headers=own)

    @router.post("")
    def change(request: Request, category: str, form: Form) -> RedirectResponse:
        site.access.require(request, "promote")
        site.queue(category)
        who, reason, what = site.access.who(request), form.get("reason", "").strip(), form.get("what", "")
        if not who or not reason:
            raise Refused("say who you are, and why", 422)
        try:
            with audit.on_behalf(who, reason):
                notify(request, _change(category, what, form.get("version", "")))
        except UserError as e:
            notify(request, str(e), "bad")
        site.moved(category)
        return RedirectResponse(f"/state/{quote(category)}", 303)

    return router


def _change(category: str, what: str, version: str) -> str:
    """Promote or roll back, and return what was done. UserError: the gate refused, or it cannot be done."""
    if what == "promote":
        return "; ".join(map(str, promote(category)))
    if what == "rollback" and version.isdecimal():
        return str(rollback(category, int(version)))
    raise Refused("promote, or roll back to a version", 422)


def _values(site: Site, category: str) -> dict[str, Any]:
    problem, found = "", None
    try:
        found = site.registry.get(category)
    except UserError as e:
        problem = str(e)
    mlflow, prefect = servers()
    common: dict[str, Any] = {
        "here": f"/state/{quote(category)}", "drift": _drift(category), "advice": ADVICE, "problem": problem,
        "mlflow": mlflow, "prefect": prefect,
        "found": found, "kept": None, "rate": 0.0, "provenance": {}, "last": None, "moves": [],
    }  # fmt: skip
    if found is None or found.version is None:
        return common
    rows = [r for r in site.queue(category).rows().values() if (r.model, r.version) == (found.model, found.version)]
    model = site.models.known(category)
    provenance = model.detector.config.provenance if model and model.version == found.version else {}
    rate = float(json.loads(found.facts["params"].get("verdict.false_alarm_rate", "0")))
    return common | {
        "kept": kept(rows, site.decisions.standing(category)) if rows else None, "rate": rate, "provenance": provenance,
        "last": next((move for move in found.moves if move["to"] == found.version), None),
        "moves": found.moves[:_MOVES],
    }  # fmt: skip


def _drift(category: str) -> dict[str, Any] | None:
    """Return what the last check of drift found, None if there was none."""
    try:
        found = json.loads((REPORTS / f"{category}.json").read_text(encoding="utf-8"))
        return {name: found[name] for name in ("headline", "findings", "checked", "version", "drifted")}
    except (OSError, ValueError, KeyError):
        return None
