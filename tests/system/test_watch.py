# SPDX-License-Identifier: Apache-2.0
"""Pictures that arrive: nothing lost and nothing doubled by kills, by half a copy, by a receiver that is down, by a new version."""

from __future__ import annotations

import csv
import hashlib
import hmac
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from conftest import noise, save
from monitor_project import make_monitored
from registry_project import NAME, set_gate
from tiny_bundle import make_bundle

from panda_ad.commands.score import judge
from panda_ad.commands.watch import Table, watch
from panda_ad.commands.webhook import Webhook
from panda_ad.errors import UserError
from panda_ad.registry.new_threshold import set_threshold
from panda_ad.scoring.bundle import load_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def inbox(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    return Path("in")


def started(*arguments: object, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "panda_ad.cli", "watch", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment)


def rows() -> list[dict[str, str]]:
    if not Path("watch.csv").exists():
        return []
    with open("watch.csv", newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def wait_for(what, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def ended(process: subprocess.Popen, number: int) -> str:
    process.send_signal(number)
    return process.communicate(timeout=30)[1]


def test_killed_at_any_moment_it_loses_and_doubles_nothing(inbox, bundle):
    for i in range(12):
        save(noise(i), inbox / f"{i}.png")
    (inbox / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (inbox / "line\nbreak.png").write_bytes((inbox / "0.png").read_bytes())
    for count in (2, 6):
        process = started(inbox, "--bundle", bundle, "--settle", 0)
        wait_for(lambda n=count: len(rows()) >= n)
        ended(process, signal.SIGKILL)
    with open("watch.csv", "ab") as f:
        f.write(b"2026-11-26T10:00:00.000+00:00,in/11.png,abc")  # killed within a row
    process = started(inbox, "--bundle", bundle, "--settle", 0)
    wait_for(lambda: len(rows()) >= 14)
    second = started(inbox, "--bundle", bundle)
    assert "another process writes it" in second.communicate(timeout=60)[1] and second.returncode == 2
    save(noise(40), inbox / "0.png")  # another content under a known name
    wait_for(lambda: len(rows()) >= 15)
    assert "Ctrl-C" in ended(process, signal.SIGTERM) and process.returncode == 0
    found = rows()
    assert len({(row["path"], row["sha256"]) for row in found}) == len(found) == 15
    assert [row["decision"] for row in found if "cut.png" in row["path"]] == ["unreadable"]
    detector = load_bundle(bundle)
    for row in found:
        if row["path"] == "in/3.png":
            assert row["score"] == repr(judge(detector, inbox / "3.png").verdict.score), "to the digit"


def test_a_copy_under_way_is_waited_for(inbox, bundle):
    save(noise(1), Path("whole.png"))
    data = Path("whole.png").read_bytes()
    process = started(inbox, "--bundle", bundle, "--settle", 1)
    with open(inbox / "slow.png", "wb") as f:
        for part in range(8):
            f.write(data[part * len(data) // 8 : (part + 1) * len(data) // 8])
            f.flush()
            time.sleep(0.3)
    wait_for(rows)
    ended(process, signal.SIGINT)
    (row,) = rows()
    assert row["decision"] in ("good", "defect") and row["sha256"] == hashlib.sha256(data).hexdigest()


class Receiver(HTTPServer):
    """Takes deliveries; refuses the first one."""

    def __init__(self) -> None:
        self.bodies: list[tuple[str, str, bytes]] = []
        self.refusals = 1

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self.server.refusals -= 1
                refused = self.server.refusals >= 0
                if not refused:
                    found = self.headers["X-Panda-Delivery"], self.headers["X-Panda-Signature"], body
                    self.server.bodies.append(found)
                self.send_response(503 if refused else 204)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)


def test_every_row_reaches_a_receiver_that_was_down(inbox, bundle):
    receiver = Receiver()
    address = f"http://127.0.0.1:{receiver.server_port}/verdicts"
    for i in range(3):
        save(noise(i), inbox / f"{i}.png")
    process = started(inbox, "--bundle", bundle, "--settle", 0, "--webhook", "http://127.0.0.1:9/", no_proxy="*")
    wait_for(lambda: len(rows()) == 3)
    time.sleep(2)  # for the first try to fail, and to be said
    assert "webhook: does not answer" in ended(process, signal.SIGTERM)
    thread = threading.Thread(target=receiver.serve_forever)
    thread.start()
    try:
        for turn in range(3):  # the second time there is nothing left to send; the third begins a new table
            if turn == 2:
                before = [row["path"] for row in rows()]
                Path("watch.csv").unlink()
            process = started(
                inbox, "--bundle", bundle, "--settle", 0, "--webhook", address, "--once", PANDA_WEBHOOK_SECRET="key"
            )
            assert process.communicate(timeout=60) is not None and process.returncode == 0
    finally:
        receiver.shutdown()
        receiver.server_close()
        thread.join()
    assert [json.loads(body)["path"] for _, _, body in receiver.bodies] == before + [row["path"] for row in rows()]
    assert len({delivery for delivery, _, _ in receiver.bodies}) == 6
    for _, signature, body in receiver.bodies:
        assert signature == "sha256=" + hmac.new(b"key", body, hashlib.sha256).hexdigest()


@pytest.mark.parametrize("mark", [b"", b"many", b"\xff\xfe", b"-5", b"7", b"99999"])
def test_a_mark_that_says_nothing_costs_no_row(inbox, bundle, mark):
    save(noise(0), inbox / "0.png")
    watch(inbox, None, bundle, Path("watch.csv"), 0, None, once=True)
    Path("watch.csv.sent").write_bytes(mark)
    said: list[str] = []
    hook = Webhook("http://127.0.0.1:9", Path("watch.csv"), threading.Event(), said.append, b"")
    hook.sent = hook.place()
    assert hook.sent == len(Path("watch.csv").read_bytes().splitlines(keepends=True)[0])
    assert len(said) == 1 and "watch.csv.sent: cannot be read" in said[0]


def test_a_mark_that_cannot_be_written_stops_no_verdict(inbox, bundle):
    got = Receiver()
    address = f"http://127.0.0.1:{got.server_port}/"
    thread = threading.Thread(target=got.serve_forever)
    thread.start()
    try:
        Table.opened(Path("watch.csv"))
        Path("watch.csv.sent").mkdir()
        for i in range(3):
            save(noise(i), inbox / f"{i}.png")
        process = started(inbox, "--bundle", bundle, "--settle", 0, "--once", "--webhook", address)
        said = process.communicate(timeout=60)[1]
    finally:
        got.shutdown()
        got.server_close()
        thread.join()
    assert len(rows()) == len(got.bodies) == 3
    assert said.count("watch.csv.sent: cannot be written") == 1 and "Traceback" not in said


def test_a_new_version_takes_over_and_names_itself(tmp_path_factory, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = make_monitored(tmp_path_factory, tmp_path / "plant")
    monkeypatch.chdir(folder)
    set_gate(folder, decision_margin=None)
    inbox = Path("arrivals")
    save(noise(1, (32, 32)), inbox / "first.png")
    process = started(inbox, "--model", f"models:/{NAME}@staging", "--settle", 0)
    wait_for(lambda: len(rows()) == 1)
    assert set_threshold("fabric", 2 / 7).outcome == "promoted"
    time.sleep(6)
    save(noise(2, (32, 32)), inbox / "second.png")
    wait_for(lambda: len(rows()) == 2)
    assert "version 2 from now on" in ended(process, signal.SIGINT)
    first, second = rows()
    assert (first["model"], first["version"], second["version"]) == (NAME, "1", "2")
    assert first["threshold"] != second["threshold"]


def test_what_cannot_be_watched_says_so(inbox, bundle):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        watch(Path("nowhere"), None, bundle, Path("watch.csv"), 0, None, once=True)
    Path("other.csv").write_text("a,b\n")
    with pytest.raises(UserError, match=r"other.csv: is no table of `panda-ad watch`"):
        Table.opened(Path("other.csv"))
    with pytest.raises(UserError, match="an address that begins with http"):
        watch(inbox, None, bundle, Path("watch.csv"), 0, "ftp://x", once=True)
