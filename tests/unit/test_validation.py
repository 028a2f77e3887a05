# SPDX-License-Identifier: Apache-2.0
"""The checks on a data set, their agreement with Great Expectations, and the validate stage."""

import csv
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import REPO, build_manifest, make_mvtec, noise, save
from PIL import Image

from panda_ad.data.data_docs import render
from panda_ad.data.manifest import collect, load_manifest
from panda_ad.data.validation import Validation, validate
from panda_ad.errors import UserError
from panda_ad.stages import validate as stage


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def checked(make_params, categories=("nut",), **data):
    params = make_params(list(categories), data={"root": "data", **data})
    return found_in(params)


def found_in(params) -> Validation:
    rows, warnings = collect(params)
    return validate(rows, params, warnings)


def test_a_module_loaded_when_used_is_loaded_when_used():
    code = (
        "import sys; from panda_ad.data.validation import _load_when_used; _load_when_used('scipy.stats'); from scipy import stats\n"
        "print('scipy.stats._stats_py' in sys.modules, stats.norm.cdf(0), 'scipy.stats._stats_py' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        == "False 0.5 True\n"
    )


def edit(path: str, pixels: np.ndarray) -> None:
    save(pixels, Path("data/nut") / path)


def copy(source: str, target: str) -> None:
    shutil.copyfile(Path("data/nut") / source, Path("data/nut") / target)


def truncate(path: str) -> None:
    file = Path("data/nut") / path
    file.write_bytes(file.read_bytes()[:400])


def mask(marked: int, size: tuple[int, int] = (16, 16)) -> np.ndarray:
    out = np.zeros(size, np.uint8)
    out[4:8, 4:8] = marked
    return out


def test_nothing_is_left_in_the_folder_for_temporary_files(make_params, tmp_path, monkeypatch):
    make_mvtec(Path("data"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    checked(make_params)
    assert list((tmp_path / "temporary").iterdir()) == []


BAD = {
    "truncated": (lambda: truncate("train/good/003.png"), "nut/train/good/003.png", "truncated"),
    "empty": (lambda: Path("data/nut/test/good/001.png").write_bytes(b""), "nut/test/good/001.png", "empty"),
    "non-image": (
        lambda: Path("data/nut/train/good/notes.png").write_text("hello"),
        "nut/train/good/notes.png",
        "not an image",
    ),
    "bomb": (
        lambda: Path("data/nut/train/good/bomb.pbm").write_bytes(b"P4 20000 20000 \0"),
        "nut/train/good/bomb.pbm",
        "100,000,000 pixels",
    ),
    "too small": (
        lambda: edit("train/good/000.png", noise(1, (4, 16))),
        "nut/train/good/000.png",
        "16 x 4 pixels, too small",
    ),
    "float": (
        lambda: Image.fromarray(np.zeros((16, 16), np.float32)).save("data/nut/train/good/f.tiff"),
        "nut/train/good/f.tiff",
        "mode F",
    ),
    "duplicate in train": (
        lambda: copy("train/good/001.png", "train/good/zz ü.png"),
        "nut/train/good/zz ü.png",
        "same picture as nut/train/good/001.png",
    ),
    "duplicate across": (
        lambda: copy("train/good/002.png", "test/good/zz.png"),
        "nut/test/good/zz.png",
        "same picture as nut/train/good/002.png",
    ),
    "other format": (
        lambda: Image.open("data/nut/train/good/002.png").save("data/nut/train/good/zz.bmp"),
        "nut/train/good/zz.bmp",
        "same picture as nut/train/good/002.png",
    ),
    "defect in train": (
        lambda: edit("train/scratch/000.png", noise(77)),
        "nut/train/scratch/000.png",
        "defective image in train",
    ),
    "mask size": (
        lambda: edit("ground_truth/crack/001_mask.png", mask(255, (16, 20))),
        "nut/test/crack/001.png",
        "is 20 x 16 pixels, the image 16 x 16",
    ),
    "empty mask": (
        lambda: edit("ground_truth/crack/001_mask.png", mask(0)),
        "nut/test/crack/001.png",
        "001_mask.png is empty",
    ),
    "zeros and ones": (
        lambda: edit("ground_truth/crack/001_mask.png", mask(1)),
        "nut/test/crack/001.png",
        "largest value is 1",
    ),
    "broken mask": (
        lambda: Path("data/nut/ground_truth/crack/001_mask.png").write_bytes(b"no"),
        "nut/test/crack/001.png",
        "its mask nut/ground_truth/crack/001_mask.png: not an image",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_image_is_named_with_its_reason(name, make_params):
    make_mvtec(Path("data"))
    spoil, path, reason = BAD[name]
    spoil()
    found = checked(make_params)
    assert (
        [p for p, _ in found.problems] == [path] and reason in found.problems[0][1] and "\n" not in found.problems[0][1]
    )
    assert found.shortages == [] and path not in set(found.usable["path"])


def test_great_expectations_decide(make_params):
    make_mvtec(Path("data"), train=12)
    for name in ("truncated", "non-image", "too small", "duplicate across", "defect in train"):
        BAD[name][0]()
    edit("ground_truth/crack/000_mask.png", mask(255, (16, 20)))
    edit("ground_truth/crack/002_mask.png", mask(0))
    found = found_in(make_params(["nut"], data={"root": "data", "min_train": 11}))
    failed = {e.description: e.unexpected for e in found.expectations if not e.success}
    assert len(found.problems) == 7
    assert failed == {
        "Every file decodes": 2,
        "Images are at least 8 pixels high": 1,
        "No picture occurs twice in a category, within or across train and test": 2,
        "No defective image in train": 1,
        "Masks are as wide as their images": 1,
        "Masks mark at least one pixel": 1,
        "nut: at least 11 usable training images": None,
    }


def test_defects_without_a_mask_are_named_and_stay(make_params):
    make_mvtec(Path("data"))
    Path("data/nut/ground_truth/crack/001_mask.png").unlink()
    found = checked(make_params)
    assert found.problems == [] and "nut/test/crack/001.png" in set(found.usable["path"])
    assert [w for w in found.warnings if "have no mask, pixel figures leave them out: nut/test/crack/001.png" in w]
    assert all(e.success for e in found.expectations)


def test_clean_data_passes_everything(make_params):
    make_mvtec(Path("data"))
    make_mvtec(Path("data"), "bolt", masks=False, seed=1)
    params = make_params(["nut", "bolt"], data={"root": "data"})
    found = found_in(params)
    assert found.problems == found.shortages == found.warnings == []
    assert all(e.success for e in found.expectations) and len(found.expectations) == 10 + 2 * 3


def test_every_accepted_kind_of_image_is_usable(make_params):
    folder = make_mvtec(Path("data")) / "train" / "good"
    Image.fromarray(np.random.default_rng(0).integers(0, 65536, (16, 16), dtype=np.uint16)).save(folder / "sixteen.png")
    Image.fromarray(noise(1)).quantize(8).save(folder / "palette.png")
    Image.fromarray(noise(2)).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(noise(3)[:, :, 0]).save(folder / "gray.png")
    Image.fromarray(np.dstack([noise(4), noise(5)[:, :, :1]])).save(folder / "alpha.png")
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(noise(6, (16, 24))).save(folder / "turned.jpg", exif=exif)
    found = checked(make_params)
    assert found.problems == [] and len(found.usable) == 10 + 6 + 9
    modes = dict(zip(found.usable["path"].str.rsplit("/").str[-1], found.usable["mode"], strict=True))
    assert (
        modes["sixteen.png"] == "I;16"
        and modes["palette.png"] == "P"
        and modes["cmyk.jpg"] == "CMYK"
        and modes["alpha.png"] == "RGBA"
    )
    turned = found.usable[found.usable["path"].str.endswith("turned.jpg")].iloc[0]
    assert (turned["width"], turned["height"]) == (16, 24)
    assert any("pixel modes" in w for w in found.warnings) and any(
        "sizes, 16 to 16 wide and 16 to 24 high" in w for w in found.warnings
    )


def test_a_mask_is_compared_with_the_upright_image(make_params):
    make_mvtec(Path("data"))
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(noise(6, (16, 24))).save("data/nut/test/crack/001.png", exif=exif)
    edit("ground_truth/crack/001_mask.png", mask(255, (24, 16)))
    assert checked(make_params).problems == []


def test_contradictory_duplicates_are_all_listed(make_params):
    make_mvtec(Path("data"))
    copy("train/good/004.png", "test/crack/001.png")
    found = dict(checked(make_params).problems)
    assert set(found) == {"nut/train/good/004.png", "nut/test/crack/001.png"}
    assert all("other label" in reason for reason in found.values())


def test_the_same_picture_in_two_categories_is_no_duplicate(make_params):
    make_mvtec(Path("data"))
    shutil.copytree("data/nut", "data/bolt")
    assert checked(make_params, ["nut", "bolt"]).problems == []


@pytest.mark.parametrize("images", [0, 3])
def test_too_few_images(images, make_params):
    make_mvtec(Path("data"), train=images)
    found = checked(make_params)
    assert found.shortages == [("nut/train/good", f"{images} usable training images of nut, data.min_train asks for 8")]


def test_empty_category(make_params):
    Path("data/nut/train/good").mkdir(parents=True)
    found = checked(make_params)
    assert len(found.shortages) == 1 and found.usable.empty
    assert any("no usable anomalous test images" in line for line in found.warnings)
    assert build_manifest(make_params(["nut"], data={"root": "data"}))[1] == found.shortages


def test_gallery_must_keep_images_beside_calibration(make_params):
    make_mvtec(Path("data"), train=10)
    assert "3 of 10 training images of nut left" in checked(make_params, calibration_fraction=0.7).shortages[0][1]


@pytest.mark.parametrize(("good", "defective"), [(0, 3), (3, 0), (0, 0)])
def test_a_start_with_good_images_only(good, defective, make_params):
    """The start of every line: what cannot be evaluated is said, and training goes on."""
    make_mvtec(Path("data"), good=good, defective=defective)
    found = checked(make_params)
    missing = {what for what in ("normal", "anomalous") if any(f"no usable {what} test" in w for w in found.warnings)}
    assert missing == ({"normal"} if not good else set()) | ({"anomalous"} if not defective else set())
    assert not found.fatal(make_params(["nut"])) and (found.usable["split"] == "train").sum() == 10
    assert [e.needed for e in found.expectations if not e.success] == [False] * len(missing)
    assert render(found, make_params(["nut"])).count("! missing") == len(missing)


def test_few_defects_say_little(make_params):
    make_mvtec(Path("data"), defective=1)
    assert any(
        "only 2 defective test images: figures on defects say little" in w for w in checked(make_params).warnings
    )


def write_params(**data) -> None:
    raw = yaml.safe_load((REPO / "params.yaml").read_text(encoding="utf-8"))
    raw.update(categories=["nut"], dataset="parts")
    raw["data"].update(root="data", **data)
    Path("params.yaml").write_text(yaml.safe_dump(raw))


def problems() -> list[list[str]]:
    with open("build/validation/problems.csv", newline="", encoding="utf-8") as file:
        return list(csv.reader(file))[1:]


def test_stage_fails_after_writing_its_reports(capsys):
    write_params()
    make_mvtec(Path("data"))
    truncate("train/good/003.png")
    copy("train/good/001.png", "train/good/zz.png")
    with pytest.raises(UserError) as e:
        stage.main()
    message = str(e.value)
    assert (
        "2 problems" in message
        and "nut/train/good/003.png" in message
        and "build/validation/problems.csv" in message
        and "\n" not in message
    )
    assert [p for p, _ in problems()] == ["nut/train/good/003.png", "nut/train/good/zz.png"]
    report = json.loads(Path("build/validation/report.json").read_text())
    assert report["success"] is False and report["bad_files"] == 2
    assert not list(Path("build").glob(".*"))  # no temporary folder left


def test_stage_quarantines():
    write_params(on_invalid="quarantine")
    make_mvtec(Path("data"))
    truncate("train/good/003.png")
    stage.main()
    rows = load_manifest("build/validation/manifest.csv", "nut")
    assert len(rows) == 18 and "nut/train/good/003.png" not in set(rows["path"]) and len(problems()) == 1
    report = json.loads(Path("build/validation/report.json").read_text())
    assert report["success"] is True and report["bad_files"] == 1 and report["images"] == 18
    assert report["categories"]["nut"] == {
        "train": {"good": 9},
        "calibration": {},
        "test": {"crack": 3, "good": 3, "scratch": 3},
    }


def test_quarantine_does_not_hide_a_shortage():
    write_params(on_invalid="quarantine")
    make_mvtec(Path("data"), train=8)
    truncate("train/good/003.png")
    with pytest.raises(UserError, match="7 usable training images of nut"):
        stage.main()


def test_stage_gives_the_same_bytes_again():
    write_params()
    make_mvtec(Path("data"))
    names = ("manifest.csv", "problems.csv", "report.json")
    stage.main()
    first = [Path("build/validation", n).read_bytes() for n in names]
    shutil.rmtree(".cache")
    stage.main()
    assert first == [Path("build/validation", n).read_bytes() for n in names]


def test_stage_as_a_command():
    write_params()
    Path("data").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "panda_ad.stages.validate"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["panda-ad: validate: categories: no folder 'nut' in data; it holds none at all"]


def test_data_docs_are_one_page_that_loads_and_runs_nothing():
    write_params()
    make_mvtec(Path("data"))
    Path("data/nut/test/good/<script>alert(1)<img src=x onerror=alert(1)>.png").write_bytes(b"x")
    with pytest.raises(UserError):
        stage.main()
    docs = Path("build/validation/data_docs")
    assert [p.name for p in docs.rglob("*")] == ["index.html"]
    html = (docs / "index.html").read_text(encoding="utf-8")
    assert "Content-Security-Policy" in html and "<style>" in html
    for forbidden in ("<script", "<link", "<img", "url(", "href=", 'src="'):
        assert forbidden not in html, forbidden
    assert "not an image" in html and "No picture occurs twice" in html and "expect_column_values_to_be_null" in html
    assert "&lt;script&gt;alert(1)" in html


def test_copies_in_a_published_set_are_left_out(make_params):
    """FashionMNIST has copies within and across its splits; whoever uses it cannot mend that."""
    from test_layouts import make_fashion

    images = make_fashion(Path("raw"))
    raw = Path("raw/FashionMNIST/raw")
    train = raw / "train-images-idx3-ubyte"
    data = bytearray(train.read_bytes())
    size = 28 * 28
    data[16 + 2 * size : 16 + 3 * size] = images[4].tobytes()  # within train, of one class
    train.write_bytes(data)
    test = raw / "t10k-images-idx3-ubyte"
    data = bytearray(test.read_bytes())
    data[16 : 16 + size] = images[6].tobytes()  # across, of one class
    data[16 + size : 16 + 2 * size] = images[8].tobytes()  # across, of two classes
    test.write_bytes(data)
    params = make_params(["T-shirt-top"], data={"root": "raw", "layout": "fashion_mnist"})
    found = found_in(params)
    assert len(found.problems) == 4 and not found.fatal(params)
    assert any("4 files of fashion_mnist are copies of others in it and are left out" in w for w in found.warnings)
    assert (found.usable["split"] != "test").sum() == 18
    own = make_params(["T-shirt-top"], data={"root": ".cache/datasets/fashion_mnist", "layout": "folders"})
    assert len(found_in(own).fatal(own)) == 4, "in a set of one's own they are a mistake"
