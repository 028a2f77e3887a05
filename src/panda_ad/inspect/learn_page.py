# SPDX-License-Identifier: Apache-2.0
"""The page of what the model learns: teach confirmed false alarms, take them back, look for bad gallery images."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse

from panda_ad.errors import UserError
from panda_ad.inspect.access import Refused, checked_form
from panda_ad.inspect.decisions import Decision
from panda_ad.inspect.queue import Row
from panda_ad.inspect.site import Site, notify
from panda_ad.registry import audit
from panda_ad.registry.load import Model
from panda_ad.registry.promote import Decision as Outcome
from panda_ad.scoring.refit import Change, changes_of, effective
from panda_ad.teach import change, look

Form = Annotated[dict[str, str], Depends(checked_form)]
_AT_ONCE = 24
"""Images of a list that are shown, and changed, at once."""
_PICK = "pick-"


def routes(site: Site) -> APIRouter:
    """Return the addresses below /learn."""
    router = APIRouter(prefix="/learn/{category}")

    @router.get("")
    async def show(request: Request, category: str, suspects: bool = False) -> HTMLResponse:
        site.access.require(request, "look")
        site.queue(category)
        model = await asyncio.wrap_future(site.scorer.model(category))
        values = await asyncio.to_thread(_values, site, category, model)
        values["effects"] = await _effects(site, category, values["last"])
        values["suspects"] = await asyncio.to_thread(_suspects, site, category, model) if suspects else None
        may = site.may(request, "promote") and bool(site.access.who(request))
        return site.render(request, "learn.html.j2", page="learn", category=category, may_promote=may, **values)

    @router.post("")
    def act(request: Request, category: str, form: Form) -> RedirectResponse:
        site.access.require(request, "promote")
        site.queue(category)
        what, picked = form.get("what", ""), [name.removeprefix(_PICK) for name in form if name.startswith(_PICK)]
        text = site.text(request)
        if what in ("teach", "remove") and not picked:
            notify(request, text("learn.none_picked"), "bad")
        elif what == "teach":
            teach(site, request, category, picked, form.get("reason", ""))
        elif what == "remove":
            _say(site, request, category, form.get("reason", ""), lambda: change.remove(category, picked))
        elif what == "undo":
            _say(site, request, category, form.get("reason", ""), lambda: change.undo(category))
        return RedirectResponse(f"/learn/{quote(category)}", 303)

    return router


def teach(site: Site, request: Request, category: str, images: list[str], reason: str) -> None:
    """Add images of the log that were decided good to the gallery in place; the next page says what came of it."""
    standing = site.decisions.standing(category)
    for sha256 in images:
        if sha256 not in standing or standing[sha256].label != "good":
            raise Refused(f"{sha256[:64]}: not decided good", 422)
    files = {sha256: Path(site.find(category, sha256).path) for sha256 in images}
    _say(site, request, category, reason, lambda: change.add(category, files))


def _say(site: Site, request: Request, category: str, reason: str, act: Callable[[], Outcome]) -> None:
    who = site.access.who(request)
    if not who:
        raise Refused("say who you are", 422)
    try:
        with audit.on_behalf(who, reason.strip()):
            outcome = act()
        notify(request, str(outcome), "" if outcome.outcome == "promoted" else "bad")
    except UserError as e:
        notify(request, str(e), "bad")
    site.moved(category)


def waiting(rows: list[Row], standing: dict[str, Decision], model: Model) -> list[Row]:
    """Return the alarms that were decided good and that the model does not know, newest decision first."""
    good = [row for row in rows if row.alarm and row.sha256 in standing and standing[row.sha256].label == "good"]
    new = [row for row in good if row.sha256 not in model.detector.seen]
    return sorted(new, key=lambda row: -standing[row.sha256].id)


def _values(site: Site, category: str, model: Model) -> dict[str, Any]:
    rows, standing = site.queue(category).rows(), site.decisions.standing(category)
    found = waiting(list(rows.values()), standing, model)
    log = changes_of(model.detector)
    left = effective(log)
    added = {image for entry in log if entry.what == "add" for image in entry.images}
    removed = [image for entry in left if entry.what == "remove" for image in entry.images if image not in added]
    positions = _positions(model)  # of a relit gallery, an image stands in it several times
    wrong = [image for image in positions if _is_defect(standing.get(image))]
    return {
        "version": model.version, "here": f"/learn/{quote(category)}", "queue": f"/queue/{quote(category)}",
        "waiting": found[:_AT_ONCE], "all_waiting": len(found), "log": log[::-1], "last": left[-1] if left else None,
        "rows": rows, "removed": removed, "wrong": wrong[:_AT_ONCE], "images": len(positions),
        "position": positions, "most": _AT_ONCE,
    }  # fmt: skip


def _is_defect(decision: Decision | None) -> bool:
    return decision is not None and decision.label == "defect"


def _positions(model: Model) -> dict[str, int]:
    """Return the position in the gallery of each image, by sha256."""
    return {image["sha256"]: i for i, image in enumerate(model.detector.images)}


async def _effects(site: Site, category: str, last: Change | None) -> list[tuple[Row, float, float]]:
    """Return (verdict in the log, score now, threshold now) of the images that the last change added."""
    rows = site.queue(category).rows()
    chosen = [rows[image] for image in last.images if image in rows][:_AT_ONCE] if last and last.what == "add" else []
    found = []
    for row in chosen:
        try:
            evidence = await asyncio.wrap_future(site.scorer.evidence(category, row))
        except UserError:  # its file is gone; what was taught stays
            continue
        found.append((row, evidence.score, evidence.threshold))
    return found


def _suspects(site: Site, category: str, model: Model) -> list[tuple[float, str, str]]:
    """Return what looks least like the rest of the gallery, computed once for each version."""
    kept = site.suspects.get(category)
    if kept is None or kept[0] != model.version:
        kept = site.suspects[category] = (model.version, look.suspects(category)[:_AT_ONCE])
    return kept[1]
