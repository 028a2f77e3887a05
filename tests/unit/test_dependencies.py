# SPDX-License-Identifier: Apache-2.0
"""Scoring needs the first dependency group of pyproject.toml and no more; a lighter installation depends on it."""

import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from conftest import save
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]

PROGRAM = """
import runpy, sys

absent = set(sys.argv.pop(1).split(","))


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())
sys.argv.pop(0)
runpy.run_path(sys.argv[0])

import numpy as np
from panda_ad.scoring.bundle import load_bundle

(verdict,) = load_bundle(sys.argv[1]).score([np.zeros((40, 40, 3), np.uint8)], heatmaps=True)
print("heat map", *verdict.heatmap.shape)
"""


def closure(requirements: list[str]) -> set[str]:
    """Installed distributions that these requirements bring along, by normalized name."""
    found: set[str] = set()
    todo = [Requirement(r) for r in requirements]
    while todo:
        requirement = todo.pop()
        name = requirement.name.lower().replace("_", "-")
        marker = requirement.marker
        if name in found or (marker is not None and not marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        try:
            todo += [Requirement(r) for r in metadata.requires(name) or []]
        except metadata.PackageNotFoundError:
            continue
    return found


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The bundle that examples/own_detector.py leaves, a good image, and what it printed of that."""
    folder = tmp_path_factory.mktemp("example")
    rng = np.random.default_rng(0)
    for i in range(12):
        save(rng.integers(100, 130, (40, 40, 3), np.uint8), folder / "good" / f"{i}.png")
    image = folder / "good" / "3.png"
    command = [sys.executable, ROOT / "examples/own_detector.py", folder / "good", folder / "bundle", image]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return folder / "bundle", image, done.stdout


@pytest.mark.slow
def test_scoring_needs_nothing_outside_its_group_and_the_examples_give_the_same_verdict(example):
    """examples/score.py, and a heat map, where all that the other groups bring cannot be imported."""
    bundle, image, printed = example
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    present = closure(declared) | {"panda-ad"}
    modules = metadata.packages_distributions()
    absent = {m for m, by in modules.items() if not {d.lower().replace("_", "-") for d in by} & present}
    assert {"mlflow", "dvc", "prefect", "pandas", "torch", "torchvision", "sklearn"} <= absent
    command = [sys.executable, "-c", PROGRAM, ",".join(absent), ROOT / "examples/score.py", bundle, image]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == f"{printed}heat map 40 40\n", done.stderr
    assert printed.rstrip().endswith(("good", "defect"))


def test_each_group_is_locked():
    """Each name of each group stands in requirements.lock, so that one installation serves all."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {Requirement(r).name.lower() for group in groups for r in group} - {"panda-ad"}
    locked = {line.partition("==")[0] for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line}
    assert names - locked == set()
