# SPDX-License-Identifier: Apache-2.0
"""`panda-ad start`: sorted, good and unsorted pictures, few of them, and what is no picture."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import save

from panda_ad.commands import start as command
from panda_ad.commands.score import score_paths
from panda_ad.data.sorting import sort_pictures
from panda_ad.errors import UserError
from panda_ad.params_file import load_params

ROOT = Path(__file__).resolve().parents[2]


def part(seed: int, spot: bool = False) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(100, 130, (48, 64, 3), dtype=np.uint8)
    if spot:
        pixels[10:22, 30:44] = (250, 20, 20)
    return pixels


def fill(folder: Path, count: int, spot: bool = False) -> None:
    for i in range(count):
        save(part(i + 100 * spot + 1000 * len(folder.parts), spot), folder / f"{i}.png")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def start(folder: str, out: str | None = None, good: bool = False) -> str:
    lines: list[str] = []
    command.start(Path(folder), Path(out) if out else None, good, 64, lines.append)
    return "\n".join(lines)


def rows(path: str) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def test_it_scores_as_the_projects_default_does_but_for_adaptation():
    params = load_params(ROOT / "params.yaml")
    assert (params.gallery, params.localize, params.verdict) == (
        command.FIT.gallery,
        command.FIT.localize,
        command.FIT.verdict,
    )
    assert (params.backbone.name, params.backbone.weights) == command.NETWORK


def test_good_and_bad_pictures(capsys):
    fill(Path("nut/OK"), 9)
    fill(Path("nut/NG/scratch"), 2, spot=True)
    fill(Path("nut/NG"), 1, spot=True)
    fill(Path("nut/later"), 2)
    save(part(5), Path("nut/ground_truth/scratch/0_mask.png"))
    Path("nut/NG/broken.png").write_bytes(b"\x89PNG\r\n\x1a\nx")
    Path("nut/photo.heic").write_bytes(b"\0\0\0\x18ftypheic")
    Path("nut/OK/cut.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    said = start("nut")
    assert "learned  9 good pictures" in said and "3 of 3 known defects called defect" in said
    assert "of 2 pictures nobody has sorted called defect" in said and "10 calibration" not in said
    assert "9 calibration images are too few for a false-alarm rate of 0.05" in said and "is 0.1" in said
    err = capsys.readouterr().err
    assert "photo.heic: HEIC" in err and err.count("broken.png") == 1 and err.count("OK/cut.jpg") == 1
    found = {row["path"]: row for row in rows("nut-start/verdicts.csv")}
    assert len(found) == 8
    unread = {path for path, row in found.items() if row["decision"] == "unreadable"}
    assert unread == {"nut/NG/broken.png", "nut/photo.heic", "nut/OK/cut.jpg"}
    page = Path("nut-start/index.html").read_text()
    assert page.count("<img") == 5 + 9 and "alarm · scratch" in page and "<script" not in page
    Path("nut/NG/broken.png").unlink()
    score_paths([Path("nut/NG")], None, Path("nut-start/model"), Path("again.csv"), Path("overlays"), None)
    again = {row["path"]: row for row in rows("again.csv")}
    assert len(again) == 3 and all(found[path] == row for path, row in again.items()), "to the digit"
    assert not list(Path("nut").rglob("*start*")) and len(list(Path("nut-start/heatmaps").iterdir())) == 5
    start("nut")  # takes the place of the first


def test_mvtec_layout_keeps_its_test_images():
    for name, count in (("train/good", 4), ("test/good", 2), ("test/hole", 1)):
        fill(Path("bolt") / name, count, spot="hole" in name)
    sorted_ = sort_pictures(Path("bolt"))
    assert len(sorted_.good) == 4 and sorted(kind for _, kind in sorted_.others) == ["good", "good", "hole"]
    said = start("bolt", "results/bolt")
    assert "kept back" in said and "tell the order of pictures rather than verdicts" in said
    assert Path("results/bolt/model/bundle.json").is_file()


def test_only_good_pictures():
    fill(Path("good"), 8)
    said = start("good")
    assert "verdicts" not in said and "learned  8" in said
    assert rows("good-start/verdicts.csv") == []
    fill(Path("line\nbreak"), 3)
    said = start("line\nbreak", good=True)
    assert "learned  3" in said and said.endswith("line\\x0abreak-start/index.html")


def test_unsorted_pictures_are_ranked(capsys):
    fill(Path("heap"), 9)
    fill(Path("heap/phone"), 1, spot=True)
    Path("heap/phone/cut.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    said = start("heap")
    assert "ranked   10 pictures" in said and "--good" in said and "left out" in capsys.readouterr().err
    ranking = rows("heap-start/ranking.csv")
    assert [row["rank"] for row in ranking] == [*map(str, range(1, 11)), "unreadable"]
    assert ranking[-1]["path"] == "heap/phone/cut.jpg"
    assert ranking[0]["path"] == "heap/phone/0.png"
    assert re.search(r'alt="oddness [0-9.]+"', Path("heap-start/index.html").read_text())
    assert not Path("heap-start/model").exists()


def test_what_cannot_be_started_says_so_and_leaves_nothing():
    with pytest.raises(UserError, match="nowhere: no such folder"):
        start("nowhere")
    Path("empty").mkdir()
    Path("empty/notes.txt").write_text("x")
    with pytest.raises(UserError, match="no images in empty"):
        start("empty")
    fill(Path("two"), 2)
    with pytest.raises(UserError, match="2 pictures to be ranked are too few: 3 are needed"):
        start("two")
    fill(Path("bads/bad"), 4)
    with pytest.raises(UserError, match="no good pictures to learn from, only bad"):
        start("bads")
    fill(Path("set/a/train/good"), 1)
    fill(Path("set/b/train/good"), 1)
    with pytest.raises(UserError, match="set: holds several things, a, b; start with one: set/a"):
        start("set")
    Path("mine").mkdir()
    with pytest.raises(UserError, match="mine: exists, and is no result"):
        start("two", "mine")
    with pytest.raises(UserError, match="lies in two"):
        start("two", "two/results")
    assert sorted(p.name for p in Path().iterdir()) == ["bads", "empty", "mine", "set", "two"]
