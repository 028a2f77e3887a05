# SPDX-License-Identifier: Apache-2.0
"""One run at a time: who is let through, and what the others are told."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prefect_project import lock_held

from panda_ad.errors import Busy
from panda_ad.system.lock import HOLDER, LOCK, repository_lock

TRY = "from panda_ad.system.lock import repository_lock\nwith repository_lock('second'): print('got it')"


def test_a_second_run_is_told_who_holds_the_lock(tmp_path):
    with lock_held(tmp_path, "panda-ad run") as pid:
        with pytest.raises(Busy) as busy, repository_lock("panda-ad ingest", tmp_path):
            pass
        said = str(busy.value)
        assert f'another run (pid {pid}, "panda-ad run", since {time.strftime("%H:")}' in said and str(LOCK) in said
        assert busy.value.exit_code == 4 and "\n" not in said
    with repository_lock("panda-ad ingest", tmp_path):  # the other was killed, and the kernel freed its lock
        assert json.loads((tmp_path / HOLDER).read_text())["pid"] == os.getpid()
    assert not (tmp_path / HOLDER).exists()


def test_a_day_is_named_where_it_is_not_today(tmp_path):
    with lock_held(tmp_path, "panda-ad run") as pid:
        note = {"pid": pid, "command": "panda-ad run", "since": "2026-01-02 03:04:05"}
        (tmp_path / HOLDER).write_text(json.dumps(note))
        with pytest.raises(Busy, match="since 2026-01-02 03:04"), repository_lock("second", tmp_path):
            pass
        (tmp_path / HOLDER).unlink()
        with pytest.raises(Busy, match="another run holds"), repository_lock("second", tmp_path):
            pass


@pytest.mark.parametrize("between", [[], ["sh", "-c", '"$@"; true', "sh"]])
def test_what_the_holder_starts_passes_through(tmp_path, between):
    """At any depth: between a run and its stage are DVC and a shell."""
    with repository_lock("panda-ad run", tmp_path):
        command = [*between, sys.executable, "-c", TRY]
        assert subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout == "got it\n"
        with repository_lock("inner", tmp_path):
            pass
        assert json.loads((tmp_path / HOLDER).read_text())["command"] == "panda-ad run"
        assert outsider(tmp_path) == "Busy", "an inner block must not let go of the outer one's lock"
    assert outsider(tmp_path) == "got it"


def outsider(folder: Path) -> str:
    """What a process says that is no child of this one: its starter ends before it asks."""
    wait = "import os, time\nwhile os.getppid() == int(os.environ['STARTER']): time.sleep(0.01)\n"
    code = f"{wait}try:\n  exec({TRY!r})\nexcept Exception as e: print(type(e).__name__)"
    command = ["sh", "-c", 'STARTER=$$ "$@" & ', "sh", sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
