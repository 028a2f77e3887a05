# SPDX-License-Identifier: Apache-2.0
"""Folder layouts, torchvision's sets, subsampling and the manifest."""

import gzip
import hashlib
import os
import pickle
import struct
import urllib.error
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.io
import torchvision.datasets
from conftest import build_manifest, make_mvtec, noise, save
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from panda_ad.data import manifest, torchvision_sets
from panda_ad.data.images import read_image
from panda_ad.data.layouts import image_root, list_entries
from panda_ad.data.manifest import COLUMNS, apportion, data_hash, load_manifest, split_calibration, write_manifest
from panda_ad.errors import UserError


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def build(make_params, categories=("nut",), **data):
    return build_manifest(make_params(list(categories), data={"root": "data", **data}))


def test_mvtec_rows(make_params):
    make_mvtec(Path("data"))
    rows, problems = build(make_params)
    assert problems == []
    assert list(rows.columns) == COLUMNS
    assert Counter(zip(rows["split"], rows["defect"], rows["label"], strict=True)) == {
        ("train", "good", 0): 10,
        ("test", "good", 0): 3,
        ("test", "crack", 1): 3,
        ("test", "scratch", 1): 3,
    }
    row = rows[rows["path"] == "nut/test/crack/001.png"].iloc[0]
    assert row["mask"] == "nut/ground_truth/crack/001_mask.png"
    assert row["sha256"] == hashlib.sha256(Path("data/nut/test/crack/001.png").read_bytes()).hexdigest()
    assert (row["width"], row["height"], row["mode"]) == (16, 16, "RGB")
    assert rows["path"].tolist() == sorted(rows["path"], key=lambda p: (0 if "/train/" in p else 1, p))


def test_masks_may_be_named_as_their_images_and_hidden_files_are_passed_over(make_params):
    folder = make_mvtec(Path("data"))
    for mask in (folder / "ground_truth/crack").iterdir():
        mask.rename(mask.with_name(mask.name.replace("_mask", "")))
    for junk in (
        "train/good/.DS_Store",
        "test/crack/Thumbs.db",
        "ground_truth/crack/.x.png",
        "train/.ipynb_checkpoints",
    ):
        (folder / junk).write_bytes(b"junk")
    rows, problems = build(make_params)
    assert problems == [] and (rows.loc[rows["label"] == 1, "mask"] != "").all()


def test_odd_names_survive(make_params):
    folder = make_mvtec(Path("data"), "größe no 1")
    names = [
        "a b.png",
        "ünïcødé 測試.png",
        'quote\'d, "x".png',
        "new\nline.png",
        "carriage\rreturn.png",
        "NA.png",
        "  lead.png",
    ]
    for i, name in enumerate(names):
        save(noise(900 + i), folder / "train/good" / name)
    rows, problems = build(make_params, ["größe no 1"])
    assert problems == []
    write_manifest(rows, "m.csv")
    again = load_manifest("m.csv", "größe no 1")
    pd.testing.assert_frame_equal(again, rows, check_dtype=False)
    assert {Path(p).name for p in again["path"]} >= set(names)
    for path in again["path"]:
        read_image(Path("data") / path)


def test_names_that_are_not_utf8_are_refused_by_name(make_params):
    folder = make_mvtec(Path("data"))
    target = os.fsencode(folder / "train/good") + b"/caf\xe9.png"
    os.rename(os.fsencode(folder / "train/good/000.png"), target)
    _, problems = build(make_params)
    assert problems == [("nut/train/good/caf\\xe9.png", "its name is not valid UTF-8: rename it")]


def test_what_has_no_place_is_listed(make_params):
    folder = make_mvtec(Path("data"))
    save(noise(500), folder / "train/thread/000.png")
    save(noise(501), folder / "train/loose.png")
    save(noise(502), folder / "test/good/sub/000.png")
    save(noise(503), folder / "ground_truth/crack/099_mask.png")
    _, problems = build(make_params)
    found = dict(problems)
    assert set(found) == {
        "nut/train/thread/000.png",
        "nut/train/loose.png",
        "nut/test/good/sub",
        "nut/ground_truth/crack/099_mask.png",
    }
    assert "defective image in train" in found["nut/train/thread/000.png"]
    assert "without an image" in found["nut/ground_truth/crack/099_mask.png"]


def test_absent_categories_and_roots_are_one_line(make_params):
    make_mvtec(Path("data"), "bolt")
    with pytest.raises(UserError, match=r"no folder 'nut' in data; found: bolt$"):
        build(make_params)
    with pytest.raises(UserError, match="data.root: no folder elsewhere"):
        build(make_params, root="elsewhere")
    with pytest.raises(UserError, match=r"categories: no class 'nut' in data/train; it holds none"):
        build(make_params, layout="folders")


def make_classes(root: Path, train: int = 12, test: int = 6, classes: tuple[str, ...] = ("cat", "dog", "eel")) -> None:
    for c, name in enumerate(classes):
        for i in range(train):
            save(noise(c * 1000 + i), root / "train" / name / f"{i:02d}.png")
        for i in range(test):
            save(noise(c * 1000 + 500 + i), root / "test" / name / f"{i:02d}.png")


def test_one_against_the_rest(make_params):
    make_classes(Path("data"))
    rows, problems = build(make_params, ["cat", "pets"], layout="folders", normal_classes={"pets": ["cat", "dog"]})
    assert problems == []
    cat, pets = rows[rows["category"] == "cat"], rows[rows["category"] == "pets"]
    assert len(cat) == 12 + 18 and len(pets) == 24 + 18
    assert Counter(cat[cat["split"] == "test"]["defect"]) == {"good": 6, "dog": 6, "eel": 6}
    assert Counter(pets[pets["split"] == "test"]["label"]) == {0: 12, 1: 6}
    assert set(cat[cat["split"] != "test"]["path"].str.split("/").str[1]) == {"cat"}


def test_normal_class_that_is_not_there(make_params):
    make_classes(Path("data"))
    with pytest.raises(
        UserError, match=r"data.normal_classes.pets: no class 'fox' in data/train; found: cat, dog, eel"
    ):
        build(make_params, ["pets"], layout="folders", normal_classes={"pets": ["cat", "fox"]})


def test_limits_are_stratified_and_stable(make_params):
    make_classes(Path("data"), train=40, test=20)
    limits = {"layout": "folders", "limit_train": 20, "limit_test": 15}
    before, _ = build(make_params, ["cat"], **limits)
    assert Counter(before[before["split"] == "test"]["defect"]) == {"good": 5, "dog": 5, "eel": 5}
    assert (before["split"] != "test").sum() == 20
    assert build(make_params, ["cat"], **limits)[0].equals(before)
    for i in range(4):
        save(noise(5000 + i), Path(f"data/train/cat/new{i}.png"))
    after, _ = build(make_params, ["cat"], **limits)
    assert len(set(before["path"]) & set(after["path"])) >= len(before) - 4
    for i, path in enumerate(sorted(Path("data/train/cat").iterdir())):
        path.rename(path.with_name(f"renamed {99 - i}.png"))
    renamed, _ = build(make_params, ["cat"], **limits)  # the choice goes by content, not by name
    assert dict(zip(renamed["sha256"], renamed["split"], strict=True)) == dict(
        zip(after["sha256"], after["split"], strict=True)
    )


def test_a_limit_counts_good_training_images_only(make_params):
    folder = make_mvtec(Path("data"))
    for i in range(20):
        save(noise(6000 + i), folder / f"train/crack/{i:03d}.png")
    rows, _ = build(make_params, limit_train=6)
    assert Counter(rows.loc[rows["split"] != "test", "defect"]) == {"good": 6}


def test_calibration_is_stable_when_images_are_added(make_params):
    make_mvtec(Path("data"), train=40)
    before, _ = build(make_params, calibration_fraction=0.2)
    for i in range(5):
        save(noise(7000 + i), Path(f"data/nut/train/good/0_new{i}.png"))
    after, _ = build(make_params, calibration_fraction=0.2)
    split_before, split_after = (dict(zip(rows["path"], rows["split"], strict=True)) for rows in (before, after))
    changed = [p for p in split_before if split_before[p] != split_after[p]]
    assert sum(v == "calibration" for v in split_after.values()) == 9
    assert len(changed) <= 5


@given(
    st.dictionaries(st.text("abcdef", min_size=1, max_size=3), st.integers(1, 200), min_size=1, max_size=8),
    st.integers(1, 500),
)
def test_apportion_is_fair(sizes, limit):
    seats = apportion(sizes, limit)
    total = sum(sizes.values())
    assert sum(seats.values()) == min(limit, total)
    assert all(0 <= seats[k] <= sizes[k] for k in sizes)
    if limit >= len(sizes):
        assert all(seats[k] >= 1 for k in sizes)
    assert all(seats[a] >= seats[b] - 1 for a in sizes for b in sizes if sizes[a] >= sizes[b])


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=6, unique=True))
def test_any_name_comes_back_from_the_csv(names):
    row = {
        "sha256": "0",
        "width": 9,
        "height": 9,
        "mode": "L",
        "category": "c",
        "split": "test",
        "label": 0,
        "defect": "good",
        "mask": "",
        "pixels": "1",
        "mask_sha256": "",
    }
    rows = pd.DataFrame([{"path": name, **row} for name in names], columns=COLUMNS)
    write_manifest(rows, "names.csv")
    assert load_manifest("names.csv")["path"].tolist() == names


@given(st.integers(4, 60), st.floats(0.01, 0.99), st.integers(0, 5))
def test_calibration_share(n, fraction, seed):
    rows = pd.DataFrame(
        {"category": "c", "split": ["train"] * n + ["test"] * 3, "sha256": [str(i) for i in range(n + 3)]}
    )
    out = split_calibration(rows, fraction, seed)
    assert (out["split"] == "calibration").sum() == int(np.ceil(fraction * n)) and (out["split"] == "test").sum() == 3


def test_second_run_reads_only_what_is_new(make_params, monkeypatch):
    make_mvtec(Path("data"))
    first, _ = build(make_params)
    read = []
    original = manifest.inspect_image
    monkeypatch.setattr(
        manifest, "inspect_image", lambda root, path, **kw: read.append(path) or original(root, path, **kw)
    )
    save(noise(999), Path("data/nut/train/good/new.png"))
    second, _ = build(make_params)
    assert read == ["nut/train/good/new.png"] and len(second) == len(first) + 1
    for cache in Path(".cache/manifest").iterdir():
        cache.write_text("{ damaged")
    assert build(make_params)[0].equals(second) and len(read) == 1 + len(second)


def test_data_hash_follows_contents(make_params):
    make_mvtec(Path("data"))
    before = data_hash(build(make_params)[0])
    mask = np.zeros((16, 16), np.uint8)
    mask[0, 0] = 255
    save(mask, Path("data/nut/ground_truth/crack/000_mask.png"))
    after = data_hash(build(make_params)[0])
    assert before != after == data_hash(build(make_params)[0])


def test_load_manifest_says_what_is_wrong():
    with pytest.raises(UserError, match="gone.csv: cannot be read"):
        load_manifest("gone.csv")
    Path("other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="not a manifest"):
        load_manifest("other.csv")
    write_manifest(pd.DataFrame([], columns=COLUMNS), "none.csv")
    with pytest.raises(UserError, match="no images of category 'nut'"):
        load_manifest("none.csv", "nut")


# torchvision's sets, from files in their real formats


def idx(array: np.ndarray) -> bytes:
    """The IDX format of MNIST: magic (8: unsigned byte, number of axes), big-endian sizes, values."""
    return struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def make_fashion(root: Path) -> np.ndarray:
    raw = root / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (60, 28, 28), dtype=np.uint8)
    labels = np.arange(60, dtype=np.uint8) % 2
    for part, chosen in (("train", slice(0, 40)), ("t10k", slice(40, 60))):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(images[chosen]))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels[chosen]))
    return images


def test_fashion_mnist(make_params):
    images = make_fashion(Path("raw"))
    params = make_params(["Trouser", "T-shirt-top"], data={"root": "raw", "layout": "fashion_mnist"})
    rows, problems = build_manifest(params)
    assert problems == []
    assert Counter(zip(rows["category"], rows["label"], strict=True)) == {
        ("Trouser", 0): 30,
        ("Trouser", 1): 10,
        ("T-shirt-top", 0): 30,
        ("T-shirt-top", 1): 10,
    }
    pixels = read_image(image_root(params) / "train/Trouser/00003.png")
    np.testing.assert_array_equal(pixels, np.repeat(images[3][:, :, None], 3, 2))
    marker = image_root(params) / "train/Trouser/00003.png"
    before = marker.stat().st_mtime_ns
    assert image_root(params) and marker.stat().st_mtime_ns == before  # not unpacked again
    os.utime("raw/FashionMNIST/raw/train-images-idx3-ubyte", (1, 1))
    assert image_root(params) and marker.stat().st_mtime_ns != before  # the source has changed


def test_damaged_fashion_mnist_is_one_line(make_params):
    make_fashion(Path("raw"))
    file = Path("raw/FashionMNIST/raw/t10k-images-idx3-ubyte")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="fashion_mnist: torchvision cannot read") as e:
        image_root(make_params(["Trouser"], data={"root": "raw", "layout": "fashion_mnist"}))
    assert "\n" not in str(e.value)
    assert not (torchvision_sets.CACHE / "fashion_mnist").exists()


def write_pickle(path: Path, value: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value))
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(("layout", "labels"), [("cifar10", "labels"), ("cifar100", "fine_labels")])
def test_cifar(layout, labels, make_params, monkeypatch):
    name, folder, _ = torchvision_sets.SETS[layout]
    dataset = getattr(torchvision.datasets, name)
    base = Path("raw") / folder
    rng = np.random.default_rng(1)
    batches = {
        file: rng.integers(0, 256, (30, 3072), dtype=np.uint8) for file, _ in dataset.train_list + dataset.test_list
    }
    sums = {
        file: write_pickle(base / file, {"data": data, labels: [i % 3 for i in range(30)]})
        for file, data in batches.items()
    }
    meta = dataset.meta["filename"]
    sums[meta] = write_pickle(base / meta, {dataset.meta["key"]: ["airplane", "bird", "cat"]})
    monkeypatch.setattr(dataset, "train_list", [[file, sums[file]] for file, _ in dataset.train_list])
    monkeypatch.setattr(dataset, "test_list", [[file, sums[file]] for file, _ in dataset.test_list])
    monkeypatch.setattr(dataset, "meta", {**dataset.meta, "md5": sums[meta]})
    params = make_params(["bird"], data={"root": "raw", "layout": layout})
    rows, problems = build_manifest(params)
    assert problems == []
    assert Counter(rows["label"]) == {0: 10 * len(dataset.train_list) + 10, 1: 20}
    first = batches[dataset.test_list[0][0]][1].reshape(3, 32, 32).transpose(1, 2, 0)
    np.testing.assert_array_equal(read_image(image_root(params) / "test/bird/00001.png"), first)


def test_flowers(make_params, monkeypatch):
    base = Path("raw/flowers-102")
    for i in range(1, 41):
        path = base / "jpg" / f"image_{i:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(i)).save(path, quality=90)
    scipy.io.savemat(base / "imagelabels.mat", {"labels": np.array([1 + i % 2 for i in range(40)])})
    scipy.io.savemat(
        base / "setid.mat", {"trnid": np.arange(1, 13), "valid": np.arange(13, 25), "tstid": np.arange(25, 41)}
    )
    sums = {
        k: (f, hashlib.md5((base / f).read_bytes()).hexdigest() if (base / f).exists() else m)
        for k, (f, m) in torchvision.datasets.Flowers102._file_dict.items()
    }
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_file_dict", sums)
    params = make_params(["pink primrose"], data={"root": "raw", "layout": "flowers102"})
    rows, problems = build_manifest(params)
    assert problems == [] and Counter(rows["split"]) == {"train": 12, "test": 16}
    copied = next((image_root(params) / "test" / "pink primrose").iterdir())
    assert copied.read_bytes() in [p.read_bytes() for p in (base / "jpg").iterdir()]


def test_class_names_are_folder_names():
    for dataset in (torchvision.datasets.FashionMNIST, torchvision.datasets.Flowers102):
        folders = [torchvision_sets.class_folder(name) for name in dataset.classes]
        assert len(set(folders)) == len(folders) and not any(set(f) & set("/\\:%@'\"") for f in folders)


@pytest.mark.parametrize("layout", list(torchvision_sets.SETS))
def test_absent_set_without_network_names_the_files(layout, make_params, monkeypatch):
    def unreachable(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    params = make_params(["x"], data={"root": "raw", "layout": layout})
    with pytest.raises(UserError) as e:
        list_entries(params, image_root(params))
    message = str(e.value)
    assert "\n" not in message and all(file in message for file in torchvision_sets.SETS[layout][2])


def test_gzipped_originals_are_used(make_params, monkeypatch):
    """torchvision unpacks the .gz files it would have downloaded, where a user put those."""
    make_fashion(Path("raw"))
    raw, sums = Path("raw/FashionMNIST/raw"), []
    for file in sorted(raw.iterdir()):
        packed = raw / f"{file.name}.gz"
        packed.write_bytes(gzip.compress(file.read_bytes()))
        sums.append((packed.name, hashlib.md5(packed.read_bytes()).hexdigest()))
        file.unlink()
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "resources", sums)
    root = image_root(make_params(["Trouser"], data={"root": "raw", "layout": "fashion_mnist"}))
    assert len(list(root.rglob("*.png"))) == 60
