# SPDX-License-Identifier: Apache-2.0
"""What real folders hold: links, other spellings, other tools' files; what is read, versioned and restored is the same, and nothing is silent."""

import errno
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import REPO, make_mvtec, noise, save
from hypothesis import given
from hypothesis import strategies as st

from panda_ad.data import listing
from panda_ad.data.listing import describe, find_images, image_files, settled, visible
from panda_ad.data.manifest import collect
from panda_ad.data.masks import read_mask
from panda_ad.data.validation import validate
from panda_ad.errors import UserError
from panda_ad.stages import validate as stage

NUT = Path("data/nut")
MASKS = NUT / "ground_truth"


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def found_in(make_params, categories=("nut",), **data):
    params = make_params(list(categories), data={"root": "data", **data})
    rows, warnings = collect(params)
    return validate(rows, params, warnings)


def masks_of(found) -> dict[str, str]:
    rows = found.usable
    return {p.removeprefix("nut/"): m for p, m in zip(rows["path"], rows["mask"], strict=True) if m}


# links


def test_a_category_that_is_a_link_is_refused_before_anything_is_recorded(make_params):
    make_mvtec(Path("share"))
    Path("data").mkdir()
    os.symlink(Path("share/nut").absolute(), NUT)
    with pytest.raises(
        UserError, match=r"data/nut: is a link to the folder .*/share/nut, which DVC records as an empty one"
    ):
        found_in(make_params)
    assert not Path("build").exists()


def test_data_that_is_a_link_is_refused_and_the_share_keeps_its_files(make_params):
    make_mvtec(Path("share"))
    os.symlink(Path("share").absolute(), "data")
    with pytest.raises(
        UserError, match=r"data: is a link to .*/share, and `dvc checkout` would delete the files there"
    ):
        found_in(make_params)
    found = found_in(make_params, root=str(Path("share").absolute()))  # what the message advises
    assert len(found.usable) == 19


@pytest.mark.parametrize("command", ["run", "ingest"])
def test_commands_refuse_links_before_they_call_dvc(command, monkeypatch):
    from panda_ad.commands import ingest, run
    from panda_ad.data.add_request import Request

    raw = yaml.safe_load((REPO / "params.yaml").read_text(encoding="utf-8")) | {"categories": ["nut"]}
    Path("params.yaml").write_text(yaml.safe_dump(raw))
    make_mvtec(Path("share"))
    os.symlink(Path("share").absolute(), "data")
    monkeypatch.setattr("panda_ad.commands.run.dvc", lambda *_: pytest.fail("DVC was called"))
    monkeypatch.setattr("panda_ad.commands.ingest.dvc_meanwhile", lambda *_: pytest.fail("DVC was called"))
    before = sorted(Path("share").rglob("*"))
    with pytest.raises(UserError, match="data: is a link"):
        run.run() if command == "run" else ingest.ingest(Request("nut", (Path("share/nut/test/good"),)))
    assert sorted(Path("share").rglob("*")) == before


def test_links_to_files_are_read_and_dead_ones_are_named(make_params):
    make_mvtec(Path("data"))
    save(noise(900), Path("share/x.png"))
    os.symlink(Path("share/x.png").absolute(), NUT / "train/good/x.png")
    assert "nut/train/good/x.png" in set(found_in(make_params).usable["path"])
    Path("share/x.png").unlink()
    with pytest.raises(UserError, match=r"train/good/x.png: is a link to .*/share/x.png, which leads to no file"):
        found_in(make_params)


def test_links_in_a_circle_and_folders_that_cannot_be_listed_are_named(make_params, monkeypatch):
    make_mvtec(Path("data"))
    os.symlink("b.png", NUT / "train/good/a.png")
    os.symlink("a.png", NUT / "train/good/b.png")
    with pytest.raises(UserError, match=r"train/good/[ab].png: is a link to [ab].png, which leads to no file"):
        found_in(make_params)
    (NUT / "train/good/a.png").unlink()
    (NUT / "train/good/b.png").unlink()
    listed = os.scandir

    def scandir(folder):
        if str(folder).endswith("crack"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return listed(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"^data/nut/.*/crack: cannot be listed \(Permission denied\)$"):
        found_in(make_params)


def test_a_folder_that_links_to_itself_is_searched_once():
    save(noise(1), Path("inbox/a/x.png"))
    os.symlink(Path("inbox").absolute(), "inbox/a/again")
    assert image_files([Path("inbox")]) == [Path("inbox/a/x.png")]


# masks


@pytest.mark.parametrize("name", ["groundtruth", "Ground_Truth", "ground-truth", "masks", "GT"])
def test_the_masks_folder_may_be_spelled_otherwise(name, make_params):
    make_mvtec(Path("data"))
    MASKS.rename(NUT / name)
    found = found_in(make_params)
    assert len(masks_of(found)) == 6 and not found.problems and not found.warnings


def test_kinds_may_differ_by_case(make_params):
    make_mvtec(Path("data"))
    (MASKS / "crack").rename(MASKS / "Crack")
    found = found_in(make_params)
    assert masks_of(found)["test/crack/001.png"] == "nut/ground_truth/Crack/001_mask.png" and len(masks_of(found)) == 6


def test_masks_directly_in_their_folder(make_params):
    make_mvtec(Path("data"))
    shutil.rmtree(NUT / "test/scratch")
    shutil.rmtree(MASKS / "scratch")
    for mask in (MASKS / "crack").iterdir():
        mask.rename(MASKS / mask.name)
    (MASKS / "crack").rmdir()
    found = found_in(make_params)
    assert len(masks_of(found)) == 3 and not found.problems


def test_a_mask_that_may_be_of_two_images_is_asked_about(make_params):
    make_mvtec(Path("data"))
    for mask in (MASKS / "crack").iterdir():
        mask.rename(MASKS / mask.name)
    shutil.rmtree(MASKS / "crack")
    shutil.rmtree(MASKS / "scratch")
    found = dict(found_in(make_params).problems)
    assert len(found) == 6 and all("may be of an image of another defect" in reason for reason in found.values())


def test_masks_of_a_kind_that_test_lacks_are_named(make_params):
    make_mvtec(Path("data"))
    (MASKS / "crack").rename(MASKS / "craks")
    (problem,) = found_in(make_params).problems
    assert problem == ("nut/ground_truth/craks", "holds masks, but test/ has no craks; it has crack, scratch")


def test_masks_of_good_images_are_none(make_params):
    make_mvtec(Path("data"))
    save(np.zeros((16, 16), np.uint8), MASKS / "good/000_mask.png")
    assert not found_in(make_params).problems


def test_mvtec_loco(make_params):
    """validation/ are training images, and a folder of masks for each image is joined."""
    make_mvtec(Path("data"), masks=False)
    for i in range(2):
        save(noise(700 + i), NUT / f"validation/good/{i:03d}.png")
    joined = np.zeros((16, 16), bool)
    for image in (NUT / "test/crack").iterdir():
        for part in range(2):
            mask = np.zeros((16, 16), np.uint8)
            mask[part * 8 : part * 8 + 3, 2:5] = 240
            joined |= mask > 0
            save(mask, MASKS / "crack" / image.stem / f"{part:03d}.png")
    found = found_in(make_params)
    assert not found.problems and any("data/nut/validation read as training images" in w for w in found.warnings)
    assert (found.usable["split"] != "test").sum() == 12
    row = found.usable[found.usable["path"] == "nut/test/crack/000.png"].iloc[0]
    assert row["mask"] == "nut/ground_truth/crack/000"
    np.testing.assert_array_equal(read_mask(Path("data") / row["mask"], row["mask_sha256"]), joined)
    save(np.full((16, 16), 255, np.uint8), MASKS / "crack/000/001.png")
    with pytest.raises(UserError, match="has changed since"):
        read_mask(Path("data") / row["mask"], row["mask_sha256"])
    again = found_in(make_params).usable
    assert again.loc[again["path"] == row["path"], "mask_sha256"].item() != row["mask_sha256"], "parts are watched"
    save(np.full((16, 9), 255, np.uint8), MASKS / "crack/000/001.png")
    assert "masks of different sizes" in dict(found_in(make_params).problems)["nut/test/crack/000.png"]
    shutil.rmtree(MASKS / "crack/000")
    (MASKS / "crack/000").mkdir()
    assert "holds no masks" in dict(found_in(make_params).problems)["nut/test/crack/000.png"]


def test_files_beside_masks_are_no_masks(make_params):
    make_mvtec(Path("data"))
    for suffix in ("xml", "json", "txt"):
        (MASKS / f"crack/000_mask.{suffix}").write_text("<annotation/>")
    found = found_in(make_params)
    assert masks_of(found)["test/crack/000.png"].endswith("000_mask.png") and not found.problems
    assert "nut: files that are no images to read were passed over: 1 .json, 1 .txt, 1 .xml" in found.warnings


def test_two_images_of_one_name_share_no_mask(make_params):
    make_mvtec(Path("data"))
    save(noise(800), NUT / "test/crack/000.jpg")
    found = dict(found_in(make_params).problems)
    assert set(found) == {"nut/test/crack/000.jpg", "nut/test/crack/000.png"}
    assert all("shares its mask" in reason for reason in found.values())


def test_two_masks_of_one_image_are_asked_about(make_params):
    make_mvtec(Path("data"))
    shutil.copy(MASKS / "crack/000_mask.png", MASKS / "crack/000.png")
    assert "has several masks" in dict(found_in(make_params).problems)["nut/test/crack/000.png"]


# names of folders


def test_good_in_another_case_is_good(make_params):
    make_mvtec(Path("data"))
    save(noise(600), NUT / "test/Good/000.png")
    (NUT / "train/good").rename(NUT / "train/GOOD")
    found = found_in(make_params)
    row = found.usable[found.usable["path"] == "nut/test/Good/000.png"].iloc[0]
    assert (row["label"], row["defect"]) == (0, "good") and (found.usable["split"] != "test").sum() == 10


@pytest.mark.parametrize("name", ["OK", "ok", "Normal", "io"])
def test_other_words_for_good_are_asked_about(name, make_params):
    make_mvtec(Path("data"))
    (NUT / "train/good").rename(NUT / "train" / name)
    (NUT / "test/good").rename(NUT / "test" / name)
    found = found_in(make_params)
    assert {path for path, _ in found.problems} == {f"nut/train/{name}", f"nut/test/{name}"}
    assert "Then call it train/good" in dict(found.problems)[f"nut/train/{name}"]
    assert set(found.usable["defect"]) == {"crack", "scratch"}


def test_ng_is_a_kind_of_defect(make_params):
    make_mvtec(Path("data"))
    (NUT / "test/crack").rename(NUT / "test/NG")
    (MASKS / "crack").rename(MASKS / "NG")
    found = found_in(make_params)
    assert not found.problems and "NG" in set(found.usable["defect"])


def test_folders_that_the_layout_has_not_are_named(make_params):
    make_mvtec(Path("data"))
    save(noise(1), NUT / "training/good/000.png")
    assert any("data/nut/training is not read" in w for w in found_in(make_params).warnings)


SYSTEM = ["@eaDir", "#recycle", "$RECYCLE.BIN", ".Trash-1000", "lost+found", "__MACOSX", "System Volume Information"]


@pytest.mark.parametrize("name", SYSTEM)
def test_folders_of_servers_and_systems_do_not_exist(name, make_params):
    make_mvtec(Path("data"))
    for i, folder in enumerate(
        ("data", "data/nut", "data/nut/train", "data/nut/train/good", "data/nut/test/good", str(MASKS / "crack"))
    ):
        save(noise(500 + i), Path(folder) / name / "thumb.jpg")
        (Path(folder) / "._000.png").write_bytes(b"\0\5\26\7")
    found = found_in(make_params)
    assert not found.problems and not found.warnings and len(found.usable) == 19
    save(noise(1), Path("inbox/x.png"))
    save(noise(2), Path("inbox") / name / "x.png")
    assert find_images([Path("inbox")]).images == [Path("inbox/x.png")] and not find_images([Path("inbox")]).passed_over


@pytest.mark.parametrize(("asked", "written"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_unicode_forms_of_a_name_are_one_name(asked, written, make_params):
    name, stem, kind = "gehäuse", "prüfung", "riß ö"
    folder = make_mvtec(Path("data"), unicodedata.normalize(written, name), masks=False)
    (folder / "test/crack").rename(folder / "test" / unicodedata.normalize(written, kind))
    image = save(
        noise(800),
        folder / "test" / unicodedata.normalize(written, kind) / f"{unicodedata.normalize(written, stem)}.png",
    )
    mask = np.full((16, 16), 255, np.uint8)
    save(
        mask,
        folder / "ground_truth" / unicodedata.normalize(asked, kind) / f"{unicodedata.normalize(asked, stem)}_mask.png",
    )
    found = found_in(make_params, [unicodedata.normalize(asked, name)])
    row = found.usable[found.usable["path"] == image.relative_to("data").as_posix()].iloc[0]
    assert row["mask"] and row["defect"] == unicodedata.normalize("NFC", kind) and not found.problems


def test_unicode_forms_of_classes(make_params):
    for c, name in enumerate(("gehäuse", "dose")):
        for split, n in (("train", 12), ("test", 3)):
            for i in range(n):
                save(
                    noise(c * 1000 + (split == "test") * 100 + i),
                    Path("data", split, unicodedata.normalize("NFD", name), f"{i}.png"),
                )
    found = found_in(make_params, ["gehäuse"], layout="folders")
    assert not found.problems and found.usable["label"].sum() == 3


# files beside images


def test_files_of_other_tools_are_counted_once_per_ending(make_params):
    make_mvtec(Path("data"))
    for i in range(3):
        (NUT / f"train/good/{i:03d}.json").write_text('{"shapes": []}')
    (NUT / "train/good/phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (NUT / "train/good/copy.png.part").write_bytes((NUT / "train/good/000.png").read_bytes())
    (NUT / "license.txt").write_text("CC")
    found = found_in(make_params)
    assert not found.problems
    assert found.warnings == [
        "nut: files that are no images to read were passed over: 1 .heic (phone.heic), 3 .json, 1 .part, 1 .txt"
    ]


def test_images_are_told_by_their_ending_or_first_bytes():
    for i, name in enumerate(("a.png", "b.jfif", "c.JPG", "no_ending", "bolt 6.5", "d.dat")):
        save(noise(i), Path("in/x.png"))
        Path("in/x.png").rename(Path("in") / name)
    for name, data in (
        ("e.txt", b"BMW 3 series"),
        ("f", b"hello"),
        ("g.gif", b"GIF89a"),
        ("h.png~", b"\x89PNG\r\n\x1a\n"),
        ("i.tmp", b"\xff\xd8\xff"),
    ):
        (Path("in") / name).write_bytes(data)
    found = find_images([Path("in")])
    assert [p.name for p in found.images] == ["a.png", "b.jfif", "bolt 6.5", "c.JPG", "d.dat", "no_ending"]
    assert [p.name for p in found.unread] == ["g.gif"]
    assert describe(found.passed_over) == "1 without ending (f), 1 .png~, 1 .tmp, 1 .txt"


def test_a_folder_without_images_says_what_it_holds():
    Path("in").mkdir()
    Path("in/phone.heic").write_bytes(b"x")
    with pytest.raises(UserError, match=r"no images in in; .*passed over 1 \.heic \(phone\.heic\)"):
        image_files([Path("in")])


def test_a_pipe_is_not_waited_for(make_params):
    make_mvtec(Path("data"))
    os.mkfifo(NUT / "train/good/pipe.png")
    os.mkfifo(NUT / "train/good/pipe")  # its first bytes would tell what it is
    assert dict(found_in(make_params).problems) == {"nut/train/good/pipe.png": "cannot be read (not a file)"}


def test_what_was_named_and_is_no_file_is_not_called_missing():
    os.mkfifo("pipe.png")
    os.symlink("nowhere.png", "dead.png")
    with pytest.raises(UserError, match=r"^pipe.png: is no file or folder, and is not read$"):
        find_images([Path("pipe.png")])
    with pytest.raises(UserError, match=r"^dead.png: leads to no file or folder$"):
        find_images([Path("dead.png")])


@given(
    st.lists(
        st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=8), max_size=6
    )
)
def test_any_files_can_be_described(names):
    line = describe(Path(name) for name in names)
    assert isinstance(line, str) and bool(line) == bool(names)


# replaced and unfinished files


def test_a_file_replaced_by_another_of_its_size_and_time_is_read_again(make_params):
    make_mvtec(Path("data"))
    file = NUT / "train/good/000.png"
    first = found_in(make_params).usable
    stat = file.stat()
    data = bytearray(file.read_bytes())
    other = bytes(save(noise(999), Path("other.png")).read_bytes())
    size = max(len(data), len(other))
    file.write_bytes(bytes(data) + bytes(size - len(data)))  # PNG readers stop at the end chunk
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    before = found_in(make_params).usable
    Path("other.png").write_bytes(other + bytes(size - len(other)))
    os.utime("other.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace("other.png", file)
    after = found_in(make_params).usable
    name = "nut/train/good/000.png"
    digests = [rows.loc[rows["path"] == name, "sha256"].item() for rows in (first, before, after)]
    assert digests[1] != digests[2] and file.stat().st_mtime_ns == stat.st_mtime_ns


def test_a_copied_file_is_compared_and_not_decoded_again(make_params, monkeypatch):
    make_mvtec(Path("data"))
    first = found_in(make_params).usable
    for file in list(Path("data").rglob("*.png")):
        shutil.copy2(file, "copy.png")
        os.replace("copy.png", file)
    monkeypatch.setattr("panda_ad.data.images.picture", lambda *_, **__: pytest.fail("decoded again"))
    assert found_in(make_params).usable.equals(first)


def test_a_file_that_grows_waits(monkeypatch):
    old, growing, new = (save(noise(i), Path(f"inbox/{i}.png")) for i in range(3))
    past = old.stat().st_mtime_ns - 3600 * 10**9
    os.utime(old, ns=(past, past))

    def copy_on(seconds):
        growing.write_bytes(growing.read_bytes() + b"more")

    monkeypatch.setattr(listing.time, "sleep", copy_on)
    assert settled([old, growing, new, Path("inbox/gone.png")], 5.0) == ([old, new], [growing])


def test_files_that_have_lain_are_not_waited_for(monkeypatch):
    file = save(noise(1), Path("inbox/a.png"))
    monkeypatch.setattr(listing.time, "time_ns", lambda: file.stat().st_ctime_ns + 6 * 10**9)
    monkeypatch.setattr(listing.time, "sleep", lambda _: pytest.fail("waited"))
    assert settled([file], 5.0) == ([file], [])


def test_a_folder_that_cannot_be_listed_is_one_line(monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(listing.os, "listdir", refuse)
    with pytest.raises(UserError, match=r"x: cannot be listed \(Permission denied\)"):
        visible(Path("x"))


# the stage


def test_the_washer_set_with_everything_at_once(capsys):
    """A share as it comes: sidecar files, system folders, masks in other spellings; the stage says each in a line and passes."""
    make_mvtec(Path("data"))
    MASKS.rename(NUT / "GroundTruth")
    save(noise(1), NUT / "train/good/@eaDir/x.jpg")
    (NUT / "train/good/000.json").write_text("{}")
    raw = yaml.safe_load((REPO / "params.yaml").read_text(encoding="utf-8")) | {"categories": ["nut"]}
    Path("params.yaml").write_text(yaml.safe_dump(raw))
    stage.main()
    out = capsys.readouterr().out
    assert "19 images usable" in out and "1 .json" in out and "eaDir" not in out


# names that are nearly alike


def test_kinds_that_differ_by_case_or_a_blank_are_a_warning_and_good_is_asked_about(make_params):
    make_mvtec(Path("data"))
    save(noise(910), NUT / "test/Crack/900.png")
    save(noise(911), NUT / "test/good /900.png")
    found = found_in(make_params)
    assert "nut: kinds of defect that differ by case or by marks at their ends only: 'Crack', 'crack'" in found.warnings
    (problem,) = found.problems
    assert problem[0] == "nut/test/good " and "is this the folder of good images?" in problem[1]


def test_a_class_named_like_the_normal_one_is_a_warning(make_params):
    for i in range(10):
        save(noise(i), Path(f"data/train/cat/{i}.png"))
    for i, name in enumerate(("cat", "Cat", "dog")):
        save(noise(100 + i), Path(f"data/test/{name}/0.png"))
    warnings = found_in(make_params, ["cat"], layout="folders").warnings
    assert "cat: counted as anomalous, though named like a normal class: Cat" in warnings


def test_a_kind_whose_name_is_no_utf_8_is_a_problem(make_params):
    make_mvtec(Path("data"))
    os.rename(bytes(NUT / "test/crack"), bytes(NUT / "test") + b"/cr\xe4ck")
    problems = dict(found_in(make_params).problems)
    assert problems["nut/test/cr\\xe4ck/000.png"] == "its name is not valid UTF-8: rename it"
    assert "it has cr\\xe4ck, scratch" in problems["nut/ground_truth/crack"]
