# SPDX-License-Identifier: Apache-2.0
"""Files in, a table out: every file has a row, and what cannot be written costs only itself."""

import csv
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import noise, save
from PIL import Image

from panda_ad.commands import score
from panda_ad.commands.score import score_files, score_paths
from panda_ad.errors import UserError
from panda_ad.features.backbones import load_backbone
from panda_ad.features.export import export_network
from panda_ad.features.images import DecodedImages
from panda_ad.registry.load import Model
from panda_ad.scoring.bundle import load_bundle, save_bundle
from panda_ad.scoring.config import DetectorConfig, FitParams
from panda_ad.scoring.fit import fit_detector


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A small model with heat maps, of images of noise."""
    from panda_ad.params_file import load_params

    params = load_params(Path(__file__).resolve().parents[2] / "params.yaml")
    backbone = load_backbone("embedded")
    network = export_network(backbone, (32, 32))
    good = [noise(i) for i in range(30)]
    fit = FitParams(gallery=params.gallery, localize=params.localize, verdict=params.verdict)
    folder = tmp_path_factory.mktemp("bundle")
    save_bundle(fit_detector(network, DecodedImages(network, good), fit, DetectorConfig(category="nut")), folder)
    return folder


@pytest.fixture
def drop(tmp_path, monkeypatch):
    """Three images, and what lies beside them."""
    monkeypatch.chdir(tmp_path)
    for i in range(3):
        save(noise(100 + i), Path(f"in/{i}.png"))
    return Path("in")


def rows_of(path) -> dict[str, dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return {Path(row["path"]).name: row for row in csv.DictReader(file)}


def test_every_file_has_a_row(drop, bundle, capsys):
    (drop / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    (drop / "cut.png").write_bytes((drop / "0.png").read_bytes()[:300])
    (drop / "empty.jpg").write_bytes(b"")
    (drop / "0.json").write_text("{}")
    Image.fromarray(noise(7)).save(drop / "no_ending", "PNG")
    Image.fromarray(noise(8)).save(drop / "camera.jfif", "JPEG")
    with pytest.raises(UserError, match=r"3 of 8 files could not be read: .*cut.png: truncated.*heic"):
        score_paths([drop], None, bundle, Path("out.csv"), None, None)
    rows = rows_of("out.csv")
    assert {name for name, row in rows.items() if row["decision"] == "unreadable"} == {
        "phone.heic",
        "cut.png",
        "empty.jpg",
    }
    assert all(not row["score"] for row in rows.values() if row["decision"] == "unreadable")
    assert {name for name, row in rows.items() if row["decision"] in ("good", "defect")} == {
        "0.png", "1.png", "2.png", "no_ending", "camera.jfif"
    }  # fmt: skip
    assert "passed over, no images: 1 .json" in capsys.readouterr().err


def test_odd_names_have_a_row_of_one_line(drop, bundle):
    """Python 3.11 writes a carriage return without quotes, and readers see two rows."""
    for name in ("a\rb.png", "a\nb.png", b"a\xffb.png"):
        (Path(drop) / os.fsdecode(name)).write_bytes((drop / "0.png").read_bytes())
    os.mkfifo(drop / "pipe.png")
    os.mkfifo(drop / "pipe")
    os.symlink("/dev/zero", drop / "zeros.png")
    with pytest.raises(
        UserError, match=r"2 of 8 files .*pipe.png: cannot be read \(not a file\); .*zeros.png: .*file\)$"
    ):
        score_paths([drop], None, bundle, Path("out.csv"), None, None)
    rows = rows_of("out.csv")
    assert {r"a\x0db.png", r"a\x0ab.png", r"a\xffb.png", "pipe.png", "zeros.png"} <= rows.keys() and len(rows) == 8
    assert len(Path("out.csv").read_text().splitlines()) == 9


def test_half_a_picture_is_judged_and_named(drop, bundle, capsys):
    smooth = Image.fromarray(noise(1)).resize((160, 120))
    smooth.save("whole.jpg", quality=90)
    data = Path("whole.jpg").read_bytes()
    (drop / "half.jpg").write_bytes(data[: len(data) // 2] + b"\xff\xd9")
    score_paths([drop], None, bundle, Path("out.csv"), None, None)
    err = capsys.readouterr().err
    assert "half.jpg: called" in err and "but may be damaged: its end is one flat gray" in err and "0.png" not in err


def test_an_overlay_that_cannot_be_written_costs_only_itself(drop, bundle, capsys):
    Image.fromarray(np.full((8, 66_000, 3), 100, np.uint8)).save(drop / "wide.png")  # a JPEG has at most 65,500 columns
    score_paths([drop], None, bundle, Path("out.csv"), Path("overlays"), None)
    assert len(rows_of("out.csv")) == 4 and len(list(Path("overlays").glob("*.jpg"))) == 3
    assert "wide.png: scored, but its overlay was not written" in capsys.readouterr().err
    assert not list(Path("overlays").glob(".*"))


def test_a_disk_that_is_full_of_overlays_costs_no_verdicts(drop, bundle, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(score, "save_overlay", full)
    done = score_files(sorted(drop.iterdir()), Model(load_bundle(bundle)), Path("out.csv"), Path("overlays"))
    assert done.images == 3 and len(done.warnings) == 3 and len(rows_of("out.csv")) == 3


def test_a_name_as_long_as_names_may_be_has_an_overlay(drop, bundle):
    name = "x" * 251 + ".png"
    save(noise(5), drop / name)
    done = score_files([drop / name], Model(load_bundle(bundle)), Path("out.csv"), Path("overlays"))
    assert not done.warnings and len(list(Path("overlays").iterdir())) == 1


def test_pipes_and_names_that_are_no_text_cost_only_themselves(drop, bundle):
    """A pipe's header was waited for without end; a name that is no UTF-8 had no overlay, and the table went with it."""
    os.mkfifo(drop / "pipe.png")
    os.mkfifo(drop / "pipe_without_ending")
    os.rename(drop / "0.png", os.fsencode(drop) + b"/bad\xff.png")
    with pytest.raises(UserError, match=r"1 of 4 files could not be read: .*pipe.png: cannot be read \(not a file\)"):
        score_paths([drop], None, bundle, Path("out.csv"), Path("overlays"), None)
    assert {name: bool(row["score"]) for name, row in rows_of("out.csv").items()} == {
        "1.png": True, "2.png": True, "bad\\xff.png": True, "pipe.png": False
    }  # fmt: skip
    assert len(list(Path("overlays").iterdir())) == 3


def test_a_device_is_not_replaced_by_a_file(drop, bundle):
    """A rename would put a file where /dev/null was, for all of the machine."""
    os.mkfifo("device")  # root may make a device, others a pipe; neither is a file
    with pytest.raises(FileExistsError, match="no file to write"):
        score_paths([drop], None, bundle, Path("device"), None, None)
    assert Path("device").is_fifo() and not list(Path().glob(".device*"))


def test_a_folder_of_unreadable_pictures_alone_is_no_good_news(drop, bundle):
    for file in drop.iterdir():
        file.unlink()
    (drop / "phone.heic").write_bytes(b"x")
    with pytest.raises(UserError, match="1 of 1 files could not be read"):
        score_paths([drop], None, bundle, Path("out.csv"), None, None)
    assert rows_of("out.csv")["phone.heic"]["decision"] == "unreadable"
    (drop / "phone.heic").unlink()
    (drop / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"no images in in.* passed over 1 \.txt"):
        score_paths([drop], None, bundle, Path("out.csv"), None, None)


def test_a_range_that_is_not_filled_is_a_warning(drop, bundle):
    """Twelve bits in sixteen: five gray levels, whose verdicts say little."""
    Image.fromarray(noise(9)[..., 0].astype(np.uint16) * 16).save(drop / "camera.tif")
    files, model = sorted(drop.iterdir()), Model(load_bundle(bundle))
    (warning,) = score_files(files, model, Path("out.csv")).warnings
    assert "16-bit images hold values from" in warning and "set data.gray_range, e.g. [0, 4095]" in warning
    model = Model(replace(model.detector, config=model.detector.config.model_copy(update={"gray_range": (0, 4095)})))
    assert score_files(files, model, Path("out.csv")).warnings == []


def test_images_are_decoded_as_the_model_s_were(drop, bundle):
    detector = load_bundle(bundle)
    model = Model(replace(detector, config=detector.config.model_copy(update={"gray_range": (0, 4095)})))
    values = (noise(9)[..., 0].astype(np.uint16)) * 16
    Image.fromarray(values).save(drop / "camera.tif")
    Image.fromarray(np.rint(values * (255 / 4095)).astype(np.uint8)).save(drop / "same.png")
    score_files([drop / "camera.tif", drop / "same.png"], model, Path("out.csv"))
    rows = rows_of("out.csv")
    assert rows["camera.tif"]["score"] == rows["same.png"]["score"]
    Path("saved").mkdir()
    save_bundle(model.detector, Path("saved"))
    assert load_bundle(Path("saved")).config.gray_range == (0, 4095)
