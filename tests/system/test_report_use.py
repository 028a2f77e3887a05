# SPDX-License-Identifier: Apache-2.0
"""What a person does with the report, in headless Chromium: carries a threshold over, copies mistakes, looks closely, prints."""

# ruff: noqa: F811 - fixtures are imported, and arguments are named like them

from __future__ import annotations

import re
import zlib

import numpy as np
import pytest
from browser import browser, file_url  # noqa: F401
from report_page import count, open_page, page_file, report, settled, shown_rows, slide, wrong_at  # noqa: F401

from panda_ad.scoring.calibration import threshold


def test_a_chosen_threshold_can_be_carried_over(open_page, page_file, report):
    """At every position of the slider: the rate shown gives the counts shown, or those that the page says it gives."""
    page = open_page(page_file)
    values = np.unique(np.concatenate([report.scores, report.calibration_scores]))
    seen = page.evaluate(
        """n => { const slider = document.getElementById('slider'), read = id => document.getElementById(id).textContent, out = [];
             for (let i = 0; i <= n; i++) { slider.value = i; slider.dispatchEvent(new Event('input'));
               out.push(['carry-line', 'carry-command', 'carry-why'].map(read)); }
             return out; }""",
        len(values),
    )
    good, bad, told = report.scores[report.labels == 0], report.scores[report.labels == 1], 0
    for limit, (line, command, why) in zip([-np.inf, *values], seen, strict=True):
        if limit < report.calibration_scores.min():
            assert (line, command) == ("", "") and why.startswith("No false-alarm rate")
            continue
        rate = float(line.removeprefix("false_alarm_rate: "))
        assert command == f"panda-ad score FOLDER --bundle BUNDLE --false-alarm-rate {line.split()[1]}"
        given = threshold(report.calibration_scores, rate).value
        assert given <= limit and (report.calibration_scores > given).sum() == (report.calibration_scores > limit).sum()
        same = (good > given).sum() == (good > limit).sum() and (bad > given).sum() == (bad > limit).sum()
        assert (why == "") == same
        if not same:
            told += 1
            alarms, misses = (good > given).sum(), (bad <= given).sum()
            assert (
                f"{alarms} false alarm{'s' if alarms != 1 else ''} and {misses} miss{'es' if misses != 1 else ''} on"
                in why
            )
    assert told > 0


def test_mistakes_can_be_copied_as_a_list(open_page, page_file, report):
    page = open_page(page_file)
    wrong = wrong_at(report, report.threshold.value)
    misses, alarms = (int((wrong & (report.labels == label)).sum()) for label in (1, 0))
    assert page.text_content("#mistakes-title") == f"{misses} misses and {alarms} false alarm as a list"
    lines = [line.split("\t") for line in page.input_value("#mistakes").splitlines()]
    assert {line[3] for line in lines} == {report.paths[i] for i in np.flatnonzero(wrong)}
    assert [line[0] for line in lines] == ["miss"] * misses + ["false alarm"] * alarms
    page.click("#mistakes-title")
    page.evaluate("document.addEventListener('copy', () => { window.copied = getSelection().toString(); })")
    page.click("[data-copy=mistakes]")
    assert page.evaluate("window.copied") == page.input_value("#mistakes")


def test_one_false_alarm_is_singular_and_no_miss_is_not_red(open_page, page_file, report):
    page = open_page(page_file)
    values = np.unique(np.concatenate([report.scores, report.calibration_scores]))
    good = np.sort(report.scores[report.labels == 0])
    slide(page, int(np.searchsorted(values, good[-2])) + 1)
    assert page.text_content("#false-alarms-name") == "False alarm"
    assert page.text_content("#summary").startswith("1 false alarm of 24 good, ")
    assert "1 of 24 false alarm" in page.locator(".row-count").nth(1).text_content()
    assert "bad" in (page.get_attribute("#cell-misses", "class") or "")
    slide(page, 0)
    assert page.text_content("#cell-misses") == "0" and "bad" not in (page.get_attribute("#cell-misses", "class") or "")


def test_the_slider_keeps_its_width_while_it_moves(open_page, page_file, report):
    page = open_page(page_file, viewport={"width": 1400, "height": 900})
    widths = set()
    for index in range(0, int(page.get_attribute("#slider", "max")) + 1, 5):
        slide(page, index)
        widths.add(page.locator("#slider").bounding_box()["width"])
    assert len(widths) == 1


def test_the_worst_spot_is_shown_at_full_resolution(open_page, page_file, report):
    page = open_page(page_file)
    row = next(r for r in shown_rows(page) if report.images[r].spot)
    page.locator(f".card[data-row='{row}'] .open").click()
    spot = page.locator("#viewer .spot")
    height, width = report.images[row].spot.rgb.shape[:2]
    assert spot.evaluate("i => [i.naturalWidth, i.naturalHeight]") == [width, height]
    frame, box = (page.locator(f"#viewer {name}").first.bounding_box() for name in (".frame", ".spot-box"))
    x0, y0, x1, y1 = report.images[row].spot.box
    assert (box["x"] - frame["x"]) / frame["width"] == pytest.approx(x0, abs=0.01)
    assert box["height"] / frame["height"] == pytest.approx(y1 - y0, abs=0.01)


def test_paper_looks_the_same_whatever_the_window(browser, page_file):
    """The pages' drawing instructions are equal, byte for byte, so none loses a row, the threshold line or half of its bars."""
    pages = {}
    for width in (390, 820, 1100, 1400, 1900):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme="dark")
        page = context.new_page()
        page.goto(file_url(page_file))
        page.wait_for_selector("html.ready")
        settled(page)
        pdf = page.pdf(format="A4")
        streams = re.findall(rb"FlateDecode[^>]*>>\s*stream\r?\n(.*?)\r?\nendstream", pdf, re.S)
        contents = [zlib.decompress(s) for s in streams if s[:1] == b"x"]
        pages[width] = [content for content in contents if b"BT\n" in content]  # those with text: a page each
        assert page.evaluate("document.documentElement.className") == "ready", "back to the screen's colors"
        context.close()
    assert len(pages[390]) >= 3
    assert all(pages[width] == pages[390] for width in pages)
