# SPDX-License-Identifier: Apache-2.0
"""The page's texts, English and German, from texts.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from functools import cache
from importlib.resources import files

LANGUAGES = ("en", "de")
Text = Callable[..., str]
"""text(key, **values): the text with its values."""


@cache
def texts() -> dict[str, dict[str, str]]:
    """Return all texts: key -> language -> text."""
    read = (files("panda_ad.inspect") / "texts.toml").read_text(encoding="utf-8")
    return {
        f"{page}.{name}": dict(zip(LANGUAGES, both, strict=True))
        for page, group in tomllib.loads(read).items()
        for name, both in group.items()
    }


def language_of(accepted: str) -> str:
    """Return the language that a browser's Accept-Language asks for first among ours, else English."""
    wanted = (part.split(";")[0].strip().lower()[:2] for part in accepted.split(","))
    return next((name for name in wanted if name in LANGUAGES), LANGUAGES[0])


def text_in(language: str) -> Text:
    """Return the function that gives texts in a language; KeyError for a key that is not there."""
    table = texts()

    def text(key: str, **values: object) -> str:
        return table[key][language].format(**values)

    return text


def rarity(text: Text, p_value: float) -> str:
    """Return a p-value in words: how many good parts look like this or worse."""
    if p_value > 0.5:
        return text("queue.most")
    return text("queue.one_of", count=f"{round(1 / p_value):,}".replace(",", "\u202f"))
