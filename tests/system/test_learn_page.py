# SPDX-License-Identifier: Apache-2.0
"""The page of what the model learns, with a real registry: from an alarm to good, taught, scored again, taken back."""

from __future__ import annotations

import re
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import uvicorn
from browser import barriers, browser, watch  # noqa: F401
from conftest import save
from inspect_site import Inspector
from monitor_project import make_monitored
from registry_project import NAME, aliases, set_gate

from panda_ad.commands.score import score_files
from panda_ad.inspect.access import Access
from panda_ad.inspect.app import create_app
from panda_ad.inspect.server import make_site
from panda_ad.monitor.log import LOG
from panda_ad.params_file import load_params
from panda_ad.registry.lineage import explain_version
from panda_ad.registry.load import load_model
from panda_ad.system.files import digest_file

TOKENS = {"decide": "d" * 16, "promote": "p" * 16}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return make_monitored(tmp_path_factory, tmp_path_factory.mktemp("built") / "plant")


@pytest.fixture
def plant(built, tmp_path, monkeypatch):
    """A copy of a project whose version 1 is in place and has called three parts with a white label defects."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("PANDA_DECISIONS", raising=False)
    folder = shutil.copytree(built, tmp_path / "plant")
    monkeypatch.chdir(folder)
    set_gate(folder, decision_margin=None, recall_margin=None, margin=None)
    for i in range(3):
        pixels = np.random.default_rng(i).integers(90, 160, (32, 32, 3), dtype=np.uint8)
        pixels[8:20, 8:20] = 255
        save(pixels, folder / f"inbox/fabric/label {i}.png")
    score()
    return folder


@pytest.fixture
def site(plant):
    found = make_site(load_params(), Access())
    yield found
    found.close()


def score() -> None:
    model = load_model(f"models:/{NAME}@staging", None)
    score_files(sorted(Path("inbox/fabric").iterdir()), model, Path("verdicts.csv"), log=LOG)


def tiles(page) -> set[str]:
    return set(re.findall(r'name="pick-([0-9a-f]{64})"', page.text))


def test_confirmed_false_alarms_wait_are_taught_and_taken_back(site):
    anna = Inspector(site)
    rows = site.queue("fabric").rows()
    alarms = [sha256 for sha256, row in rows.items() if row.alarm]
    assert len(alarms) == 3 and tiles(anna.get("/learn/fabric")) == set()
    for sha256 in alarms:
        page = anna.get(f"/queue/fabric?at={sha256}").text
        anna.post("/queue/fabric/decide", **anna.form(page) | {"label": "good"})
    assert tiles(anna.get("/learn/fabric")) == set(alarms)
    assert "Nothing was picked" in anna.post("/learn/fabric", what="teach").text
    picked = {f"pick-{sha256}": "1" for sha256 in alarms[:2]}
    page = anna.post("/learn/fabric", what="teach", reason="new lamp", **picked)
    assert "version 2, @staging: promoted" in page.text and tiles(page) == {alarms[2]}
    assert page.text.count("No alarm") == 2 and "new lamp" in page.text, "the effect is seen at once"
    (log,) = explain_version(NAME, 2)["gallery_changes"]
    assert set(log["images"]) == set(alarms[:2]) and log["who"].startswith("Anna (")
    score()
    assert not any(site.queue("fabric").rows()[sha256].alarm for sha256 in alarms[:2]), "and at the next scoring"
    page = anna.post("/learn/fabric", what="undo")
    assert "version 3, @staging: promoted" in page.text and "taken back" in page.text


def test_a_taught_image_that_turns_out_to_be_bad_is_proposed_and_taken_out(site):
    anna = Inspector(site)
    sha256 = next(s for s, row in site.queue("fabric").rows().items() if row.alarm)
    page = anna.get(f"/queue/fabric?at={sha256}").text
    answer = anna.post("/queue/fabric/decide", **anna.form(page) | {"teach": "1"})
    assert answer.url.path == "/learn/fabric" and "version 2, @staging: promoted" in answer.text
    page = anna.get(f"/queue/fabric?at={sha256}&show=decided").text
    anna.post("/queue/fabric/decide", **anna.form(page) | {"label": "defect", "kind": "hole"})
    page = anna.get("/learn/fabric")
    assert tiles(page) == {sha256} and "decided defect since" in page.text
    page = anna.post("/learn/fabric", what="remove", **{f"pick-{sha256}": "1"})
    assert "version 3, @staging: promoted" in page.text and "ingest --remove" not in page.text
    page = anna.get("/learn/fabric?suspects=1")
    assert len(tiles(page)) == 14, "all images of a small gallery"
    trained = next(iter(tiles(page)))
    page = anna.post("/learn/fabric", what="remove", **{f"pick-{trained}": "1"})
    assert f"panda-ad ingest --remove -c fabric {trained[:16]}" in page.text


def test_who_may_not_and_what_makes_no_sense_changes_nothing(plant):
    site = make_site(load_params(), Access(TOKENS))
    dan, pia = Inspector(site, "Dan", TOKENS["decide"]), Inspector(site, "Pia", TOKENS["promote"])
    sha256 = next(s for s, row in site.queue("fabric").rows().items() if row.alarm)
    page = dan.get(f"/queue/fabric?at={sha256}").text
    assert 'name="teach"' not in page and 'name="teach"' in pia.get(f"/queue/fabric?at={sha256}").text
    assert dan.post("/queue/fabric/decide", **dan.form(page) | {"teach": "1"}).status_code == 403
    assert site.decisions.standing("fabric") == {}
    picked = {f"pick-{sha256}": "1"}
    assert dan.post("/learn/fabric", what="teach", **picked).status_code == 403
    assert pia.post("/learn/fabric", what="teach", **picked).status_code == 422, "nobody decided that it is good"
    pia.post("/queue/fabric/decide", **pia.form(page) | {"csrf": pia.csrf(), "label": "good"})
    file = next(p for p in Path("inbox/fabric").iterdir() if digest_file(p) == sha256)
    shutil.copyfile(next(p for p in Path("inbox/fabric").iterdir() if p != file), file)
    said = pia.post("/learn/fabric", what="teach", **picked)
    assert said.status_code == 200 and 'class="notice bad"' in said.text
    assert "no image of the gallery" in pia.post("/learn/fabric", what="remove", **{"pick-../x": "1"}).text
    assert aliases() == {"staging": 1, "challenger": 1} and not Path("monitoring/taught").exists()
    site.close()


@pytest.fixture
def here(site):
    """The page's address, served on loopback."""
    config = uvicorn.Config(create_app(site, "k" * 64, ["127.0.0.1"]), port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


def test_no_barriers_in_both_languages_by_day_and_night(here, browser):  # noqa: F811
    for scheme, language in (("light", "de"), ("dark", "en")):
        context = browser.new_context(color_scheme=scheme, locale=language, viewport={"width": 1180, "height": 820})
        page = context.new_page()
        page.goto(f"{here}/me")
        assert barriers(page) == []
        page.fill("input[name=who]", "Anna")
        page.press("input[name=who]", "Enter")
        page.wait_for_selector("html.explained")
        assert page.get_attribute("html", "lang") == language and barriers(page) == []
        for path in ("threshold/fabric", "learn/fabric", "state/fabric", "no/such/page"):
            page.goto(f"{here}/{path}")
            assert barriers(page) == []


def test_the_whole_way_by_keyboard(here, browser):  # noqa: F811
    page = browser.new_context(viewport={"width": 820, "height": 1180}).new_page()
    log: list[str] = []
    watch(page, log)
    page.goto(f"{here}/me")
    page.fill("input[name=who]", "Anna")
    page.press("input[name=who]", "Enter")
    page.wait_for_selector("html.explained")  # the script that hears keys has run
    page.keyboard.press("t")
    page.wait_for_selector(".effects b.fine")
    assert "version 2, @staging: promoted" in page.inner_text(".notice:not([hidden])") and aliases()["staging"] == 2
    page.click(".effects a")
    page.wait_for_selector("html.explained")
    assert "Version 2 is in place now" in page.inner_text("#evidence")
    page.goto(f"{here}/learn/fabric")
    page.keyboard.press("z")
    page.wait_for_function("document.querySelectorAll('#undo').length === 0")
    assert "version 3, @staging: promoted" in page.inner_text(".notice:not([hidden])")
    assert [line for line in log if not line.startswith("request: http://127.0.0.1")] == []
