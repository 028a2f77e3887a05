# SPDX-License-Identifier: Apache-2.0
"""Sessions: how images that were taken together are told, and what is said where they are not."""

import io
from collections import Counter
from pathlib import Path

import pytest
import yaml
from conftest import build_manifest, make_mvtec, noise, save
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from panda_ad.data.add_images import add_images
from panda_ad.data.add_request import Request
from panda_ad.data.manifest import collect, load_manifest, write_manifest
from panda_ad.data.sessions import _apart, taken_at
from panda_ad.data.validation import validate
from panda_ad.errors import UserError
from panda_ad.params_file import parse_params


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def manifest(make_params, sessions, **data):
    params = make_params(["nut"], data={"root": "data", "sessions": sessions, **data})
    return build_manifest(params)


def sessions(rows, split="train"):
    """Counts per session of the training images, calibration images with them, or of the test images."""
    chosen = rows["split"] == "test" if split == "test" else rows["split"] != "test"
    return Counter(rows.loc[chosen, "session"])


def photograph(path: Path, seed: int, when: str | None) -> None:
    exif = Image.Exif()
    if when is not None:
        exif.get_ifd(0x8769)[36867] = when
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(seed)).save(path, exif=exif)


def test_folders_inside_the_folder_of_good_images(make_params):
    folder = make_mvtec(Path("data"))
    for name, seed in (("monday", 500), ("tuesday", 600)):
        for i in range(3):
            save(noise(seed + i), folder / f"train/good/{name}/{i:03d}.png")
            save(noise(seed + 50 + i), folder / f"test/good/{name}/{i:03d}.png")
        (folder / f"test/crack/{name}").mkdir()
    (folder / "test/crack/000.png").rename(folder / "test/crack/monday/000.png")
    rows, problems = manifest(make_params, "folder")
    assert not problems
    assert sessions(rows) == {"": 10, "monday": 3, "tuesday": 3}
    assert sessions(rows[rows["defect"] == "good"], "test") == {"": 3, "monday": 3, "tuesday": 3}
    moved = rows[rows["path"] == "nut/test/crack/monday/000.png"].iloc[0]
    assert moved["session"] == "monday" and moved["mask"] == "nut/ground_truth/crack/000_mask.png"


def test_without_the_parameter_a_folder_inside_is_a_problem_that_names_it(make_params):
    folder = make_mvtec(Path("data"))
    save(noise(900), folder / "train/good/monday/000.png")
    _, problems = manifest(make_params, None)
    assert [path for path, _ in problems] == ["nut/train/good/monday"]
    assert "set data.sessions: folder" in problems[0][1]
    save(noise(901), folder / "train/good/monday/deep/000.png")
    _, problems = manifest(make_params, "folder")
    assert [path for path, _ in problems] == ["nut/train/good/monday/deep"]
    assert "data.sessions" not in problems[0][1]


def test_class_folders_have_sessions_too(make_params):
    for i in range(8):
        save(noise(i), Path(f"data/train/nut/lot {i % 2}/{i}.png"))
    save(noise(20), Path("data/test/nut/20.png"))
    save(noise(21), Path("data/test/bolt/lot 0/21.png"))
    rows, problems = manifest(make_params, "folder", layout="folders")
    assert not problems
    assert sessions(rows) == {"lot 0": 4, "lot 1": 4}
    assert sessions(rows, "test") == {"": 1, "lot 0": 1}


@pytest.mark.parametrize(
    ("pattern", "expected"), [(r"^(lot\d)-", {"lot1": 5, "lot2": 5}), (r"lot1", {"lot1": 5, "": 5})]
)
def test_a_part_of_the_name(make_params, pattern, expected):
    folder = make_mvtec(Path("data"))
    for i, file in enumerate(sorted((folder / "train/good").iterdir())):
        file.rename(file.with_name(f"lot{1 + i % 2}-{file.name}"))
    rows, problems = manifest(make_params, {"name": pattern})
    assert not problems and sessions(rows) == expected


def test_a_table(make_params):
    folder = make_mvtec(Path("data"))
    names = sorted(p.name for p in (folder / "train/good").iterdir())
    lines = [f"nut/train/good/{name},shift {i % 3}" for i, name in enumerate(names[:9])]
    Path("data/sessions.csv").write_text("\ufeffpath,session\n" + "\n".join(lines) + "\n", encoding="utf-8")
    rows, problems = manifest(make_params, {"csv": "sessions.csv"})
    assert not problems and sessions(rows) == {"shift 0": 3, "shift 1": 3, "shift 2": 3, "": 1}
    assert load_back(rows)["session"].tolist() == rows["session"].tolist()


def load_back(rows):
    write_manifest(rows, Path("manifest.csv"))
    return load_manifest("manifest.csv")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot be read"),
        (b"file;lot\na;b\n", "has no column path and no column session"),
        (b"path,session\n\xff\xfe,1\n", "no CSV file in UTF-8"),
    ],
)
def test_a_table_that_is_none_is_one_line(make_params, content, said):
    make_mvtec(Path("data"))
    if content is not None:
        Path("data/sessions.csv").write_bytes(content)
    with pytest.raises(UserError, match=f"data.sessions.csv: .*{said}") as e:
        manifest(make_params, {"csv": "sessions.csv"})
    assert "\n" not in str(e.value)


def test_a_manifest_from_before_sessions_reads_as_of_no_session(make_params):
    make_mvtec(Path("data"))
    rows, _ = manifest(make_params, None)
    write_manifest(rows.drop(columns="session"), Path("old.csv"))
    assert set(load_manifest("old.csv")["session"]) == {""}


def test_a_pause_of_the_camera_begins_a_session(make_params):
    times = ["2026:03:02 06:00:00", "2026:03:02 06:29:59", "2026:03:02 06:59:58", "2026:03:02 07:30:00", None]
    for i in range(8):
        photograph(Path(f"data/nut/train/good/{i}.jpg"), i, times[min(i, 4)])
    photograph(Path("data/nut/test/good/0.jpg"), 50, "2026:03:02 07:45:00")
    rows, _ = manifest(make_params, {"gap_minutes": 30})
    assert sessions(rows) == {"2026-03-02 06:00": 3, "2026-03-02 07:30": 1, "": 4}
    assert sessions(rows, "test") == {"2026-03-02 07:30": 1}
    again, _ = manifest(make_params, {"gap_minutes": 30})  # from the records of the first reading
    assert again["session"].tolist() == rows["session"].tolist()


@given(st.lists(st.integers(0, 10_000), max_size=30), st.integers(1, 500))
def test_sessions_are_the_runs_without_a_longer_pause(minutes, gap):
    taken = [f"2026-01-{1 + m // 1440:02d} {m // 60 % 24:02d}:{m % 60:02d}:00" for m in minutes]
    found = _apart(taken, gap)
    ordered = sorted(zip(minutes, found, strict=True))
    for (a, x), (b, y) in zip(ordered, ordered[1:], strict=False):
        assert (x == y) == (b - a <= gap)


def test_exif_that_is_none_is_passed_over():
    out = io.BytesIO()
    exif = Image.Exif()
    exif[306] = "yesterday"
    Image.fromarray(noise(1)).save(out, "JPEG", exif=exif)
    assert taken_at(out.getvalue()) == "" and taken_at(b"no image") == ""
    data = out.getvalue()
    assert all(taken_at(data[:i] + bytes([255 - data[i]]) + data[i + 1 :]) in ("",) for i in range(2, 60))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("shift", "null, folder, {name: REGEX}, {csv: FILE} or {gap_minutes: M} is expected, found 'shift'"),
        ({}, "is expected, found {}"),
        ({"name": "a", "csv": "b"}, "is expected, found"),
        ({"lot": "a"}, "is expected, found"),
        ({"name": "("}, "'(' is no regular expression"),
        ({"name": 3}, "name is a text, found 3"),
        ({"csv": ""}, "csv is a text, found ''"),
        ({"gap_minutes": 0}, "gap_minutes is a number of minutes above 0, found 0"),
        ({"gap_minutes": "an hour"}, "gap_minutes is a number of minutes above 0"),
        ({"gap_minutes": True}, "gap_minutes is a number of minutes above 0"),
    ],
)
def test_a_bad_rule_is_one_line(repo_root, value, said):
    raw = yaml.safe_load((repo_root / "params.yaml").read_text())
    raw["data"]["sessions"] = value
    with pytest.raises(UserError) as e:
        parse_params(raw)
    assert "data.sessions: " in str(e.value) and said in str(e.value) and "\n" not in str(e.value)


def test_one_session_alone_and_images_of_none_are_said(make_params):
    folder = make_mvtec(Path("data"))
    save(noise(900), folder / "train/good/monday/000.png")
    params = make_params(["nut"], data={"root": "data", "sessions": "folder"})
    found = validate(collect(params)[0], params)
    assert not found.fatal(params)
    said = " ".join(found.warnings)
    assert "of 1 known session(s): what a session never seen will bring cannot be told from that" in said
    assert "13 images are of no known session and count as one more" in said
    outcome = [e for e in found.expectations if "sessions of training images" in e.description]
    assert len(outcome) == 1 and not outcome[0].success and not outcome[0].needed
    save(noise(901), folder / "train/good/tuesday/000.png")
    found = validate(collect(params)[0], params)
    outcome = [e for e in found.expectations if "sessions of training images" in e.description]
    assert outcome[0].success and not any("known session(s)" in line for line in found.warnings)


def test_new_images_go_to_their_session(make_params):
    make_mvtec(Path("data"))
    save(noise(77_000), Path("drop/a.png"))
    params = make_params(["nut"], data={"root": "data", "sessions": "folder"})
    found = add_images(params, Request("nut", (Path("drop"),), session="2026-03-02 early"))
    ((_, path),) = found.added
    assert path.startswith("nut/train/good/2026-03-02 early/a-")
    again = add_images(params, Request("nut", (Path("drop"),), session="late"))
    assert not again.added and again.duplicates[0][1] == path
    rows, problems = build_manifest(params)
    assert not problems and sessions(rows)["2026-03-02 early"] == 1
    with pytest.raises(UserError, match="--session: '../up' cannot be a folder's name"):
        add_images(params, Request("nut", (Path("drop"),), session="../up"))
    with pytest.raises(UserError, match="set data.sessions: folder"):
        add_images(make_params(["nut"], data={"root": "data"}), Request("nut", (Path("drop"),), session="late"))
