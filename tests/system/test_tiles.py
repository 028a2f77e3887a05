# SPDX-License-Identifier: Apache-2.0
"""Heat maps from tiles: no seams, small defects found, the same map everywhere, and all else as without tiles."""

import base64
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from registry_project import make_project, read_rows, write_rows
from scipy import ndimage

from panda_ad.data.images import decode, read_image
from panda_ad.features.backbones import load_backbone
from panda_ad.features.export import export_network
from panda_ad.features.preprocessing import preprocess
from panda_ad.params import LocalizeParams
from panda_ad.params_file import load_params
from panda_ad.scoring.bundle import load_bundle
from panda_ad.scoring.bundle_formats import FORMAT
from panda_ad.scoring.localize.localizer import build_localizer
from panda_ad.scoring.localize.tiling import boxes, grid, image_tiles
from panda_ad.scoring.verdict import resize_map
from panda_ad.system.files import digest_file

SIZE = (64, 64)


@pytest.mark.parametrize("size", [(16, 16), (64, 64), (100, 224), (128, 96), (333, 17)])
@pytest.mark.parametrize("count", [2, 3, 8])
def test_the_grid_is_covered_by_exactly_so_many_tiles(size, count):
    shape, overlap = grid(size, count)
    places = boxes(shape, size, overlap)
    assert len(places) == count**2
    assert {(y1 - y0, x1 - x0) for y0, x0, y1, x1 in places} == {size}
    assert sorted({y0 for y0, *_ in places}) == [i * (size[0] - overlap[0]) for i in range(count)]
    assert sorted({x0 for _, x0, _, _ in places}) == [i * (size[1] - overlap[1]) for i in range(count)]
    assert grid(size, 1)[0] == size


def waves(seed: int, height: int, width: int) -> np.ndarray:
    """A periodic texture with a little noise, uint8 (height, width, 3)."""
    y, x = np.mgrid[:height, :width]
    value = 128 + 50 * np.sin(2 * np.pi * x / 16) * np.cos(2 * np.pi * y / 16)
    return np.clip(value[..., None] + np.random.default_rng(seed).normal(0, 6, (height, width, 3)), 0, 255).astype(
        np.uint8
    )


def maps_of(
    train: list[np.ndarray], test: list[np.ndarray], tiles: int | None, size: tuple[int, int], sigma: float
) -> np.ndarray:
    """Heat maps of `test` by a patch memory of `train`."""
    backbone = load_backbone("embedded")
    network = export_network(backbone, size)

    def layers(images):
        parts = np.concatenate([image_tiles(image, network, tiles or 1) for image in images])
        return network.maps(network.activations(parts), ("layer2", "layer3"))

    values = {"neighbors": 5, "memory_limit": 1000, "sigma": sigma, "tiles": tiles}
    gallery = layers(train)
    localizer = build_localizer(
        LocalizeParams(method="patch_memory", **values),
        ("layer2", "layer3"),
        lambda i: {k: v[i] for k, v in gallery.items()},
        np.empty((len(train), 0)),
        0,
    )
    return localizer.heatmaps(layers(test), np.empty((len(test), 0)), size)


@pytest.mark.parametrize("sigma", [0.0, 4.0])
def test_no_seam_on_a_periodic_texture_and_the_map_of_one_large_pass(sigma):
    count = 3
    (side, _), (overlap, _) = grid(SIZE, count)
    train, test = [waves(i, side, side) for i in range(6)], [waves(10 + i, side, side) for i in range(3)]
    y, x = side // 2 + 6, SIZE[0] - overlap // 2  # in the middle of an overlap
    test[2][y - 6 : y + 6, x - 6 : x + 6] = 20
    joined = maps_of(train, test, count, SIZE, sigma)
    assert joined.shape == (3, side, side)
    good, bad = joined[:2], joined[2]

    starts = [i * (SIZE[0] - overlap) for i in range(1, count)]
    inside = np.zeros(side - 1, bool)
    for s in starts:
        inside[s - 1 : s + overlap] = True
    away = ~inside
    away[:8] = away[-8:] = False  # the image's own border
    for axis, others in ((2, (0, 1)), (1, (0, 2))):
        step = np.abs(np.diff(good, axis=axis)).mean(axis=others)
        assert step[inside].mean() < 1.1 * step[away].mean()
        assert step[inside].max() < 1.25 * step[away].max()
        level = good.mean(axis=others)[:-1]
        assert level[inside].mean() == pytest.approx(level[away].mean(), rel=0.1)

    whole = maps_of(train, test[2:], None, (side, side), sigma)[0]
    inner = slice(16, side - 16)
    assert np.corrcoef(bad[inner, inner].ravel(), whole[inner, inner].ravel())[0, 1] > 0.85
    assert np.abs(np.subtract(np.unravel_index(bad.argmax(), bad.shape), (y, x))).max() <= 8
    assert bad.max() == pytest.approx(whole.max(), rel=0.25)


@pytest.fixture(scope="module")
def plants(tmp_path_factory):
    """A project with defects of 5 x 5 pixels in images of 150 x 200, built by the real stages at 64 x 64 without and with 4 x 4 tiles."""
    from panda_ad.stages import adapt, evaluate, extract, index

    folder = make_project(tmp_path_factory.mktemp("tiles") / "whole")
    for name in ("adapt", "bundle", "evaluation"):
        shutil.rmtree(folder / "build" / name)
    rng = np.random.default_rng(3)
    rows = read_rows(folder / "build/validation/manifest.csv")
    rows = [r for i, r in enumerate(rows) if r["split"] != "test" or i % 2]
    for row in rows:
        pixels = np.clip(128 + 220 * ndimage.gaussian_filter(rng.normal(size=(150, 200, 3)), (2, 2, 0)), 0, 255).astype(
            np.uint8
        )
        path = folder / "data" / row["path"]
        if row["label"] == "1":
            y, x = rng.integers(20, 125), rng.integers(20, 175)
            pixels[y : y + 5, x : x + 5] = (255, 255, 255) if row["defect"] == "hole" else (0, 0, 0)
            mask = np.zeros((150, 200), np.uint8)
            mask[y : y + 5, x : x + 5] = 255
            row["mask"] = row["path"].replace("test", "ground_truth")
            (folder / "data" / row["mask"]).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(folder / "data" / row["mask"])
        Image.fromarray(pixels).save(path)
        row.update(
            sha256=digest_file(path),
            width="200",
            height="150",
            mask_sha256=digest_file(folder / "data" / row["mask"]) if row["mask"] else "",
        )
    write_rows(folder / "build/validation/manifest.csv", rows)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["adapt"]["method"] = "none"
    params["backbone"]["input_size"] = SIZE[0]
    params["evaluate"]["bootstrap"] = 50
    params["gallery"]["whiten"] = False
    params["verdict"]["score"] = "features"
    with pytest.MonkeyPatch.context() as patch:
        for name, tiles in (("whole", None), ("tiled", 4)):
            plant = folder.parent / name
            if tiles:
                shutil.copytree(folder, plant)
            params["localize"]["tiles"] = tiles
            (plant / "params.yaml").write_text(yaml.safe_dump(params))
            patch.chdir(plant)
            if not tiles:
                extract.main()
                adapt.main("fabric")
            index.main("fabric")
            evaluate.main("fabric")
    return folder, folder.parent / "tiled"


def test_scores_stay_those_of_the_whole_image(plants):
    tables = [pd.read_csv(p / "build/evaluation/fabric/scores.csv") for p in plants]
    whole, tiled = (table.drop(columns="heatmap_peak") for table in tables)
    pd.testing.assert_frame_equal(whole, tiled, check_exact=True)
    whole, tiled = (json.loads((p / "build/bundle/fabric/calibration.json").read_text()) for p in plants)
    assert whole == tiled


def test_a_score_from_the_heat_map_sees_what_the_tiles_show(plants, monkeypatch, tmp_path):
    from panda_ad.stages import evaluate, index

    found = {}
    for plant in plants:
        folder = shutil.copytree(plant, tmp_path / plant.name)
        params = yaml.safe_load((folder / "params.yaml").read_text())
        params["verdict"]["score"] = "heatmap"
        (folder / "params.yaml").write_text(yaml.safe_dump(params))
        monkeypatch.chdir(folder)
        index.main("fabric")
        evaluate.main("fabric")
        found[plant.name] = json.loads((folder / "build/evaluation/fabric/metrics.json").read_text())
    whole, tiled = found[plants[0].name], found[plants[1].name]
    assert whole["features_auroc"] == tiled["features_auroc"] < 0.8
    assert whole["image_auroc"] < 0.8 and tiled["image_auroc"] > 0.95


def test_a_defect_too_small_for_the_input_size_is_found(plants):
    whole, tiled = (json.loads((p / "build/evaluation/fabric/metrics.json").read_text()) for p in plants)
    assert whole["au_pro"] < 0.5 and whole["pixel_auroc"] < 0.8
    assert tiled["au_pro"] > 0.85 and tiled["pixel_auroc"] > 0.95


def test_the_bundle_says_what_it_needs_and_no_more(plants):
    whole, tiled = (p / "build/bundle/fabric" for p in plants)
    assert json.loads((whole / "bundle.json").read_text())["format"] == FORMAT
    assert load_bundle(whole).localizer.tiles == 1
    assert json.loads((tiled / "bundle.json").read_text())["format"] == FORMAT
    detector = load_bundle(tiled)
    assert detector.localizer.tiles == 4
    start, full = detector.config.heatmap_range
    assert 0 < start < full
    assert "patch_memory, 4 x 4 tiles" in (plants[1] / "build/evaluation/fabric/report.html").read_text()


def test_one_map_for_the_same_bytes_alone_in_company_evaluated_scored_and_over_rest(plants, monkeypatch, tmp_path):
    from panda_ad.commands.score import Model, score_files
    from panda_ad.registry.model import PandaModel
    from panda_ad.stages.evaluate import score_rows

    plant = plants[1]
    monkeypatch.chdir(plant)
    detector = load_bundle("build/bundle/fabric")
    table = pd.read_csv("build/features/fabric/rows.csv", keep_default_na=False)
    rows = table[table["split"] == "test"]
    files = [plant / "data" / path for path in rows["path"]]
    images = [read_image(file) for file in files]

    together = detector.score(images, heatmaps=True)
    assert together[0].heatmap.shape == (150, 200)
    for i in (0, 4, len(images) - 1):
        (alone,) = detector.score(images[i : i + 1], heatmaps=True)
        np.testing.assert_array_equal(alone.heatmap, together[i].heatmap)
        assert (alone.score, alone.p_value, alone.region) == tuple(
            getattr(together[i], name) for name in ("score", "p_value", "region")
        )
    evaluated = score_rows(detector, load_params(), rows, "fabric")
    assert evaluated.heatmaps.shape == (len(rows), 160, 160)
    for verdict, heatmap in zip(together, evaluated.heatmaps, strict=True):
        np.testing.assert_array_equal(resize_map(heatmap, (150, 200)), verdict.heatmap)

    score_files(files, Model(detector), tmp_path / "scores.csv", tmp_path / "overlays")
    scored = read_rows(tmp_path / "scores.csv")
    assert [tuple(int(r[k]) for k in ("x0", "y0", "x1", "y1")) for r in scored] == [v.region for v in together]
    assert len(list((tmp_path / "overlays").iterdir())) == len(files)

    model = PandaModel()
    model.load_context(SimpleNamespace(artifacts={"bundle": "build/bundle/fabric"}))
    answer = model.predict(None, pd.DataFrame({"image": [files[0].read_bytes()]}), {"heatmap": True})
    map8 = decode(base64.b64decode(answer["heatmap"][0]), "heatmap")[..., 0]
    heatmap = together[0].heatmap
    np.testing.assert_array_equal(map8, np.round((heatmap - heatmap.min()) / np.ptp(heatmap) * 255).astype(np.uint8))


def test_a_map_is_that_of_its_tiles_one_by_one(plants):
    """From the loaded bundle, without the detector's own path: tiles cut, passed and joined here."""
    detector = load_bundle(plants[1] / "build/bundle/fabric")
    image = read_image(plants[1] / "data" / read_rows(plants[1] / "build/features/fabric/rows.csv")[0]["path"])
    x = preprocess(image, (160, 160), detector.network.facts)
    maps = []
    sigma, sharp = detector.localizer.sigma, replace(detector.localizer, sigma=0.0, tiles=1)
    for y0, x0 in [(y, x) for y in (0, 32, 64, 96) for x in (0, 32, 64, 96)]:
        maps.append(
            sharp.heatmaps(
                detector.network.maps(
                    detector.network.activations(x[None, :, y0 : y0 + 64, x0 : x0 + 64]), sharp.levels
                ),
                np.empty((1, 0)),
                SIZE,
            )[0]
        )
    rise = (1 - np.cos(np.pi * (np.arange(32) + 0.5) / 32)) / 2
    total, weights = np.zeros((160, 160)), np.zeros((160, 160))
    for n, tile in enumerate(maps):
        window = [
            np.concatenate([rise if i else np.ones(32), rise[::-1] if i < 3 else np.ones(32)]) for i in divmod(n, 4)
        ]
        at = tuple(slice(32 * i, 32 * i + 64) for i in divmod(n, 4))
        total[at] += np.outer(*window) * tile
        weights[at] += np.outer(*window)
    expected = ndimage.gaussian_filter((total / weights).astype(np.float32), sigma)
    (verdict,) = load_bundle(plants[1] / "build/bundle/fabric").score([image], heatmaps=True)
    np.testing.assert_allclose(verdict.heatmap, resize_map(expected, (150, 200)), rtol=1e-5)


def test_evaluation_holds_no_maps_larger_than_it_looks_at(plants, monkeypatch):
    from panda_ad.evaluation import figures
    from panda_ad.evaluation import masks as evaluate_masks
    from panda_ad.stages import evaluate

    monkeypatch.chdir(plants[1])
    for module in (evaluate, evaluate_masks):
        monkeypatch.setattr(module, "PIXEL_SIDE", 96)
    table = pd.read_csv("build/features/fabric/rows.csv", keep_default_na=False)
    rows = table[table["split"] == "test"]
    detector = load_bundle("build/bundle/fabric")
    maps = evaluate.score_rows(detector, load_params(), rows, "fabric").heatmaps
    assert maps.shape == (len(rows), 96, 96)
    masks = evaluate.load_masks(rows, load_params())
    assert {m.shape for m in masks} == {(72, 96)}
    values, _ = figures.pixel_figures(masks, [resize_map(m, (72, 96)) for m in maps], load_params())
    full = json.loads((plants[1] / "build/evaluation/fabric/metrics.json").read_text())
    assert values["pixel_auroc"] == pytest.approx(full["pixel_auroc"], abs=0.03)


def test_a_defect_without_a_mask_counts_for_no_pixel_figure(plants, monkeypatch):
    from panda_ad.evaluation.masks import with_masks
    from panda_ad.stages import evaluate
    from panda_ad.stages.evaluate_report import per_defect

    monkeypatch.chdir(plants[1])
    table = pd.read_csv("build/features/fabric/rows.csv", keep_default_na=False)
    rows = table[table["split"] == "test"].reset_index(drop=True)
    bare = rows.index[rows["label"] == 1][0]
    rows.loc[bare, "mask"] = ""
    scores = evaluate.score_rows(
        load_bundle("build/bundle/fabric"), load_params(), table[table["split"] == "test"], "fabric"
    )
    masks = evaluate.load_masks(rows, load_params())
    assert [i for i, mask in enumerate(masks) if mask is None] == [bare]
    known, maps = with_masks(scores.heatmaps, masks)
    assert len(known) == len(maps) == len(rows) - 1 and all(
        m.shape == mask.shape for m, mask in zip(maps, known, strict=True)
    )
    labels, defects = rows["label"].to_numpy(), rows["defect"].to_numpy()
    assert sum(row.n for row in per_defect(labels, defects, scores, masks, load_params())) == labels.sum()
    alone = [
        None if label else mask for label, mask in zip(labels, masks, strict=True)
    ]  # of no defect is known where it is
    assert all(row.au_pro is None for row in per_defect(labels, defects, scores, alone, load_params()))
