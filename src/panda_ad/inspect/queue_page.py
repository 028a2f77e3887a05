# SPDX-License-Identifier: Apache-2.0
"""The queue's page: one image with what led to its verdict, a decision, and what comes next."""

from __future__ import annotations

import asyncio
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Depends
from fastapi import Path as InPath
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response

from panda_ad.data.images import Decoding
from panda_ad.data.layouts import image_root
from panda_ad.errors import UserError
from panda_ad.inspect.access import UPLOAD_BYTES, Refused, body, check_csrf, check_origin, checked_form
from panda_ad.inspect.decisions import AlreadyDecided, Decision, Label
from panda_ad.inspect.learn_page import teach
from panda_ad.inspect.queue import SHOWS, Show, select, shown
from panda_ad.inspect.scorer import Evidence
from panda_ad.inspect.site import Site, known_kinds, notify
from panda_ad.inspect.texts import rarity
from panda_ad.registry.names import model_name

Sha256 = Annotated[str, InPath(pattern="^[0-9a-f]{64}$")]
Form = Annotated[dict[str, str], Depends(checked_form)]
COMING = 8
"""Images of the strip below."""
_KEEP = {"Cache-Control": "private, max-age=86400, immutable"}


def routes(site: Site) -> APIRouter:
    """Return the addresses below /queue."""
    router = APIRouter(prefix="/queue/{category}")
    _add_looks(router, site)
    _add_changes(router, site)
    return router


def _add_looks(router: APIRouter, site: Site) -> None:
    def may_look(request: Request) -> None:
        site.access.require(request, "look")

    @router.get("")
    def queue(request: Request, category: str, show: Show = "undecided", at: str = "") -> HTMLResponse:
        may_look(request)
        return site.render(request, "queue.html.j2", **_queue_values(site, request, category, show, at))

    @router.get("/picture/{sha256}/{side}")
    def picture(request: Request, category: str, sha256: Sha256, side: Literal["thumb", "screen", "full"]) -> Response:
        may_look(request)
        row = site.find(category, sha256)
        jpeg = site.pictures.jpeg(Path(row.path), sha256, side, Decoding.of(site.params.data))
        return Response(jpeg, media_type="image/jpeg", headers=_KEEP)

    @router.get("/normal/{version}/{position}")
    def normal(request: Request, category: str, version: str, position: int) -> Response:
        may_look(request)
        return Response(_normal(site, category, version, position), media_type="image/jpeg", headers=_KEEP)

    @router.get("/evidence/{sha256}")
    async def evidence(request: Request, category: str, sha256: Sha256) -> HTMLResponse:
        may_look(request)
        row = site.find(category, sha256)
        found = await asyncio.wrap_future(site.scorer.evidence(category, row))
        return site.fragment(request, "evidence.html.j2", **_evidence_values(category, row.version, sha256, found))

    @router.get("/heat/{sha256}/{version}")
    async def heat(request: Request, category: str, sha256: Sha256, version: str) -> Response:
        may_look(request)
        found = await asyncio.wrap_future(site.scorer.evidence(category, site.find(category, sha256)))
        if found.version != version or not found.heat:
            raise Refused("another model is in place by now; load the page again", 404)
        return Response(found.heat, media_type="image/png", headers=_KEEP)


def _add_changes(router: APIRouter, site: Site) -> None:
    def may_decide(request: Request) -> None:
        site.access.require(request, "decide")

    @router.post("/decide")
    def decide(request: Request, category: str, form: Form) -> Response:
        may_decide(request)
        return _decide(site, request, category, form)

    @router.post("/undo")
    def undo(request: Request, category: str, form: Form) -> Response:
        may_decide(request)
        site.queue(category)
        taken, text = site.decisions.undo(category, site.access.who(request)), site.text(request)
        notify(request, text("queue.undone" if taken else "queue.nothing_to_undo"))
        return _to(category, _show(form), taken.sha256 if taken else "")

    @router.post("/drop")
    async def drop(request: Request, category: str) -> Response:
        may_decide(request)
        check_origin(request)
        check_csrf(request, request.headers.get("x-csrf", ""))
        site.queue(category)
        data = await body(request, UPLOAD_BYTES)
        return PlainTextResponse(await asyncio.wrap_future(site.scorer.drop(category, data)))


def _queue_values(site: Site, request: Request, category: str, show: Show, at: str) -> dict[str, Any]:
    queue = site.queue(category)
    site.scorer.refresh(category)
    rows, order, standing = queue.rows(), queue.order(), site.decisions.standing(category)
    chosen = select(order, standing, show)
    start = _position(chosen, at)
    current = at if at in rows else (chosen[start] if chosen else "")
    after = [sha256 for sha256 in chosen[start : start + COMING + 1] if sha256 != current][:COMING]
    counts = dict.fromkeys(SHOWS, 0)
    for sha256 in rows.keys() & standing.keys():
        counts[shown(standing[sha256])] += 1
    counts["undecided"] = len(rows) - counts["unsure"] - counts["decided"]
    stands = standing.get(current)
    problems = [*queue.problems.values(), *filter(None, [site.models.problems.get(category)])]
    allowed, row, text = site.may(request, "decide"), rows.get(current), site.text(request)
    return {
        "page": "queue", "category": category,
        "model": shlex.quote(f"models:/{model_name(site.params.dataset, category)}@staging"),
        "here": f"/queue/{quote(category)}", "show": show, "row": row,
        "rarity": rarity(text, row.p_value) if row else "", "coming": [rows[sha256] for sha256 in after],
        "counts": list(counts.items()), "total": len(rows), "problems": problems[:3],
        "stands": stands if shown(stands) != "undecided" else None, "stands_id": stands.id if stands else 0,
        "may_decide": allowed and bool(site.access.who(request)), "role_allows": allowed,
        "may_promote": site.may(request, "promote"),
        "kinds": known_kinds(category, standing.values()), "last_kind": request.session.get("kind", ""),
    }  # fmt: skip


def _position(chosen: list[str], at: str) -> int:
    """Return where a list goes on from an image, its start where the image is not in it."""
    try:
        return chosen.index(at)
    except ValueError:
        return 0


def _evidence_values(category: str, scored_by: str, sha256: str, found: Evidence) -> dict[str, Any]:
    here = f"/queue/{quote(category)}"
    spread = max(found.threshold - found.typical, 1e-12)
    place = 30 + 70 * (found.score - found.typical) / spread  # typical at 30, the threshold at 100
    return {
        "found": found,
        "heat": f"{here}/heat/{sha256}/{found.version}" if found.heat else "",
        "neighbors": [f"{here}/normal/{found.version}/{i}" for i in found.neighbors[:4]],
        "other": found.version != scored_by,
        "beyond": found.p_value * (found.calibration + 1) < 1.5,
        "place": round(min(194.0, max(6.0, place)), 1),
    }


def _normal(site: Site, category: str, version: str, position: int) -> bytes:
    """Return a gallery image as JPEG: the file of the data set where it is still that, else its thumbnail."""
    site.queue(category)
    model = site.models.known(category)
    if model is None or model.version != version or not 0 <= position < len(model.detector.thumbnails):
        raise Refused("another model is in place by now; load the page again", 404)
    detector = model.detector
    if position < len(detector.images):
        image = detector.images[position]
        path = image_root(site.params) / image.get("path", "")
        try:
            return site.pictures.jpeg(path, image.get("sha256", ""), "screen", Decoding.of(detector.config))
        except UserError:
            pass
    return detector.thumbnails[position]


def _decide(site: Site, request: Request, category: str, form: dict[str, str]) -> Response:
    text, show = site.text(request), _show(form)
    row = site.find(category, form.get("sha256", ""))
    teaching = "teach" in form
    if teaching:
        site.access.require(request, "promote")
    label: Label = "good" if teaching else form.get("label", "")  # type: ignore[assignment]  # `decide` refuses what is none
    seen = int(form["seen"]) if form.get("seen", "").isdecimal() else -1
    before = site.decisions.standing(category)
    following = _following(site, category, show, row.sha256, before)
    try:
        made = site.decisions.decide(row.subject(category), label, form.get("kind", ""), site.access.who(request), seen)
    except AlreadyDecided as e:
        said = text(f"queue.stands_{e.standing.label}", who=e.standing.who, kind=e.standing.kind)
        notify(request, f"{said}. {text('queue.meanwhile')}", "bad")
        return _to(category, show, row.sha256)
    if made.label == "defect":
        request.session["kind"] = made.kind
    notify(request, text(f"queue.done_{made.label}", name=row.name))
    if teaching:
        teach(site, request, category, [row.sha256], "")
        return RedirectResponse(f"/learn/{quote(category)}", 303)
    return _to(category, show, following)


def _following(site: Site, category: str, show: Show, sha256: str, standing: dict[str, Decision]) -> str:
    """Return the image after one in its list; '' for the list's start."""
    chosen = select(site.queue(category).order(), standing, show)
    rest = chosen[_position(chosen, sha256) : _position(chosen, sha256) + 2]
    return next((other for other in rest if other != sha256), "")


def _show(form: dict[str, str]) -> Show:
    found = form.get("show", "")
    return found if found in SHOWS else "undecided"


def _to(category: str, show: Show, sha256: str) -> RedirectResponse:
    at = f"&at={sha256}" if sha256 else ""
    return RedirectResponse(f"/queue/{quote(category)}?show={show}{at}", 303)
