import os
import subprocess
import sys
import time

import pytest

from panda_ad.errors import Busy
from panda_ad.system.lock import HELD, LOCK, repository_lock

TRY = "from panda_ad.system.lock import repository_lock\nwith repository_lock('second'): print('got it')"


def attempt(folder, **env):
    result = subprocess.run(
        [sys.executable, "-c", TRY], cwd=folder, env={**os.environ, **env}, capture_output=True, text=True
    )
    return result.stdout.strip() or result.stderr.strip().splitlines()[-1]


def outsider(folder):
    """As seen by a process that the holder did not start."""
    env = {k: v for k, v in os.environ.items() if k != HELD}
    result = subprocess.run([sys.executable, "-c", TRY], cwd=folder, env=env, capture_output=True, text=True)
    return result.stdout.strip() or result.stderr.strip().splitlines()[-1]


def test_a_second_run_is_told_who_holds_the_lock(tmp_path):
    with repository_lock("make run", tmp_path):
        said = outsider(tmp_path)
        assert f'another run (pid {os.getpid()}, "make run", since {time.strftime("%H:")}' in said
        assert str(LOCK) in said
    assert outsider(tmp_path) == "got it"


def test_what_the_holder_starts_passes_through(tmp_path):
    with repository_lock("make run", tmp_path):
        assert attempt(tmp_path) == "got it"
        with repository_lock("inner", tmp_path):
            pass
        assert "another run" in outsider(tmp_path), "an inner block must not let go of the outer one's lock"
    assert HELD not in os.environ


def test_a_stale_mark_does_not_open_a_lock_that_another_holds(tmp_path):
    with repository_lock("make run", tmp_path):
        assert "another run" in attempt(tmp_path, **{HELD: "1"})


def test_two_runs_in_one_process_exclude_each_other(tmp_path, monkeypatch):
    with repository_lock("first", tmp_path):
        monkeypatch.delenv(HELD)
        with pytest.raises(Busy) as busy, repository_lock("second", tmp_path):
            pass
        assert busy.value.exit_code == 4
        assert "\n" not in str(busy.value)
        monkeypatch.setenv(HELD, str(os.getpid()))


def test_the_lock_goes_with_its_holder(tmp_path):
    hold = "import time\nfrom panda_ad.system.lock import repository_lock\nwith repository_lock('doomed'):\n  print('in', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout and holder.stdout.readline() == "in\n"
        assert f"(pid {holder.pid}," in outsider(tmp_path)
        holder.kill()
    assert outsider(tmp_path) == "got it"
