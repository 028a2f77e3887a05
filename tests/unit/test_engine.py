# SPDX-License-Identifier: Apache-2.0
"""Scoring's network in ONNX Runtime: PyTorch's results to a tolerance, its own to the digit, and bad files in one line."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from test_architectures import EACH, random_state

from panda_ad.errors import UserError
from panda_ad.features.backbones import Backbone, load_backbone, with_state
from panda_ad.features.engine import Session
from panda_ad.features.export import export_network, with_snapshots
from panda_ad.features.network import load_network
from panda_ad.system import cores

TOLERANCE = 2e-3
"""Of float16 maps, as a share of the level's largest value: rounding is 5e-4, and what was rounded goes through layers."""
SIZE = (64, 96)


def pixels(n, seed=0, size=(40, 50)):
    return [np.random.default_rng(seed + i).integers(0, 256, (*size, 3), np.uint8) for i in range(n)]


@pytest.fixture(scope="module")
def network():
    backbone = load_backbone("embedded")
    state = {k: v * 1.01 for k, v in backbone.adapted.state_dict().items() if k.endswith("weight")}
    return with_snapshots(export_network(backbone, SIZE), backbone.adapted, [state], [0, 5])


@pytest.mark.parametrize("name", EACH)
def test_each_architecture_computes_what_pytorch_does(name):
    backbone = Backbone(name, random_state(name))
    state = {k: v * 1.001 for k, v in backbone.adapted.state_dict().items() if k.endswith("weight")}
    network = with_snapshots(export_network(backbone, SIZE), backbone.adapted, [state], [0, 7])
    assert network.steps == (0, 7)
    x = network.preprocess(pixels(2))
    activations = network.activations(x)
    features, maps = network.features_and_maps(activations, network.inner_levels)
    last = torch.from_numpy(activations[network.frozen_levels[-1]]).float()
    with torch.inference_mode():
        frozen = backbone.frozen(torch.from_numpy(x))
        pretrained = backbone.adapted(last)
        trained = with_state(backbone.adapted, state)
        levels = trained.maps(last)
        pooled = trained.pool(last, levels)
    expected = dict(zip((*backbone.frozen.levels, *backbone.adapted.levels), (*frozen, *levels), strict=True))
    assert tuple(maps) == network.inner_levels == tuple(expected)[:-1]
    for level, values in maps.items():
        assert values.dtype == np.float16 and values.shape == tuple(expected[level].shape)
        close(values, expected[level].numpy(), TOLERANCE)
    for found, value in zip(features, (pretrained, pooled), strict=True):
        assert found.dtype == np.float32
        close(found, value.numpy(), 1e-4)


def close(found, expected, tolerance):
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@settings(max_examples=8, deadline=None)
@given(n=st.integers(1, 9), seed=st.integers(0, 100), threads=st.integers(1, 3))
def test_an_image_has_the_same_features_alone_in_company_and_on_any_number_of_threads(network, n, seed, threads):
    x = network.preprocess(pixels(n, seed))

    def everything(x):
        found = network.activations(x)
        features, maps = network.features_and_maps(found, network.inner_levels)
        np.testing.assert_array_equal(features[0], network.features(found)[0])
        return [*found.values(), *features, *maps.values(), network.maps(found, ["layer3"])["layer3"]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cores, "cores", lambda: threads)
        together = everything(x)
    for i in {0, n // 2, n - 1}:
        for alone, all_of_them in zip(everything(x[i : i + 1]), together, strict=True):
            np.testing.assert_array_equal(alone[0], all_of_them[i])


def test_pretrained_features_that_are_known_are_taken(network):
    found = network.activations(network.preprocess(pixels(2)))
    known = np.full((2, 3), 7, np.float32)
    assert network.features(found, known)[0] is known
    assert network.features(found, known)[1].shape == (2, 512)


def test_exporting_twice_gives_the_same_bytes(network):
    """A new image must not make a new network, of which DVC would train all models anew."""
    again = export_network(load_backbone("embedded"), SIZE)
    assert again.frozen.model == network.frozen.model and again.adapted[0].model == network.adapted[0].model
    assert again.key == network.key != export_network(load_backbone("embedded"), (64, 64)).key


def test_a_saved_network_is_the_same(network, tmp_path):
    network.save(tmp_path)
    again = load_network(tmp_path)
    assert again.facts == network.facts and again.steps == network.steps and again.key == network.key
    x = network.preprocess(pixels(1))
    for a, b in zip(network.features(network.activations(x)), again.features(again.activations(x)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_activations_beyond_float16_stay_finite():
    state = random_state("resnet18")
    state = {k: v * 1e8 if k.startswith("layer2.1.bn2.weight") else v for k, v in state.items()}
    network = export_network(Backbone("resnet18", state), (32, 32))
    (level,) = [network.activations(network.preprocess(pixels(1)))["layer2"]]
    assert np.isfinite(level).all() and level.max() == np.finfo(np.float16).max


@pytest.mark.parametrize("damage", ["empty", "half", "other"])
def test_a_network_file_that_is_none_is_one_line(network, tmp_path, damage):
    network.save(tmp_path)
    file = tmp_path / "adapted_1.onnx"
    whole = file.read_bytes()
    file.write_bytes({"empty": b"", "half": whole[: len(whole) // 2], "other": b"PK" * 500}[damage])
    with pytest.raises(
        UserError, match=r"adapted_1.onnx: onnxruntime .* cannot run this network .*build the model"
    ) as e:
        load_network(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("newer", ["opset_import", "ir_version"])
def test_a_network_of_a_newer_onnx_says_to_update(network, newer):
    import onnx

    model = onnx.load_from_string(network.frozen.model)
    if newer == "opset_import":
        model.opset_import[0].version = 99
    else:
        model.ir_version = 99
    with pytest.raises(UserError, match="frozen.onnx: onnxruntime .*; update onnxruntime") as e:
        Session(model.SerializeToString(), "frozen.onnx")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(("key", "value"), [("name", "openvino"), ("precision", "bf16")])
def test_what_another_engine_or_precision_calibrated_is_refused(network, tmp_path, key, value):
    network.save(tmp_path)
    facts = json.loads((tmp_path / "network.json").read_text())
    facts["engine"]["version"] = "0.0"  # another version differs in the last bits only
    (tmp_path / "network.json").write_text(json.dumps(facts))
    assert load_network(tmp_path).facts.engine.version == "0.0"
    facts["engine"][key] = value
    (tmp_path / "network.json").write_text(json.dumps(facts))
    with pytest.raises(UserError, match=f"calibrated with .*{value}.*would score otherwise; build the model again"):
        load_network(tmp_path)


def test_a_quota_of_a_container_counts(tmp_path):
    assert cores.quota(tmp_path) == float("inf")
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cores.quota(tmp_path) == float("inf")
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert cores.quota(tmp_path) == 1.5
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for text, expected in (("-1\n", float("inf")), ("50000\n", 0.5)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(text)
        assert cores.quota(tmp_path) == expected


def test_work_is_divided_once_and_errors_come_through(monkeypatch):
    monkeypatch.setattr(cores, "cores", lambda: 3)
    assert cores.side_by_side(lambda i: cores.side_by_side(lambda j: i * j, range(4)), range(5)) == [
        [i * j for j in range(4)] for i in range(5)
    ]
    with pytest.raises(ZeroDivisionError):
        cores.side_by_side(lambda i: 1 / i, range(3))


def test_a_network_runs_without_pytorch(network, tmp_path):
    network.save(tmp_path)
    x = network.preprocess(pixels(1))
    save_file({"x": x, "pooled": network.features(network.activations(x))[1]}, tmp_path / "expected.safetensors")
    code = (
        "import sys; from pathlib import Path; from safetensors.numpy import load_file\n"
        "from panda_ad.features.network import load_network\n"
        "folder = Path(sys.argv[1]); expected = load_file(folder / 'expected.safetensors'); network = load_network(folder)\n"
        "found = network.features(network.activations(expected['x']))[1]\n"
        "assert (found == expected['pooled']).all(); print({'torch', 'onnx', 'scipy', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout == "set()\n", done.stderr


def test_nothing_is_stored_for_or_reported_to_the_engines_maker(tmp_path):
    """ONNX Runtime's import alone leaves an identifier of the device and a queue of events under HOME else."""
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    code = "import panda_ad.features.engine"
    subprocess.run([sys.executable, "-c", code], env=environment | {"HOME": str(tmp_path)}, check=True)
    assert not list(tmp_path.iterdir())


def test_scores_do_not_depend_on_who_loads_numpy_first():
    """On two threads, products round otherwise, and one image in ninety had another score in the sixth digit."""
    program = """
import numpy, scipy.linalg, faiss
from threadpoolctl import threadpool_info
import panda_ad.features.engine

threads = {(i["threading_layer"], i["num_threads"]) for i in threadpool_info() if i["internal_api"] == "openblas"}
print(sorted(threads))
"""
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "3", "OMP_NUM_THREADS": "3"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert "('pthreads', 1)" in done.stdout and "('pthreads', 3)" not in done.stdout
