# SPDX-License-Identifier: Apache-2.0
"""The page of `panda-ad start`: pictures with their heat maps, the worst first, in one file that opens offline."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from panda_ad.data.images import read_image
from panda_ad.report.page import render
from panda_ad.system.cores import side_by_side
from panda_ad.system.files import write_text

_SIDE = 320  # pixels of a picture's longer side
_SHOWN, _ODD = 120, 12


@dataclass(frozen=True)
class Shown:
    """One picture.

    Attributes
    ----------
    file : with its heat map.  path : of the picture itself, for people.
    kind : 'good', a kind of defect, or '' where nobody has said.
    """

    file: Path
    path: str
    kind: str
    score: float
    alarm: bool


def verdict_page(
    path: Path, name: str, learned: int, shown: Sequence[Shown], odd: Sequence[Shown], lines: list[str]
) -> None:
    """Write the page of judged pictures, and of the good ones that look least like the others."""
    parts = []
    if shown:
        worst = sorted(shown, key=lambda s: -s.score)
        caption = "The highest score first. Red is where a picture looks least like the good ones."
        parts.append(_part("Verdicts", caption, worst, _SHOWN, _verdict))
    caption = "Each compared with the others. A defect among them would hide its like: take it out and start again."
    parts.append(
        _part("Good pictures that look least like the rest", caption, odd, _ODD, lambda s: f"score {s.score:.2f}")
    )
    lede = f"{learned} good pictures learned from, {len(shown)} judged"
    _write(path, "panda-ad start", name, lede, lines, parts)


def ranking_page(path: Path, name: str, shown: Sequence[Shown]) -> None:
    """Write the page of unsorted pictures, given in their order."""
    caption = "Red is what has its like in few of the other pictures; 1 is usual."
    parts = [_part("The oddest first", caption, shown, _SHOWN, lambda s: f"oddness {s.score:.2f}")]
    lines = [
        "Nobody has said which of these are good. This is an order, no verdict: the first ones are worth a look.",
        "Move good ones into a folder named good and start again, for verdicts.",
    ]
    _write(path, "panda-ad start", name, f"{len(shown)} pictures compared with each other", lines, parts)


def _verdict(shown: Shown) -> str:
    said = "alarm" if shown.alarm else "passed"
    return f"{said} · {shown.kind} · {shown.score:.2f}" if shown.kind else f"{said} · {shown.score:.2f}"


def _part(title: str, caption: str, shown: Sequence[Shown], most: int, text: Any) -> dict[str, Any]:
    part = shown[:most]
    pictures = [
        {"jpeg": jpeg, "text": text(s), "path": s.path, "tone": "bad" if s.alarm else ""}
        for s, jpeg in zip(part, side_by_side(lambda s: _jpeg(s.file), part), strict=True)
    ]
    more = f"{len(shown) - most} more are in the table." if len(shown) > most else ""
    return {"title": title, "caption": caption, "pictures": pictures, "more": more}


def _jpeg(file: Path) -> str:
    image = Image.fromarray(read_image(file))
    image.thumbnail((_SIDE, _SIDE))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return base64.b64encode(out.getvalue()).decode()


def _write(path: Path, eyebrow: str, name: str, lede: str, lines: list[str], parts: list[dict[str, Any]]) -> None:
    text = render("start.html.j2", [], {}, eyebrow=eyebrow, name=name, lede=lede, lines=lines, parts=parts)
    write_text(path, text)
