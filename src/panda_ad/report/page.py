# SPDX-License-Identifier: Apache-2.0
"""One HTML page that opens offline, from a template, scripts and data.

Everything is inlined. A content security policy with the hashes of the page's own scripts and styles lets nothing else
run or load, so that a hostile file name stays text even if an escape were forgotten.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.resources import files

import jinja2
from markupsafe import Markup

STYLES = ("vendor/uPlot.min.css", "style.css")


def render(template: str, scripts: Sequence[str], data: object, **context: object) -> str:
    """Render a page.

    Parameters
    ----------
    template, scripts : files of this package; the template places `policy`, `styles`, `scripts` and `data`.
    data : what the scripts read from the element `data`, as JSON; NaN and infinity raise ValueError.
    context : the template's other names.
    """
    texts = [_asset(name) for name in scripts]
    styles = [_asset(name) for name in STYLES]
    policy = (
        "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"script-src {' '.join(map(_csp_hash, texts))}; style-src {' '.join(map(_csp_hash, styles))}"
    )
    return (
        _environment()
        .get_template(template)
        .render(
            policy=policy,
            scripts=[Markup(s) for s in texts],
            styles=[Markup(s) for s in styles],
            data=Markup(script_json(data)),
            **context,
        )
    )


def script_json(value: object) -> str:
    """Return JSON that stays inside its script element: no '<', '>', '&' or line separator is left as itself."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


@cache
def _asset(name: str) -> str:
    return (files("panda_ad.report") / name).read_text(encoding="utf-8")


def _csp_hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": _figure, "percent": _percent, "plain": _plain, "whole": _whole, "minute": _minute}
    return environment


def _figure(value: float | None) -> str:
    """Return a figure as text: three decimals for rates, four significant digits for the rest, a dash for none."""
    if value is None:
        return "–"
    return f"{value:.3f}" if -1 <= value <= 1 else f"{value:.4g}"


def _whole(value: int) -> str:
    """Return a count, thousands set apart."""
    return f"{value:,}"


def _minute(time: str) -> str:
    """Return an ISO time as text, to the minute, UTC."""
    return f"{datetime.fromisoformat(time).astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def _plain(value: object) -> str:
    """Return a provenance value as text; lists and mappings as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
