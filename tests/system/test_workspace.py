# SPDX-License-Identifier: Apache-2.0
"""Changed parameters in a copy of the checkout, which stays as it is to the byte."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from prefect_project import call, finished_project

from panda_ad.errors import UserError
from panda_ad.system.lock import repository_lock
from panda_ad.system.workspace import COPIES, changed_copy


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A project whose pipeline has run and is committed."""
    return finished_project(tmp_path_factory, tmp_path_factory.mktemp("finished") / "project")


@pytest.fixture
def project(finished, tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "project"
    shutil.copytree(finished, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file with its content, but git's and DVC's own, the caches and the test stages' notes."""
    own = {".git", "tmp", "cache", ".cache"}
    files = (p for p in folder.rglob("*") if p.is_file() and not own & set(p.relative_to(folder).parts))
    files = (p for p in files if not p.name.startswith("attempts-"))
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def test_the_run_has_the_changes_and_the_checkout_stays_as_it_is(project):
    before = contents(project)
    with changed_copy(["adapt.method=ewc", "adapt.epochs=7"]):
        text = Path("params.yaml").read_text()
        assert "method: ewc" in text and "epochs: 7" in text and "# null: the paper's 15" in text, "comments stay"
        assert call("dvc", "status", "data.dvc", "validate", cwd=Path.cwd()).strip().endswith("up to date.")
        call("dvc", "repro", "-q", cwd=Path.cwd())
        made = {name: text for name, text in contents(Path.cwd()).items() if name.startswith("build/adapt")}
        assert made["build/adapt-grid"] == b"one\newc 7\n"
    assert contents(project) == before and not list((project / COPIES).iterdir())
    assert "up to date" in call("dvc", "repro", cwd=project), "nothing of it has to be made again"
    subprocess.run(["sed", "-i", "s/method: ses/method: ewc/; s/epochs: 3/epochs: 7/", "params.yaml"], check=True)
    said = call("dvc", "repro", cwd=project)
    assert "Stage 'adapt@grid' is cached" in said, "both have one DVC cache"
    assert {n: text for n, text in contents(project).items() if n.startswith("build/adapt")} == made


def test_the_copy_begins_as_the_checkout_is_now(project):
    """With edits that are not committed, and with files that git does not know yet."""
    subprocess.run(["sed", "-i", "s/^seed: 0/seed: 5/", "params.yaml"], check=True)
    (project / "flows/score.py").write_text("# edited\n")
    (project / "flows/new.py").write_text("# new\n")
    (project / "flows/monitor.py").unlink()
    (project / ".cache").mkdir(exist_ok=True)
    (project / "slow").touch()  # ignored by git
    status = call("git", "status", "--porcelain", cwd=project)
    expected = {n: text for n, text in contents(project).items() if not n.startswith(("build", "params"))}
    with changed_copy(["adapt.epochs=7"]):
        found = contents(Path.cwd())
        assert "seed: 5" in Path("params.yaml").read_text()
        assert {name: text for name, text in found.items() if name in expected} == expected
        assert call("git", "status", "--porcelain", "flows", "params.yaml", cwd=Path.cwd()) == status
        assert Path(".cache").resolve() == project / ".cache", "activations and lock are the checkout's"
        assert os.stat("data/images").st_nlink > 1, "data are links"


def test_data_added_by_hand_come_along_and_stay_the_checkouts(project):
    Path("data/more").write_text("by hand\n")
    recorded, mode = Path("data.dvc").read_bytes(), os.stat("data/more").st_mode
    with changed_copy(["adapt.epochs=7"]):
        assert Path("data/more").read_text() == "by hand\n"
        call("dvc", "repro", "-q", cwd=Path.cwd())
        assert "nfiles: 2" in Path("data.dvc").read_text()
    assert Path("data.dvc").read_bytes() == recorded and os.stat("data/more").st_mode == mode


def test_data_missing_from_the_cache_are_copied(project):
    for cached in (project / ".dvc/cache").rglob("*"):
        if cached.is_file():
            cached.chmod(0o644)
            cached.unlink()
    with changed_copy(["adapt.epochs=7"]):
        assert Path("data/images").read_text() == "one\n" and not Path("build/manifest").exists()


@pytest.mark.parametrize("ignored", [True, False])
def test_images_that_dvc_does_not_track_are_linked(project, ignored):
    Path("data").rename("images")
    Path("data.dvc").unlink()
    subprocess.run(["sed", "-i", "s/root: data /root: images /", "params.yaml"], check=True)
    subprocess.run(["sed", "-i", "s/deps: .data./deps: [images]/; s:cat data:cat images:", "dvc.yaml"], check=True)
    if ignored:
        with open(".gitignore", "a") as file:
            file.write("/images\n")
    with changed_copy(["adapt.epochs=7"]):
        assert os.stat("images/images").st_nlink > 1 and not Path("images").is_symlink()
        call("dvc", "repro", "-q", cwd=Path.cwd())
    assert Path("images/images").read_text() == "one\n"


def test_without_git_and_in_a_folder_below(tmp_path, monkeypatch, finished):
    plain = tmp_path / "plain"
    shutil.copytree(finished, plain, ignore=shutil.ignore_patterns(".git"))
    call("dvc", "config", "core.no_scm", "true", cwd=plain)
    (plain / ".dvc/.gitignore").unlink()
    monkeypatch.chdir(plain)
    with changed_copy(["adapt.epochs=7"]):
        call("dvc", "repro", "-q", cwd=Path.cwd())
        assert Path("build/adapt-grid").read_text() == "one\nses 7\n"
        assert not Path(".dvc/cache").exists()

    below = tmp_path / "all/below"
    shutil.copytree(plain, below)
    call("dvc", "config", "core.no_scm", "false", cwd=below)
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t", "commit", "-qm", "x"]):
        call("git", *command, cwd=tmp_path / "all")
    monkeypatch.chdir(below)
    with changed_copy(["adapt.epochs=8"]):
        assert Path.cwd().name == "below"
        call("dvc", "repro", "-q", cwd=Path.cwd())
        assert Path("build/adapt-grid").read_text() == "one\nses 8\n"


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
def test_a_wrong_change_is_one_line_and_leaves_nothing(project, change, said):
    before = contents(project)
    with pytest.raises(UserError, match=said) as error, changed_copy([change]):
        pass
    assert "\n" not in str(error.value)
    assert contents(project) == before and not list((project / COPIES).iterdir())


def test_a_folder_without_dvc_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no DVC repository"), changed_copy(["adapt.epochs=7"]):
        pass
    assert not list(tmp_path.iterdir())


def test_a_killed_run_leaves_the_checkout_clean_at_once(project):
    before = contents(project)
    code = (
        "import subprocess\nfrom panda_ad.system.lock import repository_lock\n"
        "from panda_ad.system.workspace import changed_copy\n"
        "from panda_ad.system.processes import Group, child_environment\n"
        "with repository_lock('doomed'), changed_copy(['adapt.epochs=7']):\n"
        "  with Group(['dvc', 'repro'], env=child_environment()) as group:\n"
        "    for line in group.lines(): print(line, flush=True)"
    )
    (project / "slow").touch()
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        while run.stdout.readline() != "waiting\n":
            assert run.poll() is None
        run.kill()
    killed = time.monotonic()
    (project / "slow").unlink()
    assert contents(project) == before
    assert call("git", "status", "--porcelain", cwd=project) == ""
    left = list((project / COPIES).iterdir())
    assert len(left) == 1
    while any((p.info["cwd"] or "").startswith(str(left[0])) for p in psutil.process_iter(["cwd"])):
        assert time.monotonic() < killed + 60, "the stages end at once, not after the day that they sleep"
        time.sleep(0.02)
    with repository_lock("the next"), changed_copy(["adapt.epochs=8"]):
        assert not left[0].exists(), "the next such run removes the copy"
