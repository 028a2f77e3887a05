# SPDX-License-Identifier: Apache-2.0
"""New images: recognized, checked, quarantined, recorded; a kill or a second run harms nothing."""

import csv
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import REPO, build_manifest, make_mvtec, noise, save
from PIL import Image
from prefect_project import call, lock_held

from panda_ad.commands.ingest import _summary, ingest, ingest_remove
from panda_ad.data import manifest, records
from panda_ad.data.add_images import add_images
from panda_ad.data.add_request import Request
from panda_ad.data.remove_images import remove_images
from panda_ad.errors import Busy, UserError


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A repository's folder with category nut in data/; the working directory."""
    folder = tmp_path / "a plant"
    make_mvtec(folder / "data")
    raw = yaml.safe_load((REPO / "params.yaml").read_text(encoding="utf-8")) | {"categories": ["nut"]}
    (folder / "params.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def drop(tmp_path):
    """Three new pictures."""
    for i in range(3):
        save(noise(77_000 + i), tmp_path / "drop" / f"part {i}.png")
    return tmp_path / "drop"


def add(params, category, paths, *arguments, **more):
    return add_images(params, Request(category, tuple(paths), *arguments, **more))


def files(folder="data"):
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())


def reasons(result):
    with open(result.quarantine / "reasons.csv", newline="", encoding="utf-8") as f:
        return {Path(row["path"]).name: row for row in csv.DictReader(f)}


def test_new_images_go_to_train_once(project, drop, make_params):
    params, before = make_params(["nut"]), files()
    result = add(params, "nut", [drop])
    assert [f.name for f, _ in result.added] == ["part 0.png", "part 1.png", "part 2.png"]
    for file, path in result.added:
        assert path.startswith("nut/train/good/part_") and (project / "data" / path).read_bytes() == file.read_bytes()
    assert set(files()) - set(before) == {path for _, path in result.added} and result.quarantine is None
    rows, problems = build_manifest(params)
    assert len(rows) == 22 and not problems
    after = files()
    again = add(params, "nut", [drop, drop / "part 1.png"])
    assert not again.added and again.duplicates == result.added and files() == after


def test_neither_known_images_nor_new_ones_are_read_again(project, drop, make_params, monkeypatch, tmp_path):
    params = make_params(["nut"])
    build_manifest(params)
    read = []
    original = manifest.inspect_image
    monkeypatch.setattr(
        manifest, "inspect_image", lambda root, path, **kw: read.append(path) or original(root, path, **kw)
    )
    result = add(params, "nut", [drop])
    assert len(result.added) == 3 and not read
    rows, _ = build_manifest(params)
    assert not read, "what is taken in has been read once"
    monkeypatch.setattr(records, "CACHE", tmp_path / "no cache")
    pd.testing.assert_frame_equal(build_manifest(params)[0], rows)
    assert set(read) > {path for _, path in result.added}


def test_the_same_picture_is_resultby_its_pixels(project, drop, make_params):
    known = noise(3)  # what make_mvtec wrote as train/good/003.png
    Image.fromarray(known).save(drop / "again.bmp")
    Image.fromarray(noise(77_001)).save(drop / "the same.tiff")
    result = add(make_params(["nut"]), "nut", [drop])
    found = {f.name: twin for f, twin in result.duplicates}
    assert found["again.bmp"] == "nut/train/good/003.png"
    assert found["the same.tiff"].startswith("nut/train/good/part_1-") and len(result.added) == 3


def test_what_cannot_be_used_is_copied_to_quarantine(project, drop, make_params):
    whole = (drop / "part 0.png").read_bytes()
    (drop / "cut.png").write_bytes(whole[: len(whole) // 2])
    (drop / "sub").mkdir()
    (drop / "sub" / "notes.txt").write_text("hello")
    (drop / "sub" / "cut.png").write_bytes(b"")
    save(noise(5, (7, 9)), drop / "tiny.png")
    shutil.copy(project / "data/nut/test/crack/000.png", drop / "defect.png")  # known as defective, now called good
    (drop / ".DS_Store").write_bytes(b"x")
    before = files()
    result = add(make_params(["nut"]), "nut", [drop])
    assert len(result.added) == 3 and len(files()) == len(before) + 3
    assert result.quarantine.parent == project / "quarantine"
    listed = reasons(result)
    assert set(listed) == {"cut.png", "tiny.png", "defect.png"} and len(result.refused) == 4
    assert listed["tiny.png"]["reason"] == "9 x 7 pixels, too small: at least 8 x 8"
    assert "other label" in listed["defect.png"]["reason"] and result.passed_over == "1 .txt"
    assert (result.quarantine / listed["tiny.png"]["copy"]).read_bytes() == (drop / "tiny.png").read_bytes()
    assert len(list(result.quarantine.iterdir())) == 5


def test_a_file_is_quarantined_once(project, drop, make_params):
    """A drop folder that is taken in again each day would else fill the disk with copies of what it was refused for."""
    params = make_params(["nut"])
    save(noise(5, (7, 9)), drop / "tiny.png")
    first = add(params, "nut", [drop])
    shutil.copy(drop / "tiny.png", drop / "again.png")
    again = add(params, "nut", [drop])
    assert len(again.refused) == 2 and (again.quarantine, again.quarantined_before) == (None, 2)
    assert "2 quarantined (2 of them before)" in _summary(again, "nut", project / "data")
    save(noise(6, (7, 9)), drop / "more.png")
    third = add(params, "nut", [drop])
    assert (
        set(reasons(third)) == {"more.png"} and third.quarantine != first.quarantine and third.quarantined_before == 2
    )
    shutil.rmtree(first.quarantine)
    assert set(reasons(add(params, "nut", [drop]))) == {"tiny.png", "again.png"}, (
        "what was cleared away is copied again"
    )


def test_defects_bring_their_masks(project, drop, make_params, tmp_path):
    masks = drop / "masks"
    mask = np.zeros((16, 16), np.uint8)
    save(mask, masks / "part 1_mask.png")  # empty
    save(np.full((16, 15), 255, np.uint8), masks / "part 2.png")  # too narrow
    mask[2:5, 2:5] = 255
    save(mask, masks / "part 0_mask.png")
    save(mask, masks / "nobody.png")
    save(noise(77_009), drop / "bare.png")
    params = make_params(["nut"])
    with pytest.raises(UserError, match="--masks: no folder"):
        add(params, "nut", [drop], "defect", "dent", masks=drop / "nowhere")
    result = add(params, "nut", [drop], "defect", "dent", masks=masks)
    (path,) = [path for _, path in result.added]
    stem = Path(path).stem
    assert path.startswith("nut/test/dent/part_0-")
    assert (project / f"data/nut/ground_truth/dent/{stem}_mask.png").read_bytes() == (
        masks / "part 0_mask.png"
    ).read_bytes()
    why = {f.name: reason for f, reason in result.refused}
    assert set(why) == {"part 1.png", "part 2.png", "bare.png", "nobody.png"}
    assert "empty" in why["part 1.png"] and "15 x 16" in why["part 2.png"] and why["bare.png"] == "has no mask"
    rows, problems = build_manifest(params)
    assert not problems and set(rows["defect"]) == {"good", "crack", "scratch", "dent"}


def test_defects_may_come_without_masks_where_others_have_them(project, drop, make_params):
    params = make_params(["nut"])
    result = add(params, "nut", [drop], "defect", "dent")
    rows, problems = build_manifest(params)
    new = rows[rows["path"].isin([path for _, path in result.added])]
    assert (
        not problems and len(new) == len(result.added) > 0 and (new["mask"] == "").all() and (rows["mask"] != "").any()
    )
    mask = np.zeros((16, 16), np.uint8)
    mask[2:5, 2:5] = 255
    for file, _ in result.added:
        save(mask, drop / "masks" / f"{file.stem}.png")
    again = add(
        params, "nut", [file for file, _ in result.added], "defect", "dent", masks=drop / "masks"
    )  # drawn since
    assert (
        not again.added and not again.refused and all("which has its mask now" in twin for _, twin in again.duplicates)
    )
    rows, problems = build_manifest(params)
    assert not problems and (rows["mask"] != "").sum() == rows["label"].sum()


def test_files_whose_endings_say_nothing_have_masks_of_their_own(project, tmp_path, make_params):
    drop, masks = tmp_path / "drop", tmp_path / "masks"
    for n in (1, 2):
        save(noise(77_100 + n), drop / f"a.{n}.png")
        (drop / f"a.{n}.png").rename(drop / f"a.{n}.raw")
        mask = np.zeros((16, 16), np.uint8)
        mask[n : n + 4, 2:5] = 255
        save(mask, masks / f"a.{n}_mask.png")
    params = make_params(["nut"])
    result = add(params, "nut", sorted(drop.iterdir()), "defect", "scratch", masks=masks)
    assert len(result.added) == 2 and not result.refused
    rows, problems = build_manifest(params)
    new = rows[rows["path"].isin([path for _, path in result.added])]
    assert not problems and len(set(new["mask"])) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"category": "bolt"}, "not one of categories"),
        ({"label": "defect", "split": "train"}, "defects go to test"),
        ({"label": "defect", "kind": "../x"}, "folder's name"),
        ({"label": "defect", "kind": "good"}, "name the kind"),
        ({"kind": "crack"}, "no kind"),
        ({"masks": Path("data")}, "good images have none"),
    ],
)
def test_a_request_that_cannot_be_met_changes_nothing(project, drop, make_params, arguments, message):
    before = files()
    with pytest.raises(UserError, match=message):
        add(make_params(["nut"]), **{"category": "nut", "paths": [drop], **arguments})
    assert files() == before and not (project / "quarantine").exists()


def test_torchvision_sets_take_nothing(project, drop, make_params):
    with pytest.raises(UserError, match="cifar10 is a published set"):
        add(make_params(["cat"], data={"layout": "cifar10"}), "cat", [drop])


def test_folders_layout(tmp_path, drop, make_params, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for n, folder in enumerate(("train/cat", "train/lynx", "test/cat", "test/dog")):
        save(noise(n), tmp_path / "data" / folder / "a.png")
    params = make_params(["pet"], data={"layout": "folders", "normal_classes": {"pet": ["cat", "lynx"]}})
    with pytest.raises(UserError, match="cat, lynx"):
        add(params, "pet", [drop])
    shutil.copy(tmp_path / "data/test/dog/a.png", drop / "dog.png")
    result = add(params, "pet", [drop], kind="lynx", split="test")
    assert {str(Path(path).parent) for _, path in result.added} == {"test/lynx"} and len(result.added) == 3
    assert [f.name for f, _ in result.refused] == ["dog.png"]
    save(noise(9), drop / "wolf.png")
    result = add(params, "pet", [drop / "wolf.png"], "defect", "wolf")
    assert result.added[0][1].startswith("test/wolf/")


def test_the_first_images_of_a_category(project, drop, make_params):
    result = add(make_params(["nut", "bolt"]), "bolt", [drop])
    assert len(result.added) == 3 and result.folder == "bolt/train/good"


def test_a_kill_leaves_whole_files_and_running_again_completes(project, tmp_path, make_params):
    for i in range(60):
        save(noise(88_000 + i, (200, 200)), tmp_path / "big" / f"{i:02d}.png")
    code = "from pathlib import Path; from panda_ad.commands.ingest import ingest; from panda_ad.data.add_request import Request; ingest(Request('nut', (Path('../big'),)))"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=project, env={**os.environ, "OMP_NUM_THREADS": "1"})
    train = project / "data/nut/train/good"
    deadline = time.monotonic() + 300
    while len(list(train.glob("[!.]*-*"))) < 5:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    new = [p for p in train.glob("*-*") if not p.name.startswith(".")]
    assert 5 <= len(new) < 60
    originals = {p.read_bytes() for p in (tmp_path / "big").iterdir()}
    assert all(p.read_bytes() in originals for p in new)
    (train / ".x.png.123.tmp").write_bytes(b"half")
    result = add(make_params(["nut"]), "nut", [tmp_path / "big"])
    assert len(result.duplicates) == len(new) and len(result.added) == 60 - len(new)
    assert not list(train.glob(".*")) and len(build_manifest(make_params(["nut"]))[0]) == 79


def test_one_at_a_time(project, drop, monkeypatch):
    with lock_held(project, "other"):
        before = files()
        with pytest.raises(Busy):
            ingest(Request("nut", (drop,)))
        assert files() == before


@pytest.mark.slow
def test_the_new_version_is_recorded_with_dvc(project, drop, capfd, monkeypatch):
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"], ["dvc", "add", "-q", "data"]):
        call(*command, cwd=project)
    tracked = project / "data.dvc"
    tracked.write_text(tracked.read_text() + "desc: nuts from line 3\n")
    old = yaml.safe_load(tracked.read_text())["outs"][0]["md5"]
    shutil.copy(drop / "part 0.png", drop / "part 0 copy.png")
    ingest(Request("nut", (drop,)))
    out = capfd.readouterr().out
    new = yaml.safe_load(tracked.read_text())
    assert new["outs"][0]["md5"] != old and new["desc"] == "nuts from line 3"
    assert "3 added to data/nut/train/good, 1 already there, 0 quarantined" in out
    assert f"data: {old.removesuffix('.dir')} -> {new['outs'][0]['md5'].removesuffix('.dir')} (data.dvc)" in out
    assert "dvc repro" in out and "dvc push" in out and "taken on trust" in out
    assert "up to date" in call("dvc", "status", cwd=project).lower()
    ingest(Request("nut", (drop,)))
    assert "as before" in capfd.readouterr().out
    for path in (project / "data/nut/train/good").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"holds \d+ files, its recorded version"):
        ingest(Request("nut", (drop,)))
    shutil.rmtree(project / "data")
    shutil.move(project / ".dvc/cache", project / "remote")  # a fresh clone: nothing here, all in the remote
    call("dvc", "remote", "add", "-d", "store", str(project / "remote"), cwd=project)
    ingest(Request("nut", (drop,)))
    assert "0 added" in capfd.readouterr().out and len(files()) == 28


@pytest.mark.slow
@pytest.mark.parametrize("remote", [True, False])
def test_images_that_no_remote_has_are_told_where_to_get(remote, project, monkeypatch):
    """A clone of a repository whose images were never pushed."""
    from panda_ad.commands.run import fetch_images

    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"], ["dvc", "add", "-q", "data"]):
        call(*command, cwd=project)
    shutil.rmtree(project / "data")
    shutil.rmtree(project / ".dvc/cache")
    if remote:
        call("dvc", "remote", "add", "-d", "store", str(project / "remote"), cwd=project)
    with pytest.raises(UserError) as e:
        fetch_images("data.dvc")
    message = str(e.value)
    assert "\n" not in message and "dvc push data.dvc" in message and "dvc add data" in message
    assert (f"the remote, store ({project / 'remote'}" if remote else "no remote is set") in message


def test_images_labelled_good_are_shown_to_the_present_model(project, tmp_path, capfd, monkeypatch):
    """Gray parts; a bright spot is a defect. The batch holds two of each, all called good."""
    from panda_ad.stages import adapt, extract, index, validate

    shutil.rmtree(project / "data")
    rng = np.random.default_rng(0)

    def part(spot):
        pixels = rng.integers(100, 110, (32, 32, 3)).astype(np.uint8)
        if spot:
            pixels[8:24, 8:24] = rng.integers(0, 256, (16, 16, 3))
        return pixels

    for i in range(30):
        save(part(False), project / f"data/nut/train/good/{i}.png")
    for i in range(2):
        save(part(False), project / f"data/nut/test/good/{i}.png")
        save(part(True), project / f"data/nut/test/spot/{i}.png")
        save(part(False), tmp_path / f"batch/clean{i}.png")
        save(part(True), tmp_path / f"batch/spot{i}.png")
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["backbone"]["input_size"], params["adapt"]["method"], params["localize"]["method"] = 32, "none", "none"
    params["verdict"] |= {"false_alarm_rate": 0.2, "score": "features"}
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    validate.main()
    extract.main()
    adapt.main("nut")
    index.main("nut")
    capfd.readouterr()
    ingest(Request("nut", (tmp_path / "batch",)))
    out, err = capfd.readouterr()
    assert "4 added" in out and "build/bundle/nut calls" in err and "spot0-" in err and "spot1-" in err
    assert "about 1 are to be expected" in err
    save(part(True), tmp_path / "late.png")
    ingest(Request("nut", (tmp_path / "late.png",)), check=False)
    assert "warning" not in capfd.readouterr().err


def test_a_bad_training_image_is_taken_out(project, make_params):
    params, before = make_params(["nut"]), files()
    path = project / "data/nut/train/good/003.png"
    data, sha256 = path.read_bytes(), hashlib.sha256(path.read_bytes()).hexdigest()
    for wrong, said in (("nut/test/good/000.png", "no training image"), ("../params.yaml", "no training image")):
        with pytest.raises(UserError, match=said):
            remove_images(params, "nut", [sha256, wrong])
    assert files() == before, "all or nothing"
    assert remove_images(params, "nut", [sha256[:12]], "a scratch") == ["nut/train/good/003.png"]
    assert set(before) - set(files()) == {"nut/train/good/003.png"}
    (table,) = project.glob("quarantine/*/reasons.csv")
    (row,) = csv.DictReader(table.open(newline="", encoding="utf-8"))
    assert row["reason"].endswith(": a scratch") and (table.parent / row["copy"]).read_bytes() == data
    ingest_remove("nut", ["nut/train/good/004.png"])
    assert set(before) - set(files()) == {"nut/train/good/003.png", "nut/train/good/004.png"}
