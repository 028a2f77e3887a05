# SPDX-License-Identifier: Apache-2.0
"""A version's figures made again in a clone: equal digit by digit, or named; the working tree is left alone."""

import json
import math
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import yaml
from conftest import REPO, make_mvtec
from prefect_project import BIN, call, clean_environment, lock_held

from panda_ad.commands.reproduce import reproduce
from panda_ad.errors import UserError
from panda_ad.registry.connection import connect
from panda_ad.system.lock import HOLDER, LOCK

NAME = "panda-sample-nut"

# Figures that depend on data, parameters, code and nothing else, by stages a second each.
DVC_YAML = """
stages:
  validate:
    cmd: mkdir -p build/validation && echo "{\\"data_hash\\":\\"$(cat data/images)\\"}" > build/validation/report.json
    deps: [data]
    outs: [build/validation/report.json]
  evaluate:
    matrix: {category: [nut]}
    cmd: python figures.py
    deps: [build/validation/report.json, figures.py]
    params: [seed]
    metrics: [build/evaluation/nut/metrics.json]
"""
FIGURES = """
import json, pathlib, re
seed = int(re.search(r"seed: (.*)", open("params.yaml").read()).group(1))
data = json.load(open("build/validation/report.json"))["data_hash"]
folder = pathlib.Path("build/evaluation/nut")
folder.mkdir(parents=True, exist_ok=True)
(folder / "metrics.json").write_text(json.dumps({"image_auroc": (1 + seed) / 3, "test_good": len(data), "note": "x"}))
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A repository whose version 1 was made with seed 1 from data 'one'."""
    folder = tmp_path_factory.mktemp("published") / "a plant"
    folder.mkdir()
    (folder / "dvc.yaml").write_text(DVC_YAML)
    (folder / "figures.py").write_text(FIGURES)
    (folder / "params.yaml").write_text("seed: 0\ndata: {root: data}\n")
    (folder / ".gitignore").write_text("/data\n/build\n/.cache\n/mlflow.db*\n/mlartifacts\n/remote\n")
    (folder / "data").mkdir()
    (folder / "data/images").write_text("zero\n")
    call("git", "init", "-q", cwd=folder)
    call("git", "config", "user.email", "test@example.org", cwd=folder)
    call("git", "config", "user.name", "test", cwd=folder)
    call("dvc", "init", "-q", cwd=folder)
    call("dvc", "add", "-q", "data", cwd=folder)
    call("git", "add", "-A", cwd=folder)
    call("git", "commit", "-q", "-m", "A project", cwd=folder)
    # what the run used is newer than the commit
    (folder / "params.yaml").write_text("seed: 1\ndata: {root: data}\n")
    (folder / "data/images").write_text("one\n")
    call("dvc", "add", "-q", "data", cwd=folder)
    call("dvc", "repro", "-q", cwd=folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(folder)
        client = connect()
        run = client.create_run(client.create_experiment("panda-sample", (folder / "mlartifacts").as_uri())).info.run_id
        for name in ("params.yaml", "dvc.lock", "data.dvc"):
            client.log_artifact(run, name)
        for key, value in {
            "nut/image_auroc": 2 / 3,
            "nut/test_good": 3,
            "nut/seconds/adapt": 9.5,
            "nut/adapt/loss": 0.1,
        }.items():
            client.log_metric(run, key, value)
        commit = call("git", "rev-parse", "HEAD", cwd=folder).strip()
        tags = {
            "category": "nut",
            "bundle": "b" * 64,
            "data": "one",
            "change": "c" * 64,
            "run": run,
            "commit": commit,
            "git_dirty": "true",
        }
        client.create_registered_model(NAME)
        client.create_model_version(NAME, "x", run, tags={f"panda.{k}": v for k, v in tags.items()})
    # and since then all has gone on
    (folder / "params.yaml").write_text("seed: 2\ndata: {root: data}\n")
    (folder / "data/images").write_text("two\n")
    call("dvc", "add", "-q", "data", cwd=folder)
    call("git", "add", "-A", cwd=folder)
    call("git", "commit", "-q", "-m", "Go on", cwd=folder)
    return folder


@pytest.fixture
def project(published, tmp_path, monkeypatch):
    """A copy of it, the working directory; temporary folders are made in tmp_path/scratch."""
    folder = tmp_path / "a plant"
    shutil.copytree(published, folder, symlinks=True)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    for name in [n for n in os.environ if n.startswith(("MLFLOW_", "DVC_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(folder)
    return folder


def state(folder):
    """Every file outside DVC's and git's own notes, with content."""
    own = {".git", "tmp", "cache", "mlflow.db"}
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and not own & set(p.relative_to(folder).parts)}


def test_equal_figures_and_an_untouched_tree(project, capfd, tmp_path):
    before = state(project)
    with lock_held(project, "panda-ad run"):
        reproduce(NAME, 1)  # another run at work is none of its business
    out = capfd.readouterr().out
    assert re.search(r"image_auroc +0\.6666666666666666 +0\.6666666666666666 +yes", out)
    assert re.search(r"data_hash +one +one +yes", out) and re.search(r"test_good +3\.0 +3\.0 +yes", out)
    assert "all 3 figures are equal" in out and "seconds" not in out and "uncommitted changes" in out
    for note in (LOCK, HOLDER):
        (project / note).unlink()
    assert state(project) == before and not list((tmp_path / "scratch").iterdir())
    assert call("git", "status", "--porcelain", cwd=project) == ""


def test_a_tampered_figure_is_noticed(project, capfd):
    client = connect()
    run = client.get_model_version(NAME, "1").run_id
    client.log_metric(run, "nut/image_auroc", math.nextafter(2 / 3, 1))
    with pytest.raises(UserError, match=r"1 of 3 figures differ: image_auroc; it was published with") as found:
        reproduce(NAME, 1)
    assert found.value.exit_code == 2
    assert re.search(r"image_auroc +0\.6666666666666667 +0\.6666666666666666 +NO", capfd.readouterr().out)


def test_a_figure_that_is_not_made_again_is_noticed(project):
    client = connect()
    client.log_metric(client.get_model_version(NAME, "1").run_id, "nut/recall", 1.0)
    with pytest.raises(UserError, match="differ: recall"):
        reproduce(NAME, 1)


def test_other_code_at_the_commit_is_noticed(project):
    (project / "figures.py").write_text(FIGURES.replace("/ 3", "/ 4"))
    call("git", "commit", "-q", "-a", "-m", "Another formula", cwd=project)
    connect().set_model_version_tag(NAME, "1", "panda.commit", call("git", "rev-parse", "HEAD", cwd=project).strip())
    with pytest.raises(UserError, match="differ: image_auroc"):
        reproduce(NAME, 1)


def test_images_come_from_the_remote_or_it_is_said_that_they_are_gone(project, capfd, tmp_path):
    cache, remote = project / ".dvc/cache", project / "remote"
    shutil.move(cache, remote)
    with pytest.raises(UserError, match=r"neither in DVC's cache here nor in its remote; `dvc push`"):
        reproduce(NAME, 1)
    assert not list((tmp_path / "scratch").iterdir())
    call(
        "dvc", "remote", "add", "-d", "--local", "store", "remote", cwd=project
    )  # kept relative to .dvc, known here only
    reproduce(NAME, 1, keep=True)
    assert "asking the remote" in (out := capfd.readouterr().out)
    kept = Path(re.search(r"kept: (.*)", out).group(1))
    assert (kept / "data/images").read_text() == "one\n" and kept.parent.stat().st_mode & 0o077 == 0


def test_what_cannot_be_reproduced_says_why(project, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such model, version or alias"):
        reproduce(NAME, 7)
    client = connect()
    client.set_model_version_tag(NAME, "1", "panda.commit", "0123456789" * 4)
    with pytest.raises(UserError, match="commit 012345678901 is not in this repository"):
        reproduce(NAME, 1)
    call("git", "clone", "-q", "--depth", "1", f"file://{project}", "shallow", cwd=tmp_path)
    (tmp_path / "shallow/mlflow.db").symlink_to(project / "mlflow.db")
    monkeypatch.chdir(tmp_path / "shallow")
    with pytest.raises(UserError, match="this is a shallow clone: `git fetch --unshallow` and run again"):
        reproduce(NAME, 1)
    monkeypatch.chdir(project)
    client.set_model_version_tag(NAME, "1", "panda.commit", "")
    with pytest.raises(UserError, match="no commit was recorded"):
        reproduce(NAME, 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_real_pipeline_gives_the_same_digits(tmp_path):
    """Validate to publish with DVC, then the same again in a clone, from the command line."""
    project = tmp_path / "plant"
    shutil.copytree(REPO / "src", project / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", "requirements.lock", ".gitignore"):
        shutil.copy(REPO / name, project)
    make_mvtec(project / "data", train=16, good=6, defective=4)
    params = yaml.safe_load((REPO / "params.yaml").read_text(encoding="utf-8")) | {"categories": ["nut"]}
    params["backbone"] |= {"input_size": 32}
    params["adapt"] |= {"method": "ses", "epochs": 1, "batch_size": 8}
    params["evaluate"] |= {"bootstrap": 20}
    (project / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    for command in (
        ["git", "init", "-q"],
        ["git", "config", "user.email", "t@example.org"],
        ["git", "config", "user.name", "t"],
        ["dvc", "init", "-q"],
    ):
        call(*command, cwd=project)
    for command in (["dvc", "add", "-q", "data"], ["git", "add", "-A"], ["git", "commit", "-q", "-m", "A project"]):
        call(*command, cwd=project)
    env = clean_environment() | {"PYTHONPATH": str(project / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [f"{BIN}/dvc", "repro", "-q", "publish@nut"], cwd=project, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = json.loads((project / "build/evaluation/nut/metrics.json").read_text())
    done = subprocess.run(
        [f"{BIN}/panda-ad", "reproduce", NAME, "1"], cwd=project, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    count = sum(isinstance(v, int | float) for v in metrics.values())
    intervals = json.loads((project / "build/evaluation/nut/intervals.json").read_text())
    assert f"all {count + 2 * len(intervals) + 1} figures are equal" in done.stdout and count >= 10
    assert f"{intervals['image_auroc'][0]!r}" in done.stdout
    assert f"{metrics['image_auroc']!r}" in done.stdout
