# SPDX-License-Identifier: Apache-2.0
"""The sample data: reproducible, annotated where it is defective and only there, complete in DVC, and no toy."""

import json
from io import BytesIO
from pathlib import Path

import make_sample
import numpy as np
import pytest
import sample_difficulty
import yaml
from make_sample import CATEGORIES, DEFECTS, defective_image, image_rng, normal_image
from PIL import Image
from scipy import ndimage

ROOT = Path(__file__).parents[2]
KINDS = [(category, defect) for category in CATEGORIES for defect in DEFECTS[category]]


@pytest.fixture(scope="module")
def published():
    """Path in data/ -> bytes, read from the DVC remote inside the repository."""
    store = ROOT / "dvc-remote" / "files" / "md5"

    def read(md5):
        return (store / md5[:2] / md5[2:]).read_bytes()

    out = yaml.safe_load((ROOT / "data.dvc").read_text())["outs"][0]
    return {entry["relpath"]: read(entry["md5"]) for entry in json.loads(read(out["md5"]))}


def decode(data):
    return np.array(Image.open(BytesIO(data)))


@pytest.mark.parametrize("category", CATEGORIES)
def test_a_seed_decides_the_pixels(category):
    first = normal_image(category, image_rng(3, category, "train/good", 5))
    assert first.shape == (160, 160, 3) and first.dtype == np.uint8
    again = list(make_sample.normal_images(category, 1, 3, "train/good", first=5))[0]
    np.testing.assert_array_equal(first, again)
    for other in (
        image_rng(4, category, "train/good", 5),
        image_rng(3, category, "test/good", 5),
        image_rng(3, category, "train/good", 6),
    ):
        assert np.abs(first.astype(int) - normal_image(category, other)).mean() > 2


@pytest.mark.parametrize(("category", "defect"), KINDS)
def test_a_defect_changes_the_image_at_its_mask_and_nowhere_else(category, defect):
    rgb, mask = defective_image(category, defect, image_rng(0, category, defect, 0))
    normal = normal_image(category, image_rng(0, category, defect, 0))
    assert mask.shape == (160, 160) and mask.dtype == bool
    assert make_sample.SMALLEST_MASK <= mask.sum() < 0.35 * mask.size
    change = np.abs(rgb.astype(int) - normal).max(axis=2)
    assert change[mask].mean() > 8
    assert not change[ndimage.distance_transform_edt(~mask) > 12].any()


@pytest.mark.parametrize("category", CATEGORIES)
def test_light_shifts_brightness_and_warmth_of_the_same_part(category):
    dim, usual, bright = (
        normal_image(category, image_rng(1, category, "train/good", 0), light).astype(float)
        for light in (1.0, 0.0, -0.5)
    )
    assert dim.mean() < 0.85 * usual.mean() < usual.mean() < 0.97 * bright.mean()
    assert dim[..., 0].mean() / dim[..., 2].mean() > 1.08 * usual[..., 0].mean() / usual[..., 2].mean()
    same = np.corrcoef(dim.ravel(), usual.ravel())[0, 1]
    other = np.corrcoef(normal_image(category, image_rng(1, category, "train/good", 1)).ravel(), usual.ravel())[0, 1]
    assert same > 0.75 and same > other


def test_a_data_set_has_the_mvtec_layout(tmp_path):
    written = make_sample.write_dataset(
        tmp_path / "a b", train=2, good=1, per_defect=1, categories=["grid"], held_back=["rust"]
    )
    files = sorted(p.relative_to(tmp_path / "a b").as_posix() for p in (tmp_path / "a b").rglob("*.*"))
    kinds = [kind for kind in DEFECTS["grid"] if kind != "rust"]
    expected = ["grid/train/good/000.jpg", "grid/train/good/001.jpg", "grid/test/good/000.jpg"]
    expected += [f"grid/test/{kind}/000.jpg" for kind in kinds] + [
        f"grid/ground_truth/{kind}/000_mask.png" for kind in kinds
    ]
    assert files == sorted(expected) and written == len(expected)


def test_the_command_replaces_nothing_unasked(tmp_path, capsys):
    (tmp_path / "mine.jpg").write_bytes(b"keep")
    assert make_sample.main(["--out", str(tmp_path)]) == 2
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "mine.jpg").read_bytes() == b"keep"


def test_dvc_holds_the_whole_sample(published):
    out = yaml.safe_load((ROOT / "data.dvc").read_text())["outs"][0]
    assert out["nfiles"] == len(published) and out["size"] == sum(map(len, published.values())) < 10e6
    counts = {}
    for path in published:
        counts[path.rsplit("/", 1)[0]] = counts.get(path.rsplit("/", 1)[0], 0) + 1
    expected = {f"{c}/train/good": 120 for c in CATEGORIES} | {f"{c}/test/good": 30 for c in CATEGORIES}
    for category, defect in KINDS:
        expected |= {f"{category}/test/{defect}": 12, f"{category}/ground_truth/{defect}": 12}
    assert counts == expected
    for path, data in published.items():
        if "/ground_truth/" in path:
            assert path.replace("/ground_truth/", "/test/").replace("_mask.png", ".jpg") in published
            mask = decode(data)
            assert mask.shape == (160, 160) and mask.any() and not mask.all()


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_published_sample_is_what_the_script_makes(published, category):
    for part, index in (("train/good", 119), ("test/good", 0)):
        fresh = normal_image(category, image_rng(7, category, part, index))
        stored = decode(published[f"{category}/{part}/{index:03d}.jpg"]).astype(int)
        assert np.abs(stored - fresh).mean() < 6  # JPEG; another image differs by far more
    defect = DEFECTS[category][0]
    _, mask = defective_image(category, defect, image_rng(7, category, f"test/{defect}", 11))
    assert (mask != decode(published[f"{category}/ground_truth/{defect}/011_mask.png"])).sum() <= 3


def test_raw_pixels_do_not_find_the_defects(published):
    for side in (32, 64):
        values = []
        for category in CATEGORIES:
            parts = {"train/good": [], "test/good": [], "defective": []}
            for path in sorted(published):
                name, part, kind, _ = path.split("/")
                if name == category and part != "ground_truth":
                    parts[f"{part}/good" if kind == "good" else "defective"].append(decode(published[path]))
            gallery, good, bad = (sample_difficulty.pixels(images, side) for images in parts.values())
            values.append(
                sample_difficulty.auroc(
                    sample_difficulty.knn_scores(gallery, good), sample_difficulty.knn_scores(gallery, bad)
                )
            )
        assert 0.5 < np.mean(values) < sample_difficulty.RAW_LIMIT
