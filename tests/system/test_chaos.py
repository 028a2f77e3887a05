# SPDX-License-Identifier: Apache-2.0
"""Kills at random moments (`make chaos`), in small; and that what goes wrong would be seen."""

from __future__ import annotations

import hashlib

import chaos


def test_a_few_kills_change_nothing(tmp_path):
    ((name, counts),) = chaos.chaos(kills=2, seed=0, folder=tmp_path, commands=["validate"])
    assert name == "validate" and counts["trials"] == 2
    assert not any(counts[kind] for kind in ("torn", "failed", "lost", "wrong")), counts


def test_a_command_that_loses_doubles_or_tears_is_seen(tmp_path, monkeypatch):
    """Appends a line, waits to be killed the first time, then writes the file that counts, which a second run does not repair."""
    project, snapshot = tmp_path / "project", tmp_path / "snapshot"
    for folder in (project, snapshot):
        (folder / "build").mkdir(parents=True)
    monkeypatch.setitem(
        chaos.COMMANDS,
        "score",
        ["sh", "-c", "echo x >> build/log; [ -e begun ] || { touch begun; sleep 600; }; echo y > build/result"],
    )
    known = chaos.Undisturbed({}, {"build/log": "one line", "build/result": "y", "build/gone": "z"}, 2.0)
    found = chaos.trial("score", project, snapshot, known, moment=3.0)
    assert found["killed"] and found["torn"] == ["build/log"]
    assert found["lost"] == ["build/gone"] and set(found["wrong"]) == {"build/log", "build/result"}


def test_a_command_killed_when_its_work_is_done_is_not_run_again(tmp_path, monkeypatch):
    project, snapshot = tmp_path / "project", tmp_path / "snapshot"
    for folder in (project, snapshot):
        (folder / "build").mkdir(parents=True)
    monkeypatch.setitem(chaos.COMMANDS, "score", ["sh", "-c", "echo x >> build/log; sleep 600"])
    after = {"build/log": hashlib.sha256(b"x\n").hexdigest()}
    assert chaos.trial("score", project, snapshot, chaos.Undisturbed({}, after, 2.0), moment=3.0) == {"killed": ["yes"]}


def test_what_is_torn():
    known = chaos.Undisturbed({"a": "1", "b": "1"}, {"a": "2", "b": "2"}, 1.0)
    broken = {"registry: version 1": '["hash", false, "FINISHED", {}]'}
    assert chaos.torn({"a": "1", "b": "2"}, known) == []
    assert chaos.torn({"a": "3"}, known) == ["a"]
    assert chaos.torn(broken, known) == ["registry: version 1: files missing"]
