# SPDX-License-Identifier: Apache-2.0
"""A small repository with a registered, promoted model and a drop folder, for the tests of scoring and monitoring."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from registry_project import make_project, set_gate
from shared import copied, made_once

from panda_ad.registry.connection import connect


def make_monitored(factory: pytest.TempPathFactory, folder: Path) -> Path:
    """A project of category fabric, 32 px, its model built by the real stages, published and at @staging; monitor.min_images is 8."""
    copied(made_once(factory, "monitored", _make_monitored), folder)
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        connect()  # lets the store point to the copy
    return folder


def _make_monitored(folder: Path) -> None:
    from panda_ad.registry.promote import promote
    from panda_ad.stages import adapt, evaluate, extract, index
    from panda_ad.stages.publish import main as publish

    make_project(folder)
    for name in ("adapt", "bundle", "evaluation"):
        shutil.rmtree(folder / "build" / name)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["adapt"]["method"] = "none"
    params["localize"]["method"], params["verdict"]["score"] = "none", "features"
    params["monitor"]["min_images"] = 8
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    set_gate(folder, min_image_auroc=None, min_pixel_auroc=None, false_alarm_risk=None)
    with pytest.MonkeyPatch.context() as patch, contextlib.chdir(folder):
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        extract.main()
        for stage in (adapt, index, evaluate):
            stage.main("fabric")
        publish("fabric")
        promote(["fabric"])


def drop(folder: Path, count: int, seed: int, shift: int = 0) -> None:
    """Put good images into inbox/fabric, their gray values moved by `shift`."""
    inbox = folder / "inbox/fabric"
    inbox.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = (rng.integers(90, 160, (32, 32, 3)) + shift).astype(np.uint8)
        Image.fromarray(pixels).save(inbox / f"{seed}-{i:03d}.png")
