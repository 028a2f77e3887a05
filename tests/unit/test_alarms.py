# SPDX-License-Identifier: Apache-2.0
"""The record of alarms: appended to, never changed, and what follows from it."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from panda_ad.errors import UserError
from panda_ad.monitor.alarms import PROMISE, State, acknowledge, add, read_status, recording, tell


def alarm(folder, since: str, findings=("darker",), version="1"):
    facts = {"since": since, "findings": list(findings), "model": "m", "version": version, "alias": "staging"}
    add("fabric", "alarm", facts, folder)
    return read_status("fabric", folder).alarms[-1]


def test_without_records_the_calibration_images_are_the_reference(tmp_path):
    status = read_status("fabric", tmp_path)
    assert status.state == State() and not status.alarms and status.open_change is None


def test_an_alarm_makes_the_images_since_the_change_the_reference_until_the_next(tmp_path):
    first = alarm(tmp_path, "2026-03-04T10:00:00+00:00")
    status = read_status("fabric", tmp_path)
    assert status.open == [first] and status.state.since == np.datetime64("2026-03-04T10:00", "us")
    assert status.state.until > status.state.since and status.before == State()
    second = alarm(tmp_path, "2026-03-09T12:30:00+02:00", ("brighter",))
    status = read_status("fabric", tmp_path)
    assert status.open == [second] and "another change" in status.alarms[0].end
    assert status.state.since == np.datetime64("2026-03-09T10:30", "us")
    assert str(second) == "brighter since 2026-03-09 10:30 UTC"


def test_a_person_ends_an_alarm_and_the_record_says_who_and_why(tmp_path):
    with pytest.raises(UserError, match="no alarm is open"):
        acknowledge("fabric", "", tmp_path)
    alarm(tmp_path, "2026-03-04T10:00:00+00:00")
    state = read_status("fabric", tmp_path).state
    (ended,) = acknowledge("fabric", "new lamp, ticket 12", tmp_path)
    assert "acknowledged by " in ended.end and ended.end.endswith(": new lamp, ticket 12")
    status = read_status("fabric", tmp_path)
    assert not status.open and status.state == state, "the new state stays the reference"
    record = json.loads((tmp_path / "fabric/000002-acknowledged.json").read_text())
    assert "@" in record["who"] and record["when"] and record["reason"] == "new lamp, ticket 12"
    with pytest.raises(UserError, match="no alarm is open"):
        acknowledge("fabric", "", tmp_path)


def test_training_ends_an_alarm_and_a_return_brings_back_the_reference_before(tmp_path):
    first = alarm(tmp_path, "2026-03-04T10:00:00+00:00")
    add("fabric", "retrained", {"alarm": first.number, "version": "2", "images": 31}, tmp_path)
    status = read_status("fabric", tmp_path)
    assert not status.open and "version 2 was trained on 31 images" in status.alarms[0].end
    state = status.state
    second = alarm(tmp_path, "2026-03-08T10:00:00+00:00")
    add("fabric", "as before", {"alarm": second.number, "since": "2026-03-09T10:00:00+00:00"}, tmp_path)
    status = read_status("fabric", tmp_path)
    assert status.state == State(state.since, state.until, np.datetime64("2026-03-09T10:00", "us"))
    assert "as before again" in status.alarms[1].end


def test_a_broken_promise_changes_no_reference_and_ends_with_its_version(tmp_path):
    broken = alarm(tmp_path, "2026-03-04T10:00:00+00:00", (PROMISE,))
    status = read_status("fabric", tmp_path)
    assert status.state == State() and status.open == [broken] and status.open_change is None
    add("fabric", "replaced", {"alarm": broken.number, "version": "2"}, tmp_path)
    assert "version 2 took its place" in read_status("fabric", tmp_path).alarms[0].end


def test_prefect_is_told_once(tmp_path):
    assert not alarm(tmp_path, "2026-03-04T10:00:00+00:00").told
    tell("fabric", read_status("fabric", tmp_path).open[0], tmp_path)
    assert read_status("fabric", tmp_path).open[0].told


def test_records_of_several_processes_have_numbers_of_their_own(tmp_path):
    def one(i: int) -> None:
        with recording("fabric", tmp_path):
            alarm(tmp_path, f"2026-03-04T10:00:{i:02d}+00:00")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(12)))
    assert [a.number for a in read_status("fabric", tmp_path).alarms] == list(range(1, 13))


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": "alarm", "when": "2026"}', '{"kind": "told", "when": ""}'])
def test_a_damaged_record_is_one_line(tmp_path, text):
    alarm(tmp_path, "2026-03-04T10:00:00+00:00")
    (tmp_path / "fabric/000002-told.json").write_text(text)
    with pytest.raises(UserError, match="000002-told.json: damaged record"):
        read_status("fabric", tmp_path)
