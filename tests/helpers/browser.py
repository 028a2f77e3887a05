# SPDX-License-Identifier: Apache-2.0
"""Headless Chromium for tests: `from browser import browser  # noqa: F401` gives the fixture; it closes everything it opened."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def chromium() -> str | None:
    """Path of a Chromium, or None."""
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """A playwright browser; open pages with `browser.new_context(...)`, all are closed with it."""
    executable = chromium()
    if executable is None:
        pytest.skip("no chromium on PATH: install it to run the tests that look at pages")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e .[dev]")
    with sync_api.sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS, headless=True)
        try:
            yield instance
        finally:
            for context in instance.contexts:
                context.close()
            instance.close()


def watch(page, log: list[str]) -> None:
    """Append every console error, page error and request other than file: and data: to `log`."""
    page.on(
        "console",
        lambda message: log.append(f"console: {message.text}") if message.type in ("error", "warning") else None,
    )
    page.on("pageerror", lambda error: log.append(f"error: {error}"))
    page.on(
        "request",
        lambda request: None if request.url.startswith(("file:", "data:")) else log.append(f"request: {request.url}"),
    )


def file_url(path: Path) -> str:
    """file: address of a page on disk."""
    return path.resolve().as_uri()


def barriers(page) -> list[str]:
    """What WCAG 2.2 (A, AA) and good practice forbid on a page, as axe finds it: one line each."""
    from axe_playwright_python.sync_playwright import Axe

    rules = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
    found = Axe().run(page, options={"runOnly": rules}).response["violations"]
    return [f"{page.url}: {rule['id']}: {rule['nodes'][0]['html']}" for rule in found]
