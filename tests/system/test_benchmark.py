# SPDX-License-Identifier: Apache-2.0
"""The benchmark: protocols, resumption, tables against a hand-worked case, and the Dask flow."""

from __future__ import annotations

import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.covariance import LedoitWolf

from panda_ad.benchmark.cells import Bench, read_cell
from panda_ad.benchmark.protocols import choose_test, train_files
from panda_ad.benchmark.runner import METHODS, benchmark, make_settings, plan
from panda_ad.benchmark.sources import Images, read_set
from panda_ad.benchmark.tables import build_table
from panda_ad.errors import UserError
from panda_ad.evaluation.image_metrics import auroc
from panda_ad.features.network import Network
from panda_ad.params import Params
from panda_ad.params_file import load_params, parse_params
from panda_ad.registry.connection import connect
from panda_ad.system.processes import Group

ROOT = Path(__file__).parents[2]
CLASSES = ("disc", "stripes", "blank")


def picture(kind: str, rng: np.random.Generator) -> np.ndarray:
    y, x = np.mgrid[:32, :32]
    image = rng.normal(0.4, 0.05, (32, 32, 3))
    if kind == "disc":
        image[(y - 16) ** 2 + (x - 16) ** 2 < rng.integers(40, 90)] = (0.9, 0.2, 0.2)
    elif kind == "stripes":
        image[(x + rng.integers(8)) % 8 < 4] = (0.1, 0.3, 0.9)
    return (image.clip(0, 1) * 255).astype(np.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A one-vs-rest set of 3 classes, a set in MVTec's layout, and outliers."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)

    def write(folder: Path, kind: str, count: int) -> None:
        folder.mkdir(parents=True)
        for i in range(count):
            Image.fromarray(picture(kind, rng)).save(folder / f"{i:03}.png")

    for kind in CLASSES:
        write(root / "shapes" / "train" / kind, kind, 8)
        write(root / "shapes" / "test" / kind, kind, 4)
        write(root / "outliers" / kind, kind, 6)
    write(root / "parts" / "bolt" / "train" / "good", "disc", 6)
    write(root / "parts" / "bolt" / "test" / "good", "disc", 3)
    write(root / "parts" / "bolt" / "test" / "scratch", "stripes", 3)
    return root


@pytest.fixture
def params() -> Params:
    values = load_params(ROOT / "params.yaml").model_dump()
    values["backbone"] |= {"input_size": 32, "precision": "fp32"}
    values["adapt"] |= {"epochs": 1, "snapshots": 2, "fisher_samples": 4}
    values["evaluate"]["bootstrap"] = 50
    values["gallery"]["normalize"] = False  # distances as in the paper
    return parse_params(values)


@pytest.fixture
def run(data, params, tmp_path, monkeypatch):
    monkeypatch.setenv("PANDA_BENCH_DATA", str(data))

    def call(*args, **more):
        more = {"mlflow": False, "out": tmp_path / "out", "cache": tmp_path / "cache", **more}
        return benchmark(params, *args, **more)

    return call


def cells_of(folder: Path) -> dict[str, dict]:
    cells = [json.loads(p.read_text()) for p in sorted((folder / "cells").rglob("*.json"))]
    return {f"{c['target']} {c['method']}": c for c in cells}


@pytest.mark.parametrize("terminal", [True, False])
def test_a_long_job_shows_its_progress_on_a_terminal_only(run, monkeypatch, terminal):
    written = io.StringIO()
    monkeypatch.setattr(written, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", written)
    run(["shapes"], ["ewc"], classes=["disc"])
    bars = [name for name in ("Fisher:", "ewc:", "features:") if name in written.getvalue()]
    assert bars == (["Fisher:", "ewc:", "features:"] if terminal else [])


def test_every_method_gives_a_cell_and_a_row(run, data, tmp_path):
    rows = run(["shapes"], METHODS, classes=["disc"], changes=[f"oe.outliers={data / 'outliers' / 'stripes'}"])[
        "shapes"
    ]
    assert [r.method for r in rows] == list(METHODS)
    cells = cells_of(tmp_path / "out")
    assert set(cells) == {f"disc {m}" for m in METHODS}
    for cell in cells.values():
        assert cell["labels"] == [c != "disc" for c in read_set("shapes", data)[""].test_class]
        assert cell["auroc"] == pytest.approx(auroc(np.array(cell["labels"]), np.array(cell["scores"])))
    assert cells["disc none"]["auroc"] == 1.0  # discs, stripes and noise: what any features tell apart
    shared = ("steps", "snapshot_auroc", "train_means", "seconds")
    assert [cells["disc ses"][k] for k in shared] == [cells["disc compactness"][k] for k in shared]
    text = (tmp_path / "out" / "shapes.md").read_text()
    assert "32 x 32 px" in text and "efficientnet_lite0" in text and "PANDA-EWC" in text
    assert (tmp_path / "out" / "shapes.csv").read_text().count("\n") == len(METHODS) + 1


@pytest.mark.parametrize("method", ["none", "normalized", "whitened"])
def test_neighbors_of_pretrained_features_by_hand(run, data, params, tmp_path, method):
    """DN2 is the paper's score, of the last level (320 channels of 624), whatever the galleries compare."""
    run(["shapes"], [method], classes=["stripes"])
    cell = cells_of(tmp_path / "out")[f"stripes {method}"]
    settings = make_settings(params, [method], None, None, [], data)
    (job,) = plan(["shapes"], data, [method], "one-vs-rest", ["stripes"], [0])[0]
    bench = Bench(settings, data, tmp_path / "again", tmp_path / "cache")
    train, test = (
        bench.pretrained(items).astype(float) for items in (bench.train_items(job), bench.test_items(job)[0])
    )
    assert train.shape[1] == 624
    if method == "none":
        train, test = train[:, -320:], test[:, -320:]
    else:
        train, test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test))
    if method == "whitened":
        precision = np.linalg.inv(LedoitWolf().fit(train).covariance_)
        naive = [sorted(np.einsum("md,de,me->m", train - q, precision, train - q))[:2] for q in test]
        np.testing.assert_allclose(cell["scores"], np.sum(naive, axis=1), rtol=1e-3)
        return
    naive = [sorted(((train - q) ** 2).sum(1))[:2] for q in test]
    np.testing.assert_allclose(cell["scores"], np.sum(naive, axis=1), rtol=1e-5)


def test_killed_run_resumes_at_its_cell(run, tmp_path, monkeypatch):
    calls = []
    real = Bench.run

    def dies_at_third(self, job):
        calls.append(job.target)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, job)

    monkeypatch.setattr(Bench, "run", dies_at_third)
    with pytest.raises(KeyboardInterrupt):
        run(["shapes"], ["none"])
    first = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "cells").rglob("*.json")}
    assert len(first) == 2 and not list((tmp_path / "out").rglob("*.tmp"))
    run(["shapes"], ["none"])
    assert calls[3:] == [calls[2]]  # only what was missing
    assert all(p.stat().st_mtime_ns == t for p, t in first.items())
    run(["shapes"], ["none"])
    assert len(calls) == 4


def test_other_settings_are_other_cells(run, tmp_path):
    run(["shapes"], ["none", "ses"], classes=["disc"])
    run(["shapes"], ["none", "ses"], classes=["disc"], changes=["ses.epochs=2"])
    folder = tmp_path / "out" / "cells" / "shapes" / "one-vs-rest-disc"
    assert len(list(folder.glob("ses-*"))) == 2
    assert len(list(folder.glob("none-*"))) == 1  # DN2 does not depend on epochs


def test_a_folder_or_file_of_other_content_under_the_same_name_is_another_setting(params, tmp_path):
    def key(family, **more):
        return make_settings(params, [family], 8, 8, [f"{k}={v}" for k, v in more.items()], tmp_path).key(family)

    for parent, size in (("one", 10), ("other", 11), ("copy", 10)):
        (tmp_path / parent / "out").mkdir(parents=True)
        (tmp_path / parent / "out" / "a.png").write_bytes(bytes(size))
    for family, name in (("oe", "oe.outliers"), ("ewc", "ewc.fisher")):
        one, other, copy = (key(family, **{name: tmp_path / parent / "out"}) for parent in ("one", "other", "copy"))
        assert one == copy != other


def test_leave_one_out_and_categories(run, tmp_path):
    run(["shapes"], ["none"], protocol="leave-one-out", train=8)
    cells = cells_of(tmp_path / "out")
    assert set(cells) == {f"{c} none" for c in CLASSES}
    assert cells["disc none"]["labels"].count(1) == 4 and cells["disc none"]["n_train"] == 8  # 4 of each of two classes
    assert (tmp_path / "out" / "shapes-leave-one-out.md").exists()
    run(["parts"], ["none"])
    cell = cells_of(tmp_path / "out")["bolt none"]
    assert cell["protocol"] == "category" and cell["labels"].count(1) == 3


def test_each_image_is_extracted_once(run, monkeypatch):
    """Classes share the test images, and methods all of them."""
    computed: list[int] = []
    real = Network.preprocess
    monkeypatch.setattr(Network, "preprocess", lambda net, images: computed.append(len(images)) or real(net, images))
    run(["shapes"], ["none", "ses"])
    assert sum(computed) == len(CLASSES) * (8 + 4)


def test_subsets_are_stratified_and_stable():
    images = Images({"a": [Path(f"{i}.png") for i in range(50)]}, [Path("t.png")] * 100, ["a"] * 80 + ["b"] * 20)
    chosen = choose_test(images, 10)
    assert [images.test_class[i] for i in chosen].count("a") == 8 and len(set(chosen)) == 10
    assert (chosen == choose_test(images, 10)).all()
    assert train_files(images, ["a"], 5) == train_files(images, ["a"], 5) and len(train_files(images, ["a"], 5)) == 5


def test_cifar100_is_read_by_its_superclasses(tmp_path):
    """As torchvision's set is unpacked: a folder per fine class; apple is a fruit (4), aquarium fish a fish (1), trout too."""
    names = [f"{i:03}" for i in range(100)]
    for split in ("train", "test"):
        for name in names:
            (tmp_path / "cifar100" / split / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / "cifar100" / split / name / f"{split}.png")
    images = read_set("cifar100", tmp_path)[""]
    assert list(images.train) == [f"superclass-{i:02}" for i in range(20)]
    assert all(len(files) == 5 for files in images.train.values()) and len(images.test) == 100
    assert [images.test_class[i] for i in (0, 1, 91)] == ["superclass-04", "superclass-01", "superclass-01"]


def cell(target: str, method: str, seed: int, labels: list[int], scores: list[float]) -> dict:
    value = auroc(np.array(labels), np.array(scores))
    return {
        "target": target,
        "method": method,
        "seed": seed,
        "labels": labels,
        "scores": scores,
        "auroc": value,
        "protocol": "one-vs-rest",
    }


def test_table_by_hand():
    """Two classes, the baseline at .75 and 1, SES at 1 and .5 / 1 over two seeds; every resampling of a separated set stays separated."""
    a, b = [0, 0, 1, 1], [1, 1, 0, 0]
    cells = [
        cell("airplane", "whitened", 0, a, [0, 2, 1, 3]),
        cell("cat", "whitened", 0, b, [1, 1, 0, 0]),
        cell("airplane", "ses", 0, a, [0, 0, 1, 1]),
        cell("cat", "ses", 0, b, [1, 1, 1, 1]),
        cell("airplane", "ses", 1, a, [0, 0, 1, 1]),
        cell("cat", "ses", 1, b, [1, 1, 0, 0]),
    ]
    base, ses = build_table("cifar10", cells, 2000, 0.95)
    assert (base.mean, base.gain, base.seed_sd) == (87.5, None, None)
    assert (base.low, base.high) == (50.0 + 0.0, 100.0)  # airplane alone varies, from 0 to 1, around .75
    assert (ses.mean, ses.gain, ses.low, ses.high) == (87.5, 0.0, 87.5, 87.5)
    assert (ses.tuned, ses.held_out) == (100.0, 75.0)
    assert ses.seed_sd == pytest.approx(np.std([75, 100], ddof=1))
    assert (ses.gain_low, ses.gain_high) == (-12.5, 37.5)


def test_table_is_a_run_in_mlflow(run, tmp_path, monkeypatch):
    monkeypatch.chdir(
        tmp_path
    )  # the store and the artifacts lie beside params.yaml, here nowhere near the repository's
    (tmp_path / "params.yaml").touch()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (row,) = run(["shapes"], ["none"], mlflow=True)["shapes"]
    client = connect()
    experiment = client.get_experiment_by_name("panda-benchmark")
    (logged,) = client.search_runs([experiment.experiment_id])
    assert (logged.info.run_name, logged.info.status) == ("shapes", "FINISHED")
    assert logged.data.metrics["auroc_none"] == pytest.approx(row.mean / 100)
    assert logged.data.params["backbone.name"] == "efficientnet_lite0" and logged.data.params["dataset"] == "shapes"
    assert {f.path for f in client.list_artifacts(logged.info.run_id)} == {"shapes.csv", "shapes.md"}


@pytest.mark.parametrize(
    ("datasets", "more", "words"),
    [
        (["cats_vs_dogs"], {}, ["cats_vs_dogs", "Kaggle", "train/<class>/"]),
        (["nowhere"], {}, ["nowhere", "cifar10", "fashion_mnist"]),
        (["shapes"], {"classes": ["cube"]}, ["cube", "disc"]),
        (["shapes"], {"methods": ["magic"]}, ["magic", "ewc"]),
        (["shapes"], {"methods": ["oe"]}, ["oe", "outliers"]),
        (["shapes"], {"changes": ["ses.speed=3"]}, ["ses.speed=3", "METHOD.KEY=VALUE"]),
        (["shapes"], {"changes": ["ewc.epochs=-1"]}, ["ewc", "epochs"]),
    ],
)
def test_mistakes_are_named_in_one_line(run, datasets, more, words):
    with pytest.raises(UserError) as e:
        run(datasets, **{"methods": ["none"], **more})
    assert "\n" not in str(e.value)
    for word in words:
        assert word in str(e.value)


def test_no_data_folder_is_named(run, monkeypatch):
    monkeypatch.delenv("PANDA_BENCH_DATA")
    with pytest.raises(UserError, match="PANDA_BENCH_DATA"):
        run(["shapes"])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_dask_cluster_gives_the_same_cells(data, tmp_path, monkeypatch):
    """`panda-ad benchmark --dask local` in a process of its own: a local cluster and a Prefect server, nothing left running."""
    monkeypatch.setenv("PANDA_BENCH_DATA", str(data))
    environment = {
        **{k: v for k, v in os.environ.items() if k != "PREFECT_API_URL"},
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "true",
        "OMP_NUM_THREADS": "1",
    }
    options = [
        "-m",
        "none",
        "-m",
        "ses",
        "--size",
        "32",
        "--no-mlflow",
        "--set",
        "ses.epochs=1",
        "--out",
        str(tmp_path / "dask"),
        "--dask",
        "local",
    ]
    with Group(
        [sys.executable, "-m", "panda_ad.cli", "benchmark", "shapes", *options], cwd=ROOT, env=environment
    ) as group:
        output = list(group.lines())
        assert group.wait() == 0, "\n".join(output[-40:])
    values = load_params(ROOT / "params.yaml").model_dump()
    values["backbone"]["input_size"] = 32
    options = {"changes": ["ses.epochs=1"], "out": tmp_path / "plain", "cache": tmp_path / "cache", "mlflow": False}
    benchmark(parse_params(values), ["shapes"], ["none", "ses"], **options)
    dask, plain = cells_of(tmp_path / "dask"), cells_of(tmp_path / "plain")
    assert set(dask) == set(plain) == {f"{c} {m}" for c in CLASSES for m in ("none", "ses")}
    for name, one in plain.items():
        np.testing.assert_allclose(dask[name]["scores"], one["scores"], rtol=1e-4, err_msg=name)


def test_the_logit_of_outlier_exposure_is_of_features_as_they_come(data, params, tmp_path):
    """So its classifier was trained, whatever the galleries compare."""
    normalizing = parse_params(params.model_dump() | {"gallery": params.gallery.model_dump() | {"normalize": True}})
    change = [f"oe.outliers={data / 'outliers' / 'stripes'}"]
    (job,), scores = plan(["shapes"], data, ["oe"], "one-vs-rest", ["disc"], [0])[0], []
    for n, given in enumerate((params, normalizing)):
        bench = Bench(
            make_settings(given, ["oe"], None, None, change, data),
            data,
            tmp_path / f"out{n}",
            tmp_path / "cache",
        )
        scores.append(read_cell(bench.run(job)[0])["scores"])
    assert scores[0] == scores[1]


def test_what_collapse_leads_to_is_part_of_a_cell(params, data):
    one, other = (
        make_settings(params, ["ses"], None, None, change, data) for change in ([], ["ses.on_collapse=fallback"])
    )
    assert one.key("trajectory") != other.key("trajectory")
