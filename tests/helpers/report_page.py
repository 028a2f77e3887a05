# SPDX-License-Identifier: Apache-2.0
"""The report of `report_demo` in headless Chromium: fixtures `report`, `page_file`, `open_page`, and what tests read off the page."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from browser import file_url, watch
from report_demo import demo

from panda_ad.report.build import write_report
from panda_ad.report.content import Report


@pytest.fixture(scope="module")
def report() -> Report:
    return demo(good=24, per_kind=8, size=(60, 80))


@pytest.fixture(scope="module")
def page_file(report, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(report, path)
    return path


@pytest.fixture
def open_page(browser, request):
    """open_page(path, **context options) -> page; fails the test afterwards if the page logged an error or asked the network."""
    contexts, log = [], []

    def opener(path: Path, **options):
        context = browser.new_context(**({"viewport": {"width": 1300, "height": 900}} | options))
        contexts.append(context)
        page = context.new_page()
        watch(page, log)
        page.goto(file_url(path))
        page.wait_for_selector("html.ready", timeout=20_000)
        page.wait_for_selector("#cards > li")
        return page

    yield opener
    for context in contexts:
        context.close()
    assert log == []


def slide(page, index: int) -> None:
    page.eval_on_selector("#slider", "(e, i) => { e.value = i; e.dispatchEvent(new Event('input')); }", index)
    settled(page)


def settled(page) -> None:
    """Wait until the gallery has followed, for which the page sets a timer of 120 ms; its timers end in their order."""
    page.evaluate("() => new Promise(done => setTimeout(done, 150))")


def count(page, name: str) -> int:
    return int(page.text_content(f"#{name}"))


def shown_rows(page) -> list[int]:
    return page.eval_on_selector_all("#cards > .card", "cards => cards.map(c => Number(c.dataset.row))")


def wrong_at(report: Report, limit: float) -> np.ndarray:
    return (report.scores > limit) != (report.labels == 1)
