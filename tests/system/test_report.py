# SPDX-License-Identifier: Apache-2.0
"""The HTML report, looked at in headless Chromium: what it shows is checked against numpy."""

# ruff: noqa: F811 - fixtures are imported, and arguments are named like them

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from browser import barriers, browser, file_url, watch  # noqa: F401
from report_demo import KINDS
from report_page import count, open_page, page_file, report, settled, shown_rows, slide, wrong_at  # noqa: F401

from panda_ad.report.build import build_report, write_report
from panda_ad.report.content import Neighbor
from panda_ad.scoring.calibration import threshold


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_opens_offline_in_both_schemes(open_page, page_file, scheme):
    page = open_page(page_file, color_scheme=scheme)
    brightness = page.evaluate(
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number).reduce((a, b) => a + b) / 3"
    )
    assert brightness < 60 if scheme == "dark" else brightness > 220
    assert page.locator(".uplot").count() == 2  # ROC and PR
    drawn = page.locator(".row-chart path").evaluate_all(
        "paths => paths.map(p => p.getAttribute('d').split('M').length - 1)"
    )
    assert len(drawn) == 7 and min(drawn) > 0  # calibration, good and five kinds
    blank = page.evaluate(
        """() => [...document.querySelectorAll('.uplot canvas')].filter(c =>
             !c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(v => v)).length"""
    )
    assert blank == 0
    assert barriers(page) == []


def test_pictures_carry_heat_map_outline_and_neighbors(open_page, page_file, report):
    page = open_page(page_file)
    page.select_option("#filter-kind", "hole")
    settled(page)
    card = page.locator(".card").first
    opaque = card.locator("canvas.heat").evaluate(
        "c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter((v, i) => i % 4 === 3 && v > 0).length"
    )
    assert opaque > 0
    assert card.locator(".outline path").first.get_attribute("d").startswith("M")
    row = int(card.get_attribute("data-row"))
    near = card.locator(".near img").evaluate_all("imgs => imgs.map(i => [i.alt, i.naturalWidth])")
    assert [alt.removeprefix("normal image ") for alt, _ in near] == [n.path for n in report.images[row].neighbors[:3]]
    assert all(width > 0 for _, width in near)
    page.uncheck("#show-heat")
    page.uncheck("#show-outline")
    assert not card.locator("canvas.heat").is_visible()
    assert not card.locator(".outline").is_visible()


def test_slider_counts_agree_with_numpy_at_every_position(open_page, page_file, report):
    page = open_page(page_file)
    values = np.unique(np.concatenate([report.scores, report.calibration_scores]))
    assert int(page.get_attribute("#slider", "max")) == len(values)  # and one position below all
    good, bad = report.scores[report.labels == 0], report.scores[report.labels == 1]
    seen = page.evaluate(
        """n => { const slider = document.getElementById('slider'), read = id => document.getElementById(id).textContent, out = [];
             for (let i = 0; i <= n; i++) { slider.value = i; slider.dispatchEvent(new Event('input'));
               out.push(['false-alarms', 'misses', 'precision', 'recall', 'cell-passed', 'cell-caught'].map(read)); }
             return out; }""",
        len(values),
    )
    for limit, (false_alarms, misses, precision, recall, passed, caught) in zip([-np.inf, *values], seen, strict=True):
        assert int(false_alarms) == (good > limit).sum()
        assert int(misses) == (bad <= limit).sum()
        assert int(passed) == (good <= limit).sum()
        assert int(caught) == (bad > limit).sum()
        assert float(recall) == pytest.approx((bad > limit).mean(), abs=6e-4)
        alarms = (report.scores > limit).sum()
        assert (
            precision == "–"
            if alarms == 0
            else float(precision) == pytest.approx((bad > limit).sum() / alarms, abs=6e-4)
        )
    settled(page)
    assert (
        page.text_content("#summary")
        == f"0 false alarms of {len(good)} good, {len(bad)} misses of {len(bad)} defective"
    )
    assert page.text_content(f"[data-caught='{KINDS[0]}']").strip().startswith("0 of 8")


def test_page_starts_at_the_models_threshold_and_resets_to_it(open_page, page_file, report):
    page = open_page(page_file)
    expected = int((report.scores[report.labels == 1] <= report.threshold.value).sum())
    assert count(page, "misses") == expected
    assert page.is_disabled("#reset")
    slide(page, 3)
    assert count(page, "misses") != expected
    page.click("#reset")
    assert count(page, "misses") == expected


def test_budget_sets_the_conformal_threshold(open_page, page_file, report):
    page = open_page(page_file)
    for one_in in (5, 10, 30):
        page.fill("#budget", str(one_in))
        limit = threshold(report.calibration_scores, 1 / one_in).value
        assert count(page, "misses") == (report.scores[report.labels == 1] <= limit).sum()
        assert count(page, "false-alarms") == (report.scores[report.labels == 0] > limit).sum()
    page.fill("#budget", "500")
    assert "needs at least 499" in page.text_content("#promise")
    assert count(page, "misses") == (report.scores[report.labels == 1] <= report.calibration_scores.max()).sum()


def test_promise_quotes_the_interval_of_the_calibration(open_page, report, page_file):
    page = open_page(page_file)
    low, high = (f"{100 * v:.3g}" for v in threshold(report.calibration_scores, 0.05).interval)
    text = page.text_content("#promise").replace("\u00a0", " ")
    assert f"between {low} % and {high} %" in text


def test_filters_filter_and_follow_the_slider(open_page, page_file, report):
    page = open_page(page_file)
    kinds = np.array(report.defects)
    page.select_option("#filter-kind", "stain")
    assert set(shown_rows(page)) == set(np.flatnonzero(kinds == "stain"))
    page.select_option("#filter-verdict", "wrong")
    assert set(shown_rows(page)) == set(np.flatnonzero((kinds == "stain") & wrong_at(report, report.threshold.value)))
    page.select_option("#filter-kind", "")
    values = np.unique(np.concatenate([report.scores, report.calibration_scores]))
    for index in (len(values) // 3, len(values) // 2):
        slide(page, index)
        limit = values[index - 1]
        assert set(shown_rows(page)) == set(np.flatnonzero(wrong_at(report, limit)))
        assert page.text_content("#shown").startswith(f"{wrong_at(report, limit).sum()} of 64 images")
    page.select_option("#filter-verdict", "false-alarm")
    assert set(shown_rows(page)) == set(np.flatnonzero((report.scores > limit) & (report.labels == 0)))
    slide(page, len(values))
    assert "No image fits" in page.text_content("#cards")


def test_sorts_sort_and_the_worst_mistakes_come_first(open_page, page_file, report):
    page = open_page(page_file)
    rows = shown_rows(page)
    wrong = wrong_at(report, report.threshold.value)
    assert len(rows) == 48 and page.is_visible("#more")
    assert wrong[rows[: wrong.sum()]].all() and not wrong[rows[wrong.sum() :]].any()
    misses = [r for r in rows if wrong[r] and report.labels[r] == 1]
    assert misses == sorted(misses, key=lambda r: report.scores[r])  # the deepest miss first
    page.click("#more")
    assert sorted(shown_rows(page)) == list(range(64)) and not page.is_visible("#more")
    for value, key in {
        "high": lambda r: -report.scores[r],
        "low": lambda r: report.scores[r],
        "name": lambda r: report.paths[r],
    }.items():
        page.select_option("#sort", value)
        assert shown_rows(page) == sorted(range(64), key=key)[:48]


def test_keyboard_alone_is_enough(open_page, page_file, report):
    page = open_page(page_file)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.focus("#slider")
    before = int(page.input_value("#slider"))
    page.keyboard.press("ArrowLeft")
    assert int(page.input_value("#slider")) == before - 1
    assert "of 24 good, " in page.get_attribute("#slider", "aria-valuetext")
    settled(page)

    rows = shown_rows(page)
    page.locator(".open").first.focus()
    page.keyboard.press("Enter")
    assert page.text_content("#viewer-title") == report.paths[rows[0]]
    page.keyboard.press("ArrowRight")
    assert page.text_content("#viewer-title") == report.paths[rows[1]]
    whole = report.images[rows[1]].components[0]
    assert f"made ofwhole image {'−' if whole < 0 else '+'}{abs(whole):.1f}, worst spot +4.0" in page.text_content(
        "#viewer-body"
    )
    page.keyboard.press("Escape")
    assert not page.is_visible("#viewer")
    assert page.evaluate("document.activeElement.className") == "open"  # focus goes back where it was


def test_click_in_histogram_and_roc_moves_the_threshold(open_page, page_file):
    page = open_page(page_file, reduced_motion="reduce")
    before = count(page, "misses")
    box = page.locator("#histogram .row-chart").first.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.98, box["y"] + 5)
    assert count(page, "misses") > before
    page.locator("#roc .u-over").scroll_into_view_if_needed()
    box = page.locator("#roc .u-over").bounding_box()
    page.mouse.click(box["x"] + box["width"] - 2, box["y"] + 2)  # the corner where everything raises an alarm
    assert count(page, "misses") == 0 and count(page, "false-alarms") > 0


@pytest.mark.parametrize(
    ("low", "high", "label"),
    [
        (0.5, 8, "score"),
        (0.1, 900, "score (logarithmic)"),
        (-3, 20, "score"),
        (-3, 60, "score (logarithmic away from 0)"),
    ],
)
def test_the_score_axis_is_monotone_and_can_be_turned_round(open_page, page_file, low, high, label):
    page = open_page(page_file)
    values = np.linspace(low, high, 50).tolist()
    found = page.evaluate(
        """([values, normal]) => { const s = scoreAxis(values, 56, normal), bins = values.map(s.toBin);
             return { label: s.label, bins, back: bins.map(s.toScore), ticks: s.ticks, signs: s.ticks.map(t => Object.is(t, -0)) }; }""",
        [values, [-1.5, -1, 0.5, 1.0, 2.0]],
    )
    assert found["label"] == label
    assert all(np.diff(found["bins"]) > 0) and found["bins"][0] > 0 and found["bins"][-1] < 56
    np.testing.assert_allclose(found["back"], values, rtol=1e-9, atol=1e-9)
    assert 3 <= len(found["ticks"]) <= 13 and all(np.diff(found["ticks"]) > 0) and not any(found["signs"])


def test_controls_have_names_tables_have_headers_and_narrow_pages_do_not_scroll_sideways(open_page, page_file):
    page = open_page(page_file, viewport={"width": 360, "height": 740}, reduced_motion="reduce")
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('input, select, button, img, [role=img], [role=application]')].filter(e => !(
             e.labels?.length || e.textContent.trim() || e.getAttribute('aria-label') || e.alt || e.closest('button[aria-label]') || e.closest('[hidden]')
           )).map(e => e.outerHTML.slice(0, 80))"""
    )
    assert unnamed == []
    assert page.locator("main").count() == page.locator("h1").count() == 1
    assert page.locator("table:not(:has(caption)), table:not(:has(th[scope]))").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    caption = page.locator("#defects caption span").bounding_box()
    assert caption["x"] >= 0 and caption["x"] + caption["width"] <= 360, "a caption wraps although its table scrolls"
    assert page.evaluate("[...document.querySelectorAll('.interval')].every(e => e.scrollWidth <= e.clientWidth)")
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"


def test_budget_shown_is_one_the_calibration_can_keep(open_page, report, tmp_path):
    few = report.calibration_scores[:9]
    path = tmp_path / "report.html"
    write_report(
        replace(report, calibration_scores=few, threshold=threshold(few, 0.05)), path
    )  # asked for 1 in 20, can keep 1 in 10
    page = open_page(path)
    assert page.input_value("#budget") == "10"
    assert "too few" in page.text_content(".warning")


def test_page_works_in_a_sandboxed_frame_as_artifact_views_have(browser, page_file):
    page, log = browser.new_page(), []
    watch(page, log)
    page.set_content("<iframe sandbox='allow-scripts' width=1200 height=2000></iframe>")
    page.eval_on_selector("iframe", "(frame, html) => { frame.srcdoc = html; }", page_file.read_text(encoding="utf-8"))
    frame = page.frame_locator("iframe")
    frame.locator("canvas.heat").first.wait_for()
    frame.locator(".open").first.click()
    assert frame.locator("#viewer-title").text_content()
    assert log == []
    page.close()


def test_hostile_names_stay_text(open_page, report, tmp_path):
    evil = "</script><script>window.hacked=1</script><img src=x onerror=window.hacked=1>\u2028'\"&amp;{{7*7}}"
    images = [
        replace(
            image,
            path=evil + image.path,
            neighbors=[Neighbor(n.thumb, evil + n.path) for n in image.neighbors],
        )
        for image in report.images
    ]
    hostile = replace(
        report,
        category=evil,
        title=evil,
        images=images,
        paths=[image.path for image in images],
        defects=[evil if d == "hole" else d for d in report.defects],
        per_defect=[replace(row, defect=evil) if row.defect == "hole" else row for row in report.per_defect],
        bundle=evil,
        provenance={evil: {evil: evil, "list": [evil]}},
    )
    path = tmp_path / "names & <b>.html"
    write_report(hostile, path)
    page = open_page(path)
    page.locator(".open").first.click()
    assert page.text_content("#viewer-title").startswith(evil)
    assert page.text_content("h1") == evil
    assert page.evaluate("window.hacked") is None
    assert page.locator("img[onerror]").count() == 0
    caught = page.locator("#defects tbody tr", has_text="hacked").locator("td").nth(1).text_content()
    expected = (report.scores[np.array(report.defects) == "hole"] > report.threshold.value).sum()
    assert caught.strip().startswith(f"{expected} of")


def test_policy_stops_a_script_that_is_not_the_pages_own(browser, page_file, tmp_path):
    path = tmp_path / "injected.html"
    path.write_text(
        page_file.read_text().replace(
            "</main>", "<script>window.hacked=1</script><img src=x onerror='window.hacked=1'></main>", 1
        )
    )
    page = browser.new_page()
    page.goto(file_url(path))
    page.wait_for_selector("html.ready")
    assert page.evaluate("window.hacked") is None
    page.close()


@pytest.mark.parametrize(
    "case", ["bare", "nothing tested", "normals", "infinite", "many kinds", "equal", "one calibration score"]
)
def test_unusual_reports_open(open_page, report, tmp_path, case):
    plain = [replace(image, heatmap=None, mask=None, neighbors=(), spot=None) for image in report.images]
    good = np.flatnonzero(report.labels == 0)
    kinds = [d if d == "good" else f"kind {i % 13}" for i, d in enumerate(report.defects)]
    odd = {
        "bare": replace(report, images=plain, per_defect=(), provenance={}),
        "nothing tested": replace(
            report,
            paths=[],
            defects=[],
            labels=np.zeros(0, int),
            scores=np.zeros(0),
            p_values=np.zeros(0),
            images=[],
            per_defect=(),
            headline=[],
            cautions=["No defective test images: <not measured>."],
        ),
        "normals": replace(
            report,
            paths=[report.paths[i] for i in good],
            defects=["good"] * len(good),
            labels=report.labels[good],
            scores=report.scores[good],
            p_values=report.p_values[good],
            images=[report.images[i] for i in good],
            per_defect=(),
        ),
        "infinite": replace(
            report, threshold=replace(report.threshold, value=float("inf"), message="too few calibration images")
        ),
        "many kinds": replace(
            report,
            defects=kinds,
            images=[replace(image, defect=d) for image, d in zip(report.images, kinds, strict=True)],
        ),
        "equal": replace(
            report, scores=np.zeros(64), calibration_scores=np.zeros(3), threshold=replace(report.threshold, value=0.0)
        ),
        "one calibration score": replace(report, calibration_scores=report.calibration_scores[:1]),
    }[case]
    path = tmp_path / "report.html"
    write_report(odd, path)
    page = open_page(path)
    assert count(page, "misses") == (odd.scores[odd.labels == 1] <= odd.threshold.value).sum()
    if case == "bare":
        assert page.locator("#show-heat, #defects, .near").count() == 0
    if case == "nothing tested":
        assert page.text_content("#headline .warning") == "No defective test images: <not measured>."
        assert page.text_content("#promise").startswith("2 of 60 calibration images")
    if case == "normals":
        assert "Needs good and defective" in page.text_content("#roc")
    if case == "many kinds":
        assert page.locator("#histogram .kind").count() == 2 + 9 and "5 other kinds" in page.text_content("#histogram")


def test_page_names_no_other_address(page_file):
    text = page_file.read_text(encoding="utf-8")
    markup = re.sub(r"<(script|style)[^>]*>.*?</\1>", "", text, flags=re.S)
    assert not re.search(r"(src|href)=[\"'](?!#)", markup)


def test_write_is_atomic_and_bad_input_is_refused(report, tmp_path):
    path = tmp_path / "r.html"
    path.write_text("old")
    with pytest.raises(ValueError, match="63 scores"):
        write_report(replace(report, scores=report.scores[:-1]), path)
    with pytest.raises(ValueError, match="not among the scored images"):
        write_report(replace(report, paths=["x", *report.paths[1:]]), path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(replace(report, scores=np.where(np.arange(64) == 3, np.nan, report.scores)), path)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["r.html"]
    write_report(report, path)
    assert path.read_text(encoding="utf-8") == build_report(report)
