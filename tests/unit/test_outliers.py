# SPDX-License-Identifier: Apache-2.0
"""Outliers come to the network at the resolution of the normal images, in the benchmark and in stage `adapt`."""

import json
import shutil

import numpy as np
import pytest
import yaml
from conftest import noise, save
from PIL import Image
from registry_project import make_project

from panda_ad.data.outliers import coarseness, is_gray, outlier_item
from panda_ad.features.cache import Activations


def test_larger_ones_are_reduced_by_area_and_smaller_ones_stay(tmp_path):
    large, small, wide = (
        save(noise(i, size), tmp_path / f"{i}.png") for i, size in enumerate([(64, 96), (8, 12), (10, 96)])
    )
    reduced = outlier_item(large, (32, 48), gray=False).read()
    assert reduced.shape == (32, 48, 3) and reduced.dtype == np.uint8
    # without antialiasing, neighboring pixels of noise would keep their spread
    assert reduced.std() < 0.7 * noise(0, (64, 96)).std()
    np.testing.assert_array_equal(outlier_item(small, (32, 48), gray=False).read(), noise(1, (8, 12)))
    assert outlier_item(wide, (32, 48), gray=False).read().shape == (
        10,
        48,
        3,
    )  # each side for itself: the network squeezes them apart


def test_color_goes_where_the_normal_images_have_none(tmp_path):
    path = save(noise(0), tmp_path / "a.png")
    read = outlier_item(path, (16, 16), gray=True).read()
    assert is_gray(read) and not is_gray(noise(0))
    np.testing.assert_array_equal(read[:, :, 0], np.array(Image.fromarray(noise(0)).convert("L")))


def test_the_key_holds_file_resolution_and_color(tmp_path):
    a, b = save(noise(0), tmp_path / "a.png"), save(noise(1), tmp_path / "b.png")
    variants = [
        (a, (16, 16), False),
        (a, (8, 16), False),
        (a, (16, 8), False),
        (a, (16, 16), True),
        (b, (16, 16), False),
    ]
    keys = {outlier_item(*variant).key for variant in variants}
    assert len(keys) == len(variants) and all(len(key) == 64 for key in keys)
    shutil.copy(a, tmp_path / "c.png")
    assert outlier_item(tmp_path / "c.png", (16, 16), False).key == outlier_item(a, (16, 16), False).key


def test_coarser_is_what_the_network_can_see(tmp_path):
    files = [save(noise(i, (16, 16)), tmp_path / f"{i}.png") for i in range(3)]
    assert coarseness(files, (64, 64), (128, 128)) == pytest.approx(4)
    assert coarseness(files, (900, 900), (32, 32)) == pytest.approx(2)
    assert coarseness(files, (900, 900), (16, 16)) == 1  # reduced to 16 px anyway
    assert coarseness(files, (8, 8), (128, 128)) == 1
    (tmp_path / "broken.png").write_bytes(b"no image")
    assert coarseness([*files, tmp_path / "broken.png"], (64, 64), (128, 128)) == pytest.approx(4)


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """A repository at stage `adapt`: 32 px images, 64 px network input, method oe."""
    from panda_ad.stages import extract

    folder = make_project(tmp_path / "plant")
    shutil.rmtree(folder / "build" / "adapt")
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["adapt"] |= {"method": "oe", "epochs": 1, "outliers": "others"}
    params["backbone"]["input_size"] = 64
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    monkeypatch.chdir(folder)
    extract.main()
    return folder


@pytest.mark.parametrize(("side", "said"), [(128, ""), (8, "4.0 times coarser")])
def test_adapt_trains_on_outliers_at_the_resolution_of_its_images(plant, side, said, monkeypatch, capsys):
    from panda_ad.stages import adapt

    for i in range(5):
        save(noise(i, (side, side)), plant / "others" / "x" / f"{i}.png")
    views, view_of = {}, Activations.view
    monkeypatch.setattr(Activations, "view", lambda self, items: views.setdefault(len(items), view_of(self, items)))
    adapt.main("fabric")
    facts = json.loads((plant / "build/adapt/fabric/adapt.json").read_text())
    assert facts["method"] == "oe" and facts["provenance"]["outliers"] == 5
    printed = capsys.readouterr().err
    assert (said in printed) if said else "coarser" not in printed
    # what training saw is the cached activation of the reduced image
    view = views[5]
    image = Image.fromarray(noise(2, (side, side)))
    if side > 32:
        image = image.resize((32, 32), Image.Resampling.BILINEAR)
    network = view.activations.network
    expected = network.activations(network.preprocess([np.array(image)]))[network.frozen_levels[-1]][0]
    np.testing.assert_array_equal(view[[2]][0], expected)
