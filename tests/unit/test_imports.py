# SPDX-License-Identifier: Apache-2.0
"""What takes as long to import as PyTorch itself is imported by those alone who need it: each stage is a process of its own."""

import json
import shutil
import subprocess
import sys

import pytest
from registry_project import make_project

pytestmark = pytest.mark.slow

PROGRAM = """
import json, sys

def note(step):
    heavy = {"torch", "torchvision", "timm", "sympy", "torch._dynamo"} & set(sys.modules)
    print(json.dumps([step, sorted(heavy)]))

from panda_ad.stages.publish import main
main("fabric")
note("publish")

import panda_ad.stages.evaluate, panda_ad.stages.index
note("index")

from panda_ad.features.backbones import load_backbone
load_backbone("efficientnet_lite0")
embedded = load_backbone("embedded")
note("backbones")

import numpy as np
from panda_ad.adapt.train import adapt
from panda_ad.params_file import load_params
images = np.random.default_rng(0).normal(size=(4, 128, 8, 8)).astype(np.float16)
settings = load_params().adapt.model_copy(update={"method": "ses", "epochs": 1})
assert adapt(embedded.adapted, images, settings, seed=0).steps[-1] > 0
note("training")
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory, empty_store):
    """Heavy modules that one process has imported after it has published, has loaded backbones, and has trained."""
    folder = make_project(tmp_path_factory.mktemp("imports") / "plant")
    shutil.copyfile(empty_store, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


def test_publishing_does_not_import_torch(imported):
    assert imported["publish"] == []


def test_indexing_and_evaluating_do_not_import_torch(imported):
    assert imported["index"] == []


def test_no_stage_imports_torchvision_or_timm_for_a_network_of_our_own(imported):
    """They bring PyTorch's compiler along: as long again as PyTorch, at each start of a stage."""
    assert imported["backbones"] == ["torch"]


def test_training_does_not_import_the_compiler(imported):
    assert "torch._dynamo" not in imported["training"] and "torch" in imported["training"]
