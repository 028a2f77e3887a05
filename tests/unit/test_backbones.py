# SPDX-License-Identifier: Apache-2.0
"""Backbones: weights from every source, one clear line where they cannot be had, and the same numbers in any company."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from panda_ad.errors import UserError
from panda_ad.features.architectures import architecture
from panda_ad.features.backbones import (
    EMBEDDED,
    Backbone,
    fingerprint,
    load_backbone,
)
from panda_ad.features.preprocessing import preprocess
from panda_ad.features.resnet import NAMES, ResNet


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("embedded")


def pixels(n, seed=0, size=(40, 50)):
    return [np.random.default_rng(seed + i).integers(0, 256, (*size, 3), np.uint8) for i in range(n)]


def network_input(backbone, images, size):
    return torch.from_numpy(np.stack([preprocess(image, size, backbone.architecture) for image in images]))


def plain_state(classes=7):
    import torchvision

    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=classes).state_dict()


def test_agrees_with_torchvisions_own_forward_pass(backbone):
    import torchvision
    from safetensors.torch import load_file

    net = torchvision.models.resnet18(num_classes=200)
    net.load_state_dict({k: v.float() for k, v in load_file(EMBEDDED).items()}, strict=False)
    x = network_input(backbone, pixels(3), (64, 64))
    with torch.inference_mode():
        expected = net.eval()(x)
        got = backbone.fc(backbone.adapted(backbone.frozen(x)[1]))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "wide_resnet50_2"])
def test_trunk_and_head_compute_what_torchvisions_layers_do(name):
    import torchvision

    torch.manual_seed(0)
    net = getattr(torchvision.models, name)(num_classes=3).eval()
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.1, 0.5)
    ours = Backbone(name, net.state_dict())
    net = net.to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        first = net.layer1(net.maxpool(net.relu(net.bn1(net.conv1(x)))))
        layer1, layer2 = ours.frozen(x)
        assert torch.equal(layer1, first) and torch.equal(layer2, net.layer2(first))
        layer3, layer4 = ours.adapted.maps(layer2)
        assert torch.equal(layer3, net.layer3(layer2)) and torch.equal(layer4, net.layer4(layer3))


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_torchvisions_by_name_shape_and_order(name):
    import torchvision

    with torch.device("meta"):
        ours, theirs = ResNet(name, 5).state_dict(), getattr(torchvision.models, name)(num_classes=5).state_dict()
    assert [(k, v.shape) for k, v in ours.items()] == [(k, v.shape) for k, v in theirs.items()]


def test_a_backbone_is_no_view_of_the_tensors_it_is_built_from():
    state = plain_state()
    net = Backbone("resnet18", state)
    before = net.fingerprint
    for tensor in state.values():
        tensor.fill_(9)
    assert fingerprint(net.tensors()) == before


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_local_files(tmp_path, suffix):
    state, file = plain_state(), tmp_path / f"mine{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    loaded = load_backbone("resnet18", str(file))
    assert loaded.fc.out_features == 7
    torch.testing.assert_close(loaded.adapted.state_dict()["layer4.1.conv2.weight"], state["layer4.1.conv2.weight"])


def test_published_weights_are_found_under_torch_home(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(plain_state(1000), tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth")
    by_enum, by_default = load_backbone("resnet18", "IMAGENET1K_V1"), load_backbone("resnet18")
    assert by_enum.fingerprint == by_default.fingerprint
    assert by_enum.fc.out_features == 1000


def test_published_weights_that_cannot_be_had(tmp_path, monkeypatch):
    import urllib.request

    def offline(*_args, **_kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", offline)
    with pytest.raises(UserError) as e:
        load_backbone("wide_resnet50_2")
    for word in ("wide_resnet50_2-", str(tmp_path), "TORCH_HOME", "efficientnet_lite0"):
        assert word in str(e.value)


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    (tmp_path / "text.pth").write_text("not a checkpoint")
    torch.save({"a": [1, {"b": object}]}, tmp_path / "pickle.pth")
    for name, weights in [
        ("resnet34", str(EMBEDDED)),
        ("resnet18", "IMAGENET22K"),
        ("resnet18", str(tmp_path / "none.pth")),
        ("resnet18", str(tmp_path / "text.pth")),
        ("resnet18", str(tmp_path / "pickle.pth")),
        ("embedded", "IMAGENET1K_V1"),
    ]:
        with pytest.raises(UserError, match="backbone.weights") as e:
            load_backbone(name, weights)
        assert "\n" not in str(e.value)


def test_tensors_rebuild_the_same_backbone(backbone):
    again = Backbone("resnet18", backbone.tensors())
    assert again.fingerprint == backbone.fingerprint
    assert again.fc is None


def test_preprocess_keeps_the_whole_image_and_normalizes(backbone):
    white = np.full((30, 60, 3), 255, np.uint8)
    out = preprocess(white, (32, 32), backbone.architecture)
    assert out.shape == (3, 32, 32) and out.dtype == np.float32
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    np.testing.assert_allclose(out, np.broadcast_to(((1 - mean) / std)[:, None, None], out.shape), rtol=1e-6)
    image = pixels(1)[0]
    expected = ((image / 255 - mean) / std).transpose(2, 0, 1)
    np.testing.assert_allclose(preprocess(image, image.shape[:2], backbone.architecture), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_lite0"])
@pytest.mark.parametrize("size", [(16, 20), (64, 48)])
def test_the_resize_is_that_of_pytorch(name, size):
    """Antialiased, bilinear and bicubic, smaller and larger: at most one gray level apart, and rarely."""
    entry = architecture(name)
    image = pixels(1)[0]
    x = torch.from_numpy(image).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(x, size=size, mode=entry.interpolation, antialias=True)[0]
    values = (resized / 255 - torch.tensor(entry.mean).view(3, 1, 1)) / torch.tensor(entry.std).view(3, 1, 1)
    away = np.abs(preprocess(image, size, entry) - values.numpy()) * np.array(entry.std)[:, None, None] * 255
    assert away.max() < 1.01 and (away > 0.5).mean() < 0.01
