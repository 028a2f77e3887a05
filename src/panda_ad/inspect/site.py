# SPDX-License-Identifier: Apache-2.0
"""What the page's parts share: settings, services, and how a page is rendered."""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape
from starlette.requests import Request
from starlette.responses import HTMLResponse

from panda_ad.inspect.access import ROLES, Access, Refused, csrf
from panda_ad.inspect.decisions import Decision, Decisions
from panda_ad.inspect.lookups import Lookups
from panda_ad.inspect.models import Models
from panda_ad.inspect.pictures import Pictures
from panda_ad.inspect.queue import Queue, Row
from panda_ad.inspect.scorer import Scorer
from panda_ad.inspect.texts import LANGUAGES, Text, language_of, text_in
from panda_ad.monitor.log import LOG
from panda_ad.params import Params
from panda_ad.system.paths import MANIFEST

PAGES = ("queue", "learn", "threshold", "state")


@dataclass
class Site:
    """One running page.

    Attributes
    ----------
    params : of the checkout.  access : who may do what.
    decisions, models, scorer, pictures : services.  log : the verdict log.
    registry : what it says of each category.
    suspects : per category the version, and (suspicion, sha256, path) of images of its gallery.
    """

    params: Params
    access: Access
    decisions: Decisions
    models: Models
    scorer: Scorer
    log: Path = LOG
    pictures: Pictures = field(default_factory=Pictures)
    registry: Lookups = field(init=False)
    suspects: dict[str, tuple[str, list[tuple[float, str, str]]]] = field(default_factory=dict)
    _queues: dict[str, Queue] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.registry = Lookups(self.params.dataset)

    def moved(self, category: str) -> None:
        """Look again at what is in place: an alias may have moved."""
        self.models.forget(category)
        self.registry.forget(category)

    def queue(self, category: str) -> Queue:
        """Return a category's queue; Refused (404) where params.yaml has no such category."""
        if category not in self.params.categories:
            raise Refused(f"{category[:80]}: no such category in params.yaml", 404)
        return self._queues.setdefault(category, Queue(category, self.log))

    def find(self, category: str, sha256: str) -> Row:
        """Return the verdict on an image of the log; Refused (404) where there is none."""
        row = self.queue(category).rows().get(sha256)
        if row is None:
            raise Refused(f"{sha256[:64]}: the log of {category} has no such image", 404)
        return row

    def close(self) -> None:
        """End what runs beside the server."""
        self.scorer.close()
        self.decisions.close()

    def text(self, request: Request) -> Text:
        """Return the texts in the language of a request."""
        return text_in(language(request))

    def may(self, request: Request, role: str) -> bool:
        """Whether a session has a role."""
        held = self.access.role(request)
        return held is not None and ROLES.index(held) >= ROLES.index(role)

    def render(self, request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
        """Return a page with what all of them show."""
        notice = request.session.pop("notice", None) or ("", "")
        text = self.text(request)
        common = {
            "t": text, "language": language(request), "csrf": csrf(request), "stamp": _stamp(), "pages": PAGES,
            "categories": self.params.categories, "category": "", "page": "", "who": self.access.who(request),
            "notice": notice[0], "notice_kind": notice[1], "back": request.url.path,
        }  # fmt: skip
        page = _environment().get_template(template).render(common | values)
        return HTMLResponse(page, status, {"Cache-Control": "no-store"})

    def fragment(self, request: Request, template: str, **values: Any) -> HTMLResponse:
        """Return a part of a page; the session stays as it is, since another request may be changing it."""
        part = _environment().get_template(template).render(t=self.text(request), language=language(request), **values)
        return HTMLResponse(part, headers={"Cache-Control": "no-store"})


def language(request: Request) -> str:
    """Return the language chosen for the session, else the browser's."""
    chosen = request.session.get("language")
    return chosen if chosen in LANGUAGES else language_of(request.headers.get("accept-language", ""))


def notify(request: Request, line: str, kind: str = "") -> None:
    """Show a line on the next page; kind 'bad' for what did not work."""
    request.session["notice"] = [line[:400], kind]


def known_kinds(category: str, standing: Iterable[Decision]) -> list[str]:
    """Return the kinds of defect of a category, of its test set and of what was decided, in alphabetical order."""
    decided = {d.kind for d in standing if d.label == "defect"}
    try:
        listed = _kinds_of_manifest(MANIFEST.stat().st_mtime_ns).get(category, frozenset())
    except OSError:
        listed = frozenset()
    return sorted(decided | listed)


@lru_cache(maxsize=1)
def _kinds_of_manifest(_changed: int) -> dict[str, frozenset[str]]:
    kinds: dict[str, set[str]] = {}
    with open(MANIFEST, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["label"] == "1":
                kinds.setdefault(row["category"], set()).add(row["defect"])
    return {category: frozenset(found) for category, found in kinds.items()}


@cache
def asset(name: str) -> bytes:
    """Return a file of static/ or templates/."""
    return (files("panda_ad.inspect") / name).read_bytes()


@cache
def _stamp() -> str:
    """Return what changes with the static files, for their addresses."""
    folder = files("panda_ad.inspect") / "static"
    parts = [item.read_bytes() for item in sorted(folder.iterdir(), key=lambda item: item.name) if item.is_file()]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:12]


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: asset(f"templates/{name}").decode()),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "figure": figure,
        "signed": signed,
        "whole": whole,
        "moment": moment,
        "percent": percent,
        "code": code,
    }
    return environment


@jinja2.pass_context
def figure(context: jinja2.runtime.Context, value: float) -> str:
    """Return a score as text: four significant digits, with the language's decimal mark."""
    return _marked(f"{value:.4g}", context)


@jinja2.pass_context
def signed(context: jinja2.runtime.Context, value: float) -> str:
    """Return a figure with its sign and one decimal."""
    return _marked(f"{value:+.1f}", context)


@jinja2.pass_context
def percent(context: jinja2.runtime.Context, value: float) -> str:
    """Return a share as percentage."""
    return _marked(f"{100 * value:.3g}\u00a0%", context)


def _marked(text: str, context: jinja2.runtime.Context) -> str:
    text = text.replace("-", "\u2212")
    return text.replace(".", ",") if context["language"] == "de" else text


def code(text: str) -> Markup:
    """Return a text with what is between backticks set as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def whole(value: int) -> str:
    """Return a count, thousands set apart by a narrow space."""
    return f"{value:,}".replace(",", "\u202f")


def moment(time: datetime | str) -> str:
    """Return a time to the minute, in this machine's zone."""
    found = datetime.fromisoformat(time) if isinstance(time, str) else time
    return found.astimezone().strftime("%Y-%m-%d %H:%M")
