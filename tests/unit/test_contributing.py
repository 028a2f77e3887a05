# SPDX-License-Identifier: Apache-2.0
"""CONTRIBUTING's recipes name files, tables and tests that exist, and cover what they say they cover."""

import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from panda_ad.adapt import losses
from panda_ad.data.layouts import LAYOUTS
from panda_ad.data.torchvision_sets import SETS
from panda_ad.features.architectures import ARCHITECTURES
from panda_ad.params import METHODS, Data, GateParams
from panda_ad.registry import gate

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
STEPS = re.findall(r"(?ms)^\d\. (.*?)(?=^\d\. |^$)", TEXT)
"""Numbered steps of all recipes."""


def test_every_file_named_exists():
    named = {
        name for name in re.findall(r"`([\w./<>-]+)`", TEXT) if "/" in name and re.search(r"\.(py|md|yaml)$", name)
    }
    assert len(named) > 15
    assert [
        name
        for name in named
        if "<" not in name and not list(ROOT.glob(f"{name}")) + list(ROOT.glob(f"src/panda_ad/{name}"))
    ] == []


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.split("`")[1])
def test_every_name_of_a_step_stands_in_its_files(step):
    """A function, table or parameter that was renamed makes a recipe mislead."""
    files = [ROOT / name for name in re.findall(r"`((?:src|tests)/[\w/]+\.py|params\.yaml|dvc\.yaml)`", step)]
    code = "".join(file.read_text(encoding="utf-8") for file in files)
    names = [name for name in re.findall(r"`(?:Data\.)?(\w*[_A-Z]\w*)`", step) if not (ROOT / name).exists()]
    assert [name for name in names if code and not re.search(rf"\b{name}\b", code)] == []


def test_each_table_is_the_one_that_decides():
    layouts = set(get_args(Data.model_fields["layout"].annotation))
    assert layouts == set(LAYOUTS) | set(SETS)
    comment = next(
        line for line in (ROOT / "params.yaml").read_text(encoding="utf-8").splitlines() if " layout: " in line
    )
    assert set(re.findall(r"\w+", comment.partition("#")[2])) == layouts
    rules = {
        name for name in vars(gate) if callable(getattr(gate, name)) and getattr(gate, name).__module__ == gate.__name__
    }
    public = {name for name in rules if not name.startswith("_")} - {"evaluate_rules", "refusal"}
    assert public == {rule.__name__ for rule in gate.RULES}
    limits = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["gate"]
    assert set(limits) == set(GateParams.model_fields)
    assert all(hasattr(losses, method.loss) for method in METHODS.values() if method.loss)
    assert all(entry.name == name for name, entry in ARCHITECTURES.items())
