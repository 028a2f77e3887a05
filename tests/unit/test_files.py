# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there, and for whom."""

import errno
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from panda_ad.errors import UserError, told
from panda_ad.system import stage
from panda_ad.system.files import atomic_folder


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_a_model_may_be_read_by_whom_the_umask_allows(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with atomic_folder(tmp_path / "bundle") as folder:
            (folder / "localizer").mkdir()
            save_file({"x": torch.zeros(2)}, folder / "localizer" / "memory.safetensors")
            (folder / "bundle.json").write_text("{}")
    finally:
        os.umask(before)
    files = [f for f in (tmp_path / "bundle").rglob("*") if f.is_file()]
    assert len(files) == 2
    assert {f.stat().st_mode & 0o777 for f in files} == {mode}


def test_a_folder_is_replaced_whole_and_what_a_killed_writer_left_is_removed(tmp_path, monkeypatch):
    for n in range(2):
        with atomic_folder(tmp_path / "bundle") as folder:
            (folder / str(n)).touch()
    assert [f.name for f in (tmp_path / "bundle").iterdir()] == ["1"]
    removed, rmtree = [], shutil.rmtree

    def watched(path, **options):
        if path.exists():
            removed.append([f.name for f in (tmp_path / "bundle").iterdir()])
        rmtree(path, **options)

    monkeypatch.setattr(shutil, "rmtree", watched)
    with atomic_folder(tmp_path / "bundle") as folder:
        (folder / "2").touch()
    assert removed == [["2"]]  # nothing is taken apart before the new one is in its place
    monkeypatch.undo()
    dead = subprocess.Popen(["true"])
    dead.wait()
    for word in ("", "old."):
        (tmp_path / f".bundle.{word}{dead.pid}.tmp").mkdir(exist_ok=True)
    with atomic_folder(tmp_path / "bundle") as folder:
        (folder / "3").touch()
    assert [f.name for f in tmp_path.iterdir()] == ["bundle"]


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch):
    with atomic_folder(tmp_path / "bundle") as folder:
        (folder / "old").touch()
    rename = os.rename

    def fail(source, target):
        if target == tmp_path / "bundle" and ".old." not in str(source):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="no"), atomic_folder(tmp_path / "bundle") as folder:
        (folder / "new").touch()
    assert [f.name for f in tmp_path.iterdir()] == ["bundle"]
    assert [f.name for f in (tmp_path / "bundle").iterdir()] == ["old"]


def test_a_folder_whose_writer_fails_stays_as_it_was(tmp_path):
    with atomic_folder(tmp_path / "bundle") as folder:
        (folder / "old").touch()

    def fail():
        with atomic_folder(tmp_path / "bundle") as folder:
            (folder / "new").touch()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert [f.name for f in tmp_path.iterdir()] == ["bundle"]
    assert [f.name for f in (tmp_path / "bundle").iterdir()] == ["old"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_stage_without_permission_is_one_line(tmp_path, monkeypatch, capsys, number):
    def main() -> None:
        raise OSError(number, os.strerror(number), "data/nut/train/good/000.png")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["extract"])
    assert stage._run("extract", main) == UserError.exit_code
    said = capsys.readouterr().err
    assert said.startswith(f"panda-ad: extract: {tmp_path}/data/nut/train/good/000.png: {os.strerror(number)}: ")
    assert "name another folder" in said and said.count("\n") == 1


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_what_the_system_refuses_is_told_with_its_folder_and_what_to_do(tmp_path, number):
    """A temporary file's name says nothing to people: its folder does."""
    said = told(OSError(number, os.strerror(number), str(tmp_path / ".pics-start.9558.tmp")))
    assert said.startswith(f"{tmp_path}: {os.strerror(number)}: ") and ".tmp" not in said.removeprefix(str(tmp_path))
    assert told(OSError(errno.EIO, "Input/output error")) == "Input/output error"
