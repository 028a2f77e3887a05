# SPDX-License-Identifier: Apache-2.0
"""Bundles that earlier versions wrote score as they did.

The fixtures were written by version 0.1.0's `save_bundle` as of format 4 (two snapshots, whitening, score `both`, a patch memory) and as of
format 2 (one snapshot, score `features`, SPADE). Their backbone's tensors are left out: seeded random ones, made below.
"""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from panda_ad.errors import UserError
from panda_ad.features.resnet import ResNet
from panda_ad.scoring.bundle import load_bundle, save_bundle
from panda_ad.scoring.bundle_formats import FORMAT, upgrade_config

FIXTURES = Path(__file__).parents[1] / "fixtures"
EXPECTED = json.loads((FIXTURES / "bundle-scores.json").read_text())


def random_weights() -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(20)
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in ResNet("resnet18", 1).state_dict().items()}
    state = {}
    for name in sorted(shapes):
        shape = shapes[name]
        if name.startswith("fc.") or name.endswith("num_batches_tracked"):
            continue
        if len(shape) == 4:
            values = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        else:
            values = np.ones(shape) if name.endswith(("running_var", "weight")) else np.zeros(shape)
        state[f"backbone.{name}"] = torch.from_numpy(values.astype(np.float16))
    return state


def picture(seed: int, defect: bool) -> np.ndarray:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:40, :48]
    values = 128 + 60 * np.sin(x / 3 + seed % 3 * 0.1) * np.cos(y / 4)
    image = np.clip(values[..., None] + rng.normal(0, 8, (40, 48, 3)), 0, 255).astype(np.uint8)
    if defect:
        image[10:18, 20:28] = 255 - image[10:18, 20:28]
    return image


IMAGES = [picture(200 + i, i % 2 == 1) for i in range(6)]


@pytest.fixture(params=["format-2", "format-4"])
def bundle(request, tmp_path):
    """A bundle's name and folder."""
    with zipfile.ZipFile(FIXTURES / f"bundle-{request.param}.zip") as archive:
        archive.extractall(tmp_path)
    file = tmp_path / "weights.safetensors"
    save_file(load_file(file) | random_weights(), file)
    return request.param, tmp_path


def assert_as_before(detector, name):
    """Equal to the digit on a processor and a PyTorch like those that wrote the fixture; elsewhere convolutions differ in the last bits."""
    expected = EXPECTED[name]
    here = {"torch": torch.__version__.split("+")[0], "cpu": torch.backends.cpu.get_cpu_capability()}
    same = all(EXPECTED[k] == v for k, v in here.items())
    verdicts = detector.score(IMAGES, heatmaps=True)
    found = {
        "scores": [v.score for v in verdicts],
        "p_values": [v.p_value for v in verdicts],
        "peaks": [float(v.heatmap.max()) for v in verdicts],
        "threshold": detector.threshold().value,
    }
    for key, values in found.items():
        assert values == (expected[key] if same else pytest.approx(expected[key], rel=1e-3)), key
    if expected["components"][0] is None:
        assert [v.components for v in verdicts] == [None] * 6
    else:
        assert [sum(v.components) for v in verdicts] == pytest.approx(found["scores"])


def test_an_earlier_bundle_scores_as_it_did_and_still_does_once_saved_anew(bundle, tmp_path):
    name, folder = bundle
    detector = load_bundle(folder)
    assert detector.config.method == ("none" if name == "format-2" else "ses")
    assert detector.localizer.levels == (("layer1", "layer2", "layer3") if name == "format-2" else ("layer2", "layer3"))
    assert_as_before(detector, name)
    new = tmp_path / "new"
    new.mkdir()
    save_bundle(detector, new)
    assert json.loads((new / "bundle.json").read_text())["format"] == FORMAT
    assert not (new / "usual.safetensors").exists()
    assert_as_before(load_bundle(new), name)


def test_what_the_first_formats_did_not_say():
    first = {"format": 1, "k": 2, "normalize": False, "scorer": "knn", "steps": [0]}
    assert upgrade_config(first) == {
        **{"format": 1, "k": 2, "normalize": False, "steps": [0], "dataset": "", "method": "none", "provenance": {}},
        **{"whiten": False, "score": "features", "scales": []},
    }


def test_an_unknown_entry_or_a_newer_format_is_one_line(bundle):
    _, folder = bundle
    path = folder / "bundle.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"format": FORMAT + 1}))
    with pytest.raises(UserError, match=f"format {FORMAT + 1} is newer than this panda-ad's"):
        load_bundle(folder)
    path.write_text(json.dumps(facts | {"k": "two"}))
    with pytest.raises(UserError, match="damaged bundle"):
        load_bundle(folder)
