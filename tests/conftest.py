# SPDX-License-Identifier: Apache-2.0
"""Fixtures shared by the tests."""

import os

# Two workers on two cores: with as many threads as cores in each, threads spin while they wait for one another, for ten times
# the processor time. Before NumPy and PyTorch are imported; processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import HealthCheck, settings
from PIL import Image

from panda_ad.data.manifest import collect
from panda_ad.data.validation import validate
from panda_ad.params import Params
from panda_ad.params_file import parse_params

# on a busy machine any property would fail for its time alone
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

REPO = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files all of whose tests are slow: they wait for servers most of the time, while other workers compute."""
    quick = {item.path for item in items if item.get_closest_marker("slow") is None}
    items.sort(key=lambda item: item.path in quick)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """Root of this checkout."""
    return REPO


def noise(seed: int, size: tuple[int, int] = (16, 16)) -> np.ndarray:
    """uint8 (H, W, 3), a picture of its own for each seed."""
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def save(pixels: np.ndarray, path: Path) -> Path:
    """Write an array as an image, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def make_mvtec(
    root: Path,
    category: str = "nut",
    train: int = 10,
    good: int = 3,
    defective: int = 3,
    masks: bool = True,
    seed: int = 0,
) -> Path:
    """A tiny data set in MVTec layout, 16 x 16 pixels of noise, defects 'crack' and 'scratch'; returns the category's folder."""
    folder = root / category
    seeds = iter(range(seed * 10_000, seed * 10_000 + 10_000))
    for i in range(train):
        save(noise(next(seeds)), folder / "train" / "good" / f"{i:03d}.png")
    for i in range(good):
        save(noise(next(seeds)), folder / "test" / "good" / f"{i:03d}.png")
    for defect in ("crack", "scratch"):
        for i in range(defective):
            save(noise(next(seeds)), folder / "test" / defect / f"{i:03d}.png")
            if masks:
                mask = np.zeros((16, 16), np.uint8)
                mask[4:8, 4:8] = 255
                save(mask, folder / "ground_truth" / defect / f"{i:03d}_mask.png")
    return folder


def build_manifest(params: Params) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """The rows that can be used, and (path, reason) of everything that cannot."""
    rows, warnings = collect(params)
    found = validate(rows, params, warnings)
    return found.usable, found.problems + found.shortages


@pytest.fixture
def make_params() -> Callable[..., Params]:
    """`make_params(categories, data={...}, adapt={...})`: params.yaml with sections updated."""

    def make(categories: list[str], **sections: dict) -> Params:
        raw = yaml.safe_load((REPO / "params.yaml").read_text(encoding="utf-8"))
        raw["categories"] = categories
        for name, values in sections.items():
            raw[name] = {**raw[name], **values} if isinstance(values, dict) else values
        return parse_params(raw)

    return make


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """An empty MLflow database; creating one takes seconds, copying it nothing."""
    folder = tmp_path_factory.mktemp("store")
    from panda_ad.registry.connection import connect

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        patch.chdir(folder)
        connect()
    assert [p.name for p in folder.iterdir()] == ["mlflow.db"]
    return folder / "mlflow.db"


@pytest.fixture
def project(tmp_path, monkeypatch, empty_store):
    """A repository ready to publish, with spaces in its path, and an empty registry of its own; the working directory."""
    from registry_project import make_project

    folder = make_project(tmp_path / "my plant")
    shutil.copyfile(empty_store, folder / "mlflow.db")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(folder)
    return folder
