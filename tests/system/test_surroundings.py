# SPDX-License-Identifier: Apache-2.0
"""Machines without a name for the user, checkouts without .git, checkouts that were moved or have odd paths."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from prefect_project import ROOT, call, clean_environment, make_project

NAMELESS = [
    "unshare",
    "--user",
    "--map-user=12345",
    "--map-group=12345",
    "env",
    "-u",
    "HOME",
    "-u",
    "USER",
    "-u",
    "LOGNAME",
]


def run(*command: str, cwd: Path, **environment: str) -> tuple[int, str]:
    """Exit status and output of a command."""
    done = subprocess.run(
        command, cwd=cwd, env=clean_environment() | {"PYTHONPATH": f"{cwd}{os.pathsep}{ROOT / 'src'}"} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


@pytest.fixture
def project(tmp_path, tmp_path_factory):
    return make_project(tmp_path_factory, tmp_path / "a project")


@pytest.mark.parametrize("home", [None, "/"])
def test_a_user_without_a_name_can_run_everything(project, home):
    """As in OpenShift or after `docker run --user 12345`: the kernel knows the number, and /etc/passwd does not."""
    if shutil.which("unshare") is None or subprocess.run([*NAMELESS, "true"], check=False).returncode:
        pytest.skip("this machine allows no user namespaces")
    nameless = [*NAMELESS, *([f"HOME={home}"] if home else [])]
    status, said = run(*nameless, "dvc", "repro", cwd=project)
    assert status, "DVC alone still needs a name, or this test shows nothing"
    status, said = run(*nameless, "panda-ad", "run", cwd=project)
    assert "adapted grid" in said and "panda-ad: panda-sample-fabric: no" in said, "these stages register nothing"
    code = "from flows.common import read_pipeline; print(len(read_pipeline()[0]), 'stages')"
    assert run(*nameless, "python", "-c", code, cwd=project) == (0, "6 stages\n")
    assert not (project / "~").exists()


def test_a_flow_without_a_server_reports_to_nobody(project):
    """The server that Prefect starts for it would send a heartbeat to its maker."""
    code = "import flows, os; from prefect.settings import get_current_settings as now; "
    code += "print(now().server.analytics_enabled, os.environ['DO_NOT_TRACK'])"
    environment = {name: value for name, value in clean_environment().items() if name != "DO_NOT_TRACK"}
    environment |= {"PYTHONPATH": f"{project}{os.pathsep}{ROOT / 'src'}"}
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, cwd=project, env=environment, text=True) == "False true\n"


def test_without_git_dvc_works_and_one_line_says_what_is_missing(project):
    """An unpacked archive, or a container's COPY. With `git init`, DVC goes back to git by itself."""
    (project / ".git").rename(project.parent / "git")
    status, said = run("panda-ad", "run", cwd=project)
    assert "adapted grid" in said and said.count("no .git here") == 1
    assert "no .git here" not in run("panda-ad", "summary", cwd=project)[1]
    assert run("dvc", "status", cwd=project)[0] == 0
    (project.parent / "git").rename(project / ".git")
    assert "git is used again" in run("panda-ad", "summary", cwd=project)[1]
    assert "no_scm" not in (project / ".dvc/config.local").read_text()
    assert "up to date" in call("dvc", "status", cwd=project)


UV = """#!/bin/sh
# in place of uv, which would download gigabytes: says what it was asked, and writes the one script that `make run` calls
echo "uv $*" >> uv.log
mkdir -p .venv/bin
printf '#!/bin/sh\\n# "%s/.venv/bin/python"\\necho ran "$@"\\n' "$(pwd -P)" > .venv/bin/panda-ad
chmod +x .venv/bin/panda-ad
"""


@pytest.fixture
def checkout(tmp_path):
    """A folder with a blank in its name that holds what `make run` needs, and a stand-in for uv on PATH."""
    folder = tmp_path / "my checkout"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "requirements.lock"):
        shutil.copy(ROOT / name, folder / name)
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools/uv").write_text(UV)
    (tmp_path / "tools/uv").chmod(0o755)
    return folder


def make(folder: Path, *arguments: str) -> tuple[int, str]:
    path = os.pathsep.join([str(folder.parent / "tools"), os.environ["PATH"]])
    return run("make", *arguments, cwd=folder, PATH=path)


def test_make_works_where_the_path_has_a_blank_and_after_the_checkout_was_moved(checkout):
    status, said = make(checkout, "run")
    assert status == 0 and said.endswith("ran run\n"), said
    assert make(checkout, "run") == (0, "ran run\n"), "nothing is installed again"
    moved = checkout.rename(checkout.parent / "another place")
    status, said = make(moved, "run")
    assert status == 0 and said.endswith("ran run\n"), said
    assert "has been moved" in said
    assert make(moved, "run") == (0, "ran run\n")


def test_make_refuses_a_path_with_a_colon_in_one_line(checkout):
    odd = checkout.rename(checkout.parent / "a:b")
    status, said = make(odd, "run")
    assert status == 2 and "colon" in said and len(said.splitlines()) == 1
    assert not (odd / ".venv").exists()
