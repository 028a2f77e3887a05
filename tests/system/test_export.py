# SPDX-License-Identifier: Apache-2.0
"""A model that leaves: scores to the digit in a folder of its own, refused where one differs, certified in the registry."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import noise, save
from monitor_project import make_monitored
from registry_project import NAME
from tiny_bundle import make_bundle

from panda_ad.commands.export import export, export_model, scoring_libraries
from panda_ad.commands.score import score_paths
from panda_ad.errors import GateRefused, UserError
from panda_ad.registry.connection import connect
from panda_ad.registry.load import Model
from panda_ad.registry.versions import find_version
from panda_ad.scoring.bundle import load_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(5):
        save(noise(50 + i, (20, 30)), tmp_path / f"images/{i}.png")
    (tmp_path / "images/cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return tmp_path / "images"


def station(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess:
    """Run an exported folder's score.py as a station would: nothing of ours on its path."""
    command = [sys.executable, "-I", str(folder / "score.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder.parent)


def test_the_folder_scores_the_same_wherever_it_is(bundle, images, tmp_path):
    certificate = export(Model(load_bundle(bundle)), bundle, [images], tmp_path / "out")
    assert certificate.holds and (certificate.images, certificate.verdicts_flipped) == (5, 0)
    assert json.loads((tmp_path / "out/certificate.json").read_text())["largest_difference"] == 0
    moved = shutil.move(tmp_path / "out", tmp_path / "station" / "elsewhere")
    program = "import sys; sys.argv = ['score.py', '--self-test']; import runpy\ntry:\n    runpy.run_path({0!r}, run_name='__main__')\nexcept SystemExit as e:\n    import panda_ad; print(panda_ad.__file__, e.code)\n"
    done = subprocess.run(
        [sys.executable, "-I", "-c", program.format(str(moved / "score.py"))],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert "self-test: 5 images, largest difference 0, verdicts that differ: 0" in done.stdout
    assert done.stdout.split()[-2:] == [str(moved / "panda_ad/__init__.py"), "0"], "its own code, not this checkout's"
    done = station(moved, images, "--out", tmp_path / "station.csv", "--heatmaps", tmp_path / "maps")
    assert done.returncode == 2 and "cut.png" in done.stderr and len(list((tmp_path / "maps").iterdir())) == 5
    with pytest.raises(UserError, match="could not be read"):
        score_paths([images], None, bundle, Path("project.csv"), Path("overlays"), None)
    assert Path("station.csv").read_text() == Path("project.csv").read_text(), "to the digit"
    assert set(scoring_libraries()) >= {"numpy", "onnxruntime"} and "torch" not in scoring_libraries()


def test_a_damaged_folder_and_another_verdict_are_said(bundle, images, tmp_path):
    export(Model(load_bundle(bundle)), bundle, [images], tmp_path / "out")
    file = next((tmp_path / "out/model").glob("gallery_*.faiss"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    done = station(tmp_path / "out", "--self-test")
    assert done.returncode == 2 and f"damaged, not as exported: model/{file.name}" in done.stderr
    file.write_bytes(whole)
    expected = tmp_path / "out/sample/expected.csv"
    rows = list(csv.reader(expected.read_text().splitlines()))
    other = {"good": "defect", "defect": "good"}[rows[1][2]]
    expected.write_text(expected.read_text().replace(f"{rows[1][1]},{rows[1][2]}", f"{rows[1][1]},{other}", 1))
    sums = (tmp_path / "out/SHA256SUMS").read_text().splitlines()
    (tmp_path / "out/SHA256SUMS").write_text("\n".join(line for line in sums if "expected.csv" not in line) + "\n")
    done = station(tmp_path / "out", "--self-test")
    assert done.returncode == 3 and "verdicts that differ: 1" in done.stdout


def test_nothing_is_exported_where_a_score_differs(bundle, images, tmp_path):
    detector = load_bundle(bundle)
    other = replace(detector, calibration=detector.calibration + 1e6)
    with pytest.raises(GateRefused, match=r"not exported: 5 images .* verdicts flipped [1-5]"):
        export(Model(other), bundle, [images], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="mine: exists, and is no export"):
        export(Model(detector), bundle, [images], tmp_path / "mine")
    with pytest.raises(UserError, match="no images to compare on .* --images"):
        export_model(None, bundle, [], tmp_path / "out")


def test_the_certificate_is_the_versions(tmp_path_factory, images, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = make_monitored(tmp_path_factory, tmp_path_factory.mktemp("built") / "plant")
    monkeypatch.chdir(folder)
    command = ["export", "--model", f"models:/{NAME}@staging", "--images", str(images), "--out", "station"]
    done = subprocess.run(
        [sys.executable, "-m", "panda_ad.cli", *command], capture_output=True, text=True, check=True, cwd=folder
    )  # in a process of its own: MLflow remembers where it once found a run's artifacts
    assert f"{NAME} version 1: 5 images scored by the exported folder" in done.stdout
    assert find_version(connect(), f"models:/{NAME}/1").tags["panda.certificate"]
    assert len(list((folder / "mlartifacts").rglob("fabric/certificates/version-1-*.json"))) == 1
