# SPDX-License-Identifier: Apache-2.0
"""The queue's page without a browser: what it shows first, what a decision does, who may, and what goes wrong."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from conftest import save
from inspect_site import HERE, Inspector, make_bundle, make_site, part, score_into_log, scratched
from PIL import Image

from panda_ad.features.image_statistics import NAMES
from panda_ad.inspect.access import Access
from panda_ad.inspect.queue import Queue, select
from panda_ad.inspect.texts import language_of, rarity, text_in, texts
from panda_ad.monitor.log import Entry, append
from panda_ad.system.files import digest_file

TOKENS = {"look": "l" * 16, "decide": "d" * 16, "promote": "p" * 16}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def plant(tmp_path, monkeypatch, bundle):
    """A working directory with two scratched and three good parts in the log."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PANDA_DECISIONS", raising=False)
    score_into_log(
        bundle, {f"good {i}": part(100 + i) for i in range(3)} | {f"bad {i}": scratched(200 + i) for i in range(2)}
    )
    return tmp_path


@pytest.fixture
def site(plant, bundle, make_params):
    found = make_site(make_params(["nut", "bolt"]), bundle)
    yield found
    found.close()


@pytest.fixture
def anna(site):
    return Inspector(site)


def shown(page) -> str:
    return re.search(r"picture/([0-9a-f]{64})/screen", page.text).group(1)


def of(name: str) -> str:
    return digest_file(Path(f"inbox/nut/{name}.png"))


def test_alarms_come_first_and_a_decision_leads_to_the_next(anna, site):
    page = anna.get("/queue/nut")
    assert "Alarm" in page.text and shown(page) in {of("bad 0"), of("bad 1")}
    assert "1 of 41 good parts looks like this or worse" in page.text
    first = shown(page)
    page = anna.decide("defect", "scratch")
    assert shown(page) in {of("bad 0"), of("bad 1")} - {first} and "defect." in page.text
    stands = site.decisions.standing("nut")[first]
    assert (stands.label, stands.kind, stands.who, stands.version) == ("defect", "scratch", "Anna", "3")
    assert 'value="scratch"' in page.text, "the kind is proposed for the next one"
    for _ in range(4):
        page = anna.decide("good")
    assert "Nothing waits here" in page.text
    assert shown(anna.get("/queue/nut?show=decided")) != first, "newest decision first"


def test_undo_brings_the_image_back(anna, site):
    first = shown(anna.get("/queue/nut"))
    anna.decide("good")
    page = anna.post("/queue/nut/undo", show="undecided")
    assert "Taken back" in page.text and shown(page) == first
    assert "nothing left to take back" in anna.post("/queue/nut/undo").text


def test_of_two_people_the_second_sees_what_the_first_decided(anna, site):
    ben = Inspector(site, "Ben")
    page = ben.get("/queue/nut").text
    anna.decide("good")
    answer = ben.decide("defect", "hole", page)
    assert "Anna decided: good" in answer.text and "While you looked" in answer.text
    assert shown(answer) == ben.form(page)["sha256"]
    ben.decide("defect", "hole", answer.text)
    assert [d.who for d in site.decisions.standing("nut").values()] == ["Ben"]


def test_the_evidence_names_neighbors_region_and_what_decided(anna, site):
    found = site.scorer.evidence("nut", site.find("nut", of("bad 0"))).result()
    row = site.find("nut", of("bad 0"))
    assert (found.score, found.p_value, found.threshold) == (row.score, row.p_value, row.threshold)
    x0, y0, x1, y1 = found.region
    assert x0 <= 0.4 <= x1 and y0 <= 0.4 <= y1, "around the bright spot"
    text = anna.get(f"/queue/nut/evidence/{row.sha256}").text
    assert "decided:" in text and "None of the 40 calibration images" in text
    heat = Image.open(io.BytesIO(anna.get(re.search(r'src="([^"]*/heat/[^"]*)"', text).group(1)).content))
    assert heat.mode == "RGBA" and np.asarray(heat)[12, 12, 3] > 0 and heat.size == (32, 32)
    for url in re.findall(r'src="([^"]*/normal/[^"]*)"', text):
        assert anna.get(url).headers["content-type"] == "image/jpeg"
    kept = anna.get(f"/queue/nut/picture/{row.sha256}/screen")
    assert kept.headers["cache-control"].startswith("private") and "vary" not in kept.headers


def test_an_image_that_is_gone_or_replaced_is_one_line(anna):
    gone, other = of("bad 0"), of("bad 1")
    Path("inbox/nut/bad 0.png").unlink()
    save(part(999), Path("inbox/nut/bad 1.png"))
    for sha256, why in ((gone, "gone since it was scored"), (other, "holds another image")):
        for part_of in ("picture", "evidence"):
            end = "/screen" if part_of == "picture" else ""
            answer = anna.get(f"/queue/nut/{part_of}/{sha256}{end}", headers={"accept": "text/plain"})
            assert answer.status_code == 422 and why in answer.text and "\n" not in answer.text


def test_a_dropped_picture_is_scored_and_shown(anna, site):
    out = io.BytesIO()
    Image.fromarray(scratched(300)).save(out, "PNG")
    token = anna.csrf()
    send = lambda data, **headers: anna.http.post(  # noqa: E731
        "/queue/nut/drop", content=data, headers={"origin": HERE, "x-csrf": token, "accept": "text/plain"} | headers
    )
    sha256 = send(out.getvalue()).text
    assert Path(f"monitoring/dropped/nut/{sha256}.png").read_bytes() == out.getvalue()
    row = site.find("nut", sha256)
    assert row.alarm and row.version == "3" and send(out.getvalue()).text == sha256
    assert anna.get(f"/queue/nut?at={sha256}").text.count(f"{sha256}/screen") == 1
    bad = send(b"\x89PNG\r\n\x1a\nnonsense")
    assert bad.status_code == 422 and "\n" not in bad.text
    assert send(out.getvalue(), **{"x-csrf": "other"}).status_code == 403
    assert send(b"x" * 100, **{"content-length": str(2**30)}).status_code == 413
    assert list(Path("monitoring/dropped/nut").iterdir()) == [Path(f"monitoring/dropped/nut/{sha256}.png")]


def test_an_empty_queue_says_what_the_reader_can_do(anna, site):
    """Without a name there is no place to drop pictures on: the page must not speak of one."""
    mine, theirs = (person.get("/queue/bolt").text for person in (anna, Inspector(site, "")))
    for page in (mine, theirs):
        assert re.search(r"panda-ad score FOLDER --model models:/panda-[\w-]+-bolt@staging --log", page)
    assert "Or drop pictures below" in mine and 'class="drop"' in mine
    assert "sign in above" in theirs and 'class="drop"' not in theirs and "below" not in theirs


def test_what_comes_from_elsewhere_changes_nothing(anna, site):
    fields = anna.form(anna.get("/queue/nut").text) | {"label": "good"}
    for headers, change in (
        ({"origin": "http://evil.example"}, {}),
        ({}, {}),
        ({"origin": "null"}, {}),
        ({"origin": HERE}, {"csrf": "guessed"}),
        ({"origin": HERE}, {"csrf": ""}),
        ({"origin": HERE}, {"kind": "x" * 20_000}),
    ):
        assert anna.http.post("/queue/nut/decide", data=fields | change, headers=headers).status_code in (403, 413)
    assert anna.http.get("/queue/nut", headers={"host": "evil.example"}).status_code == 400
    assert site.decisions.standing("nut") == {}


def test_no_path_of_a_client_reaches_a_file(anna, tmp_path):
    (tmp_path / "secret.png").write_bytes(b"what only this file holds")
    for path in (
        "picture/..%2F..%2Fsecret.png/screen",
        f"picture/{'a' * 64}/screen",
        f"evidence/{'0' * 64}",
        "normal/3/99999",
        "normal/3/-1",
        "picture/x/../full",
    ):
        answer = anna.get(f"/queue/nut/{path}")
        assert answer.status_code == 404 and "what only" not in answer.text
    for path in (
        "/queue/..%2F..",
        "/queue/other",
        "/static/..%2Fapp.py",
        "/static/style.txt",
        "/docs",
        "/openapi.json",
    ):
        assert anna.get(path).status_code == 404


def test_names_are_text_wherever_they_come_from(plant, bundle, make_params):
    hostile = "<script>alert(1)</script>&"
    score_into_log(bundle, {"hostile": scratched(400)})
    row = Queue("nut").find(of("hostile"))
    entry = Entry(
        datetime.now(UTC) + timedelta(hours=1), f"inbox/nut/{hostile}.png", "f" * 64, "nut", row.model, row.version, 99.0, 0.01,
        True, row.threshold, dict.fromkeys(NAMES, 0.0), np.zeros(512),
    )  # fmt: skip
    append([entry])
    site = make_site(make_params(["nut"]), bundle)
    page = Inspector(site, hostile).get("/queue/nut")
    assert hostile not in page.text and "&lt;script&gt;alert(1)&lt;/script&gt;&amp;" in page.text
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    site.close()


def test_roles_are_had_by_tokens_and_lost_with_them(plant, bundle, make_params):
    site = make_site(make_params(["nut"]), bundle, Access(TOKENS))
    nobody = Inspector(site, "")
    assert nobody.get("/queue/nut").status_code == 401
    looker, decider = Inspector(site, "Lou", TOKENS["look"]), Inspector(site, "Dan", TOKENS["decide"])
    page = looker.get("/queue/nut")
    assert page.status_code == 200 and 'id="decide"' not in page.text and "You may look" in page.text
    fields = decider.form(decider.get("/queue/nut").text) | {"label": "good"}
    assert looker.post("/queue/nut/decide", **fields | {"csrf": looker.csrf()}).status_code == 403
    assert decider.decide("good").status_code == 200
    assert [d.who for d in site.decisions.standing("nut").values()] == ["Dan"]
    changed = replace(site, access=Access(TOKENS | {"decide": "e" * 16}))
    later = Inspector(changed, "")
    later.http.cookies = decider.http.cookies
    assert later.get("/queue/nut").status_code == 401, "the token is no longer in the environment"
    site.close()


def test_a_wrong_token_gives_nothing_and_a_proxy_may_name_people(plant, bundle, make_params, monkeypatch):
    monkeypatch.setattr("anyio.sleep", lambda _seconds: __import__("asyncio").sleep(0))
    site = make_site(make_params(["nut"]), bundle, Access({"decide": "d" * 16}, "X-User"))
    wrong = Inspector(site, "Eve", "x" * 16)
    assert "This token is not known" in wrong.post("/me", token="x" * 16).text
    assert 'id="decide"' not in wrong.get("/queue/nut").text
    right = Inspector(site, "ignored", "d" * 16)
    right.http.headers["x-user"] = "Paul"
    right.decide("unsure")
    assert [d.who for d in site.decisions.standing("nut").values()] == ["Paul"]
    site.close()


def test_the_queue_is_in_order_and_grows_with_the_log(tmp_path, monkeypatch):
    """Against a naive sort; a newer version's verdict on an image takes the place of an older one's."""
    monkeypatch.chdir(tmp_path)
    queue = Queue("nut")
    rng = np.random.default_rng(0)
    start = datetime(2026, 3, 1, tzinfo=UTC)
    entries = [
        Entry(start + timedelta(seconds=i), f"{i}.png", f"{i:064x}", "nut", "m", "1", p, 1 - p, bool(p > 0.9), 0.9, dict.fromkeys(NAMES, 0.0), np.zeros(2))
        for i, p in enumerate(rng.random(60).tolist())
    ]  # fmt: skip
    for group in (entries[:40], entries[40:]):
        append(group)
        queue.order()
    alarms = [e.sha256 for e in reversed(entries) if e.anomalous]
    others = [e.sha256 for e in sorted((e for e in entries if not e.anomalous), key=lambda e: e.p_value)]
    assert list(queue.order()) == alarms + others == select(queue.order(), {}, "undecided")
    append([replace(e, version="2", score=0.0, anomalous=False, time=start + timedelta(days=1)) for e in entries[:5]])
    assert queue.find(entries[0].sha256).version == "2" and len(queue.order()) == 60


def test_a_damaged_log_file_costs_only_itself(anna, plant):
    (plant / "monitoring/log/nut/20300101T000000.000000Z-0.parquet").write_bytes(b"junk")
    page = anna.get("/queue/nut")
    assert page.status_code == 200 and "damaged log file" in page.text and shown(page)


def test_both_languages_say_everything_with_the_same_values():
    for key, both in texts().items():
        assert all(both.values()), key
        assert len({tuple(sorted(re.findall(r"{(\w+)}", text))) for text in both.values()}) == 1, key
    assert language_of("fr, de-AT;q=0.8, en;q=0.5") == "de" and language_of("*") == "en"
    folder = Path(__file__).resolve().parents[2] / "src/panda_ad/inspect"
    used = {key for p in folder.rglob("*.j2") for key in re.findall(r"\bt\('(\w+\.\w+)'[,)]", p.read_text())}
    assert used and used <= texts().keys()


def test_a_p_value_in_words():
    assert rarity(text_in("en"), 1 / 400) == "1 of 400 good parts looks like this or worse"
    assert rarity(text_in("de"), 1 / 3000) == "1 von 3\u202f000 guten Teilen sieht so oder schlechter aus"
    assert rarity(text_in("en"), 0.9).startswith("Most good parts")


def test_the_language_can_be_chosen(anna):
    page = anna.post("/language", language="de", back="/queue/nut")
    assert '<html lang="de">' in page.text and "Gut <kbd>" in page.text
    assert anna.post("/language", language="de", back="//evil.example").url.path == "/queue/nut"
