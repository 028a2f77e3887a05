"""Parameters changed for one run: gone after it, and after its death with whoever takes the lock next."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPO

from panda_ad.errors import UserError
from panda_ad.system import stage
from panda_ad.system.changed_params import LEFT, SAVED, changed_params
from panda_ad.system.lock import repository_lock

KILLED = """
import os
from panda_ad.changed_params import changed_params
from panda_ad.lock import repository_lock
with repository_lock("doomed"), changed_params(["gallery.k=3"]):
    open("dvc.lock", "w").write("of the run")
    os.kill(os.getpid(), 9)
"""


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    shutil.copy(REPO / "params.yaml", tmp_path)
    (tmp_path / "dvc.lock").write_text("old")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def snapshot():
    return {name: Path(name).read_bytes() if Path(name).exists() else None for name in ("params.yaml", "dvc.lock")}


def kill_a_run():
    """A run with gallery.k=3, killed in the midst."""
    subprocess.run([sys.executable, "-c", KILLED], check=False)
    assert "k: 3 " in Path("params.yaml").read_text()


def test_changed_params_last_for_the_run_only():
    before = snapshot()
    with changed_params(["adapt.method=ewc", "gallery.k=3", "categories=[grid]"]):
        text = Path("params.yaml").read_text()
        assert "method: ewc" in text and "k: 3" in text
        assert "# nearest neighbors summed into the score" in text, "comments stay"
        Path("dvc.lock").write_text("of the run")
    assert snapshot() == before
    assert not SAVED.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("adapt.metod=ewc", "metod"),
        ("adapt.method=magic", "params.yaml: adapt.method"),
        ("gallery.k=-1", "params.yaml: gallery.k"),
        ("nonsense", "nonsense"),
        ("=", "set_params"),
        ("gate.margin=0.5", "gate"),
        ("++gate.min_image_auroc=null", "gate"),
        ("gate={margin: 1}", "gate"),
        ("~gate.must_catch", "gate"),
    ],
)
def test_a_wrong_change_is_one_line_and_changes_nothing(change, said):
    before = snapshot()
    with pytest.raises(UserError, match=said) as error, changed_params([change]):
        pass
    assert "\n" not in str(error.value)
    assert snapshot() == before


def test_a_killed_run_is_put_back_by_whoever_takes_the_lock_next(capsys):
    before = snapshot()
    kill_a_run()
    Path("dvc.lock").write_text("of others since")
    with repository_lock("panda-ad ingest") as restored:
        assert restored and Path("params.yaml").read_bytes() == before["params.yaml"]
    said = capsys.readouterr().err
    assert said.startswith("panda-ad: ") and "params.yaml is put back" in said and said.count("\n") == 1
    assert Path("dvc.lock").read_text() == "of others since", "what has run since is not undone"
    with repository_lock("the next") as restored:
        assert not restored
    assert capsys.readouterr().err == "" and not SAVED.exists()


@pytest.mark.parametrize("edit", ["verdict: {}\n", "params.yaml of before"])
def test_what_was_edited_since_a_killed_run_stays(capsys, edit):
    before = snapshot()["params.yaml"]
    kill_a_run()
    edited = before if "before" in edit else Path("params.yaml").read_bytes() + edit.encode()
    Path("params.yaml").write_bytes(edited)
    with repository_lock("panda-ad run") as restored:
        assert not restored and Path("params.yaml").read_bytes() == edited
    said = capsys.readouterr().err
    if edited == before:  # put back by hand, e.g. by git
        assert said == ""
    else:
        assert said.count("\n") == 1 and str(LEFT / "params.yaml") in said
        assert (LEFT / "params.yaml").read_bytes() == before
    with repository_lock("the next"):
        assert capsys.readouterr().err == ""


def test_what_was_edited_during_a_run_stays():
    with changed_params(["gallery.k=3"]):
        Path("params.yaml").write_text("mine")
    assert Path("params.yaml").read_text() == "mine" and not SAVED.exists()


def test_a_stage_that_dvc_chose_by_a_killed_runs_parameters_does_not_run(monkeypatch, capsys):
    """`dvc repro` reads params.yaml before its first stage takes the lock, and has passed over what seemed unchanged by then."""
    kill_a_run()
    monkeypatch.setattr(sys, "argv", ["index"])
    ran: list[str] = []
    assert stage._run("index", lambda: ran.append("once")) == 2 and ran == []
    assert capsys.readouterr().err.endswith("run `dvc repro` again\n")
    assert stage._run("index", lambda: ran.append("twice")) == 0 and ran == ["twice"]


def test_killed_at_any_moment_of_saving_and_putting_back():
    """Every step that touches a file may be the last one; the next run always finds the old parameters."""
    before = snapshot()
    steps = left = 0
    armed = False

    def tick(event, args):
        nonlocal left
        if armed and event in ("open", "os.rename", "os.remove", "os.rmdir", "shutil.copyfile", "os.mkdir"):
            left -= 1
            if left < 0:
                os._exit(9)

    for limit in range(80):
        left = limit
        pid = os.fork()
        if pid == 0:
            sys.addaudithook(tick)
            armed = True
            with changed_params(["gallery.k=3"]):
                pass
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with repository_lock("the next"):
            assert snapshot() == before, f"killed at step {limit}"
        steps = limit
        if status == 0:
            break
    assert 10 < steps < 79, "the hook has to have cut in at every step, and the run to have got through in the end"
