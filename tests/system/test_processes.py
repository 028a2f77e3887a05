# SPDX-License-Identifier: Apache-2.0
import os
import subprocess
import sys
import time

import psutil
import pytest

from panda_ad.system import processes
from panda_ad.system.processes import Group


def members(group):
    """Living processes of a process group."""
    found = []
    for process in psutil.process_iter(["pid", "status"]):
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def gone(group, seconds=30.0):
    limit = time.monotonic() + seconds
    while members(group) and time.monotonic() < limit:
        time.sleep(0.02)
    return not members(group)


def test_output_comes_line_by_line_while_the_command_runs():
    with Group(["sh", "-c", "echo first; echo second >&2; printf 'h\\303\\266he'; sleep 600"]) as group:
        lines = group.lines()
        assert [next(lines), next(lines)] == ["first", "second"]
        assert group.running
    assert gone(group.pid)


def test_lines_and_exit_status():
    with Group(["sh", "-c", "printf 'a\\n\\nh\\303\\266he\\r\\n  end'; exit 7"]) as group:
        assert list(group.lines()) == ["a", "höhe", "  end"]
        assert group.wait() == 7


def test_a_progress_bar_is_not_a_thousand_lines(monkeypatch):
    bar = "import time\nfor i in range(50): print(f'\\r{i}', end='', flush=True); time.sleep(.002)\nprint()"
    with Group([sys.executable, "-c", bar]) as group:
        shown = list(group.lines())
    assert shown[-1] == "49"
    assert len(shown) <= 2
    monkeypatch.setattr(processes, "PROGRESS_SECONDS", 0.0)
    with Group([sys.executable, "-c", bar]) as group:
        assert len(list(group.lines())) > 3


def test_a_child_left_behind_neither_holds_up_nor_survives():
    with Group(["sh", "-c", "sleep 600 & echo done"]) as group:
        assert list(group.lines()) == ["done"]
    assert gone(group.pid)


def test_stop_ends_descendants_that_ignore_the_request():
    with Group(["sh", "-c", "(trap '' TERM; sleep 600; sleep 600) & echo up; wait"]) as group:
        assert next(group.lines()) == "up"
        start = time.monotonic()
        assert group.stop() != 0
    assert gone(group.pid) and time.monotonic() - start < 60, "nothing waits for the ten minutes of the sleep"


def test_being_killed_takes_everything_along():
    start = "import time\nfrom panda_ad.system.processes import Group\ng = Group(['sh', '-c', 'trap : TERM; sleep 60; sleep 60'])\nprint(g.pid, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", start], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout
        group = int(starter.stdout.readline())
        assert members(group)
        starter.kill()
    assert gone(group)


def test_the_command_cannot_hold_its_own_guard_open():
    with Group(
        ["sh", "-c", "ls /proc/self/fd 2>/dev/null | tr '\\n' ' '; cat"]
    ) as group:  # stdin is at its end, so cat returns
        listed = " ".join(group.lines()).split()
        assert group.wait(60) == 0
    if listed:
        assert set(listed) <= {"0", "1", "2", "3"}  # 3: ls's own handle of the folder


def test_a_missing_command_is_status_127():
    with Group(["no-such-command-anywhere"]) as group:
        list(group.lines())
        assert group.wait(60) == 127


def test_files_take_the_output(tmp_path):
    with open(tmp_path / "log", "wb") as log, Group(["sh", "-c", "echo kept"], output=log) as group:
        group.wait(60)
    assert (tmp_path / "log").read_text() == "kept\n"
    with pytest.raises(AssertionError):
        next(group.lines())
