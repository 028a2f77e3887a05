# SPDX-License-Identifier: Apache-2.0
"""The Fisher diagonal: closed form, labels, files."""

import copy
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from panda_ad.adapt import fisher as fisher_module
from panda_ad.adapt.fisher import (
    SOURCE_CLASSES,
    cached_fisher,
    estimate_fisher,
    load_fisher,
    save_fisher,
    source_labels,
)
from panda_ad.errors import UserError
from panda_ad.features.backbones import Backbone, load_backbone
from panda_ad.features.resnet import ResNet


class TwoParameters(nn.Module):
    """theta * x for a pair x = (x1, x2), as adapted layers on 'activations' (B, 2, 1, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([0.4, -0.7]))

    def maps(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (x * self.theta[:, None, None],)


class Logistic:
    """p(y = 1 | x) = sigmoid(theta . x), as a backbone: adapted layers (theta * x), classifier (logits 0 and the sum)."""

    fingerprint = "logistic"

    def __init__(self) -> None:
        self.adapted, linear = TwoParameters(), nn.Linear(2, 2)
        self.classifier = nn.Sequential(nn.Flatten(), linear)
        with torch.no_grad():
            linear.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
            linear.bias.zero_()


@pytest.fixture(scope="module")
def points() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 1, (4000, 2, 1, 1)).astype(np.float16)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone("embedded")


@pytest.fixture(scope="module")
def layer2() -> np.ndarray:
    return np.abs(np.random.default_rng(0).normal(0, 1, (5, 128, 4, 4))).astype(np.float16)


def test_two_parameter_model_with_labels(points):
    """d log p(y | x) / d theta_i = (y - p) x_i, so F_i = mean (y - p)^2 x_i^2, exactly."""
    x = points[:200, :, 0, 0].astype(np.float64)
    y = np.random.default_rng(1).integers(0, 2, 200)
    p = 1 / (1 + np.exp(-(x @ [0.4, -0.7])))
    expected = (((y - p)[:, None] * x) ** 2).mean(axis=0)
    found = estimate_fisher(Logistic(), points[:200], y, samples=200, seed=0)
    np.testing.assert_allclose(found["theta"].numpy(), expected, rtol=1e-5)


def test_two_parameter_model_without_labels(points):
    """With y drawn from p the expectation is F_i = mean p (1 - p) x_i^2, the textbook Fisher information of logistic regression."""
    x = points[:, :, 0, 0].astype(np.float64)
    p = 1 / (1 + np.exp(-(x @ [0.4, -0.7])))
    expected = ((p * (1 - p))[:, None] * x**2).mean(axis=0)
    found = estimate_fisher(Logistic(), points, samples=4000, seed=0)
    np.testing.assert_allclose(found["theta"].numpy(), expected, rtol=0.08)


def test_it_is_no_squared_mean_gradient(backbone, layer2):
    """The embedded head against per-image autograd with the same labels; the mean gradient squared would be smaller."""
    labels = np.array([3, 7, 3, 190, 0])
    found = estimate_fisher(backbone, layer2, labels, samples=99, seed=0)
    head = copy.deepcopy(backbone.adapted).requires_grad_(True)
    name, parameter = "layer4.1.conv2.weight", head.layer4[1].conv2.weight
    each = []
    for row, label in zip(layer2, labels, strict=True):
        loss = nn.functional.cross_entropy(
            backbone.fc(head(torch.from_numpy(row[None]).float())), torch.tensor([label])
        )
        each.append(torch.autograd.grad(loss, parameter)[0])
    torch.testing.assert_close(found[name], torch.stack(each).square().mean(dim=0), rtol=1e-3, atol=1e-7)
    assert float(torch.stack(each).mean(dim=0).square().sum()) < 0.9 * float(found[name].sum())
    assert set(found) == {n for n, _ in backbone.adapted.named_parameters()}


def test_samples_limit_and_seed(backbone, layer2):
    a, b, c = (estimate_fisher(backbone, layer2, samples=2, seed=s) for s in (0, 0, 1))
    key = "layer4.1.bn2.weight"
    assert torch.equal(a[key], b[key]) and not torch.equal(a[key], c[key])


def test_weights_without_classifier(backbone, layer2):
    bare = Backbone("resnet18", backbone.tensors())
    with pytest.raises(UserError, match="no classifier"):
        estimate_fisher(bare, layer2, samples=2, seed=0)


def test_cache_is_keyed_by_content(backbone, layer2, tmp_path, monkeypatch):
    first = cached_fisher(tmp_path, backbone, layer2, samples=3, seed=0)
    (file,) = tmp_path.iterdir()

    def fail(*args, **options):
        raise AssertionError("estimated again")

    with monkeypatch.context() as patch:
        patch.setattr(fisher_module, "estimate_fisher", fail)
        again = cached_fisher(tmp_path, backbone, layer2.copy(), samples=3, seed=0)
    assert all(torch.equal(v, again[k]) for k, v in first.items())
    changed = layer2.copy()
    changed[:, 0, 0, 0] += 1
    for other in (
        (changed, None, 3, 0),
        (layer2, np.zeros(5, int), 3, 0),
        (layer2, None, 2, 0),
        (layer2, None, 3, 1),
    ):
        before = len(list(tmp_path.iterdir()))
        cached_fisher(tmp_path, backbone, other[0], other[1], samples=other[2], seed=other[3])
        assert len(list(tmp_path.iterdir())) == before + 1
    file.write_bytes(b"cut")
    assert torch.equal(
        cached_fisher(tmp_path, backbone, layer2, samples=3, seed=0)["layer3.0.bn1.bias"], first["layer3.0.bn1.bias"]
    )


@pytest.fixture(scope="module")
def whole(backbone) -> OrderedDict:
    """A Fisher value for every parameter of the network, in torchvision's order."""
    torch.manual_seed(0)
    named = [
        *backbone.frozen.named_parameters(),
        *backbone.adapted.named_parameters(),
        ("fc.weight", backbone.fc.weight),
        ("fc.bias", backbone.fc.bias),
    ]
    return OrderedDict((name, torch.rand(p.shape)) for name, p in named)


@pytest.mark.parametrize("form", ["mapping", "module", "list", "list without fc", "head", "safetensors"])
def test_files(backbone, whole, tmp_path, form):
    """The authors' file is a torch-saved mapping over the whole network's parameter names."""
    head = {k: v for k, v in whole.items() if k.startswith(("layer3", "layer4"))}
    content = {"mapping": whole, "module": {f"module.{k}": v for k, v in whole.items()}, "list": list(whole.values())}
    content |= {"list without fc": list(whole.values())[:-2], "head": list(head.values())}
    path = tmp_path / ("fisher.safetensors" if form == "safetensors" else "fisher_diagonal.pth")
    if form == "safetensors":
        save_fisher(path, head)
    else:
        torch.save(content[form], path)
    loaded = load_fisher(path, backbone)
    assert list(loaded) == list(head)
    assert all(torch.equal(v, head[k]) for k, v in loaded.items())


def test_resnet152_parameter_names():
    """The authors' file is for ResNet-152: its names are those of our adapted layers."""
    import torchvision.models.resnet as resnets

    with torch.device("meta"):
        net = resnets.resnet152()
        ours = ResNet("resnet152", 1000)
    shapes = {k: v.shape for k, v in net.named_parameters() if k.startswith(("layer3", "layer4"))}
    assert {k: v.shape for k, v in ours.named_parameters() if k.startswith(("layer3", "layer4"))} == shapes


def test_unusable_files(backbone, whole, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_fisher(tmp_path / "absent.pth", backbone)
    (tmp_path / "bad.pth").write_bytes(b"nothing")
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    torch.save([torch.ones(3)], tmp_path / "short.pth")
    torch.save({k: v for k, v in whole.items() if k != "layer3.0.conv1.weight"}, tmp_path / "missing.pth")
    torch.save({**whole, "layer3.0.conv1.weight": torch.ones(2)}, tmp_path / "shape.pth")
    torch.save({"code": fisher_module.estimate_fisher}, tmp_path / "code.pth")
    expected = {
        "bad.pth": "bad.pth",
        "bad.safetensors": "cannot be read",
        "tensor.pth": "mapping",
        "short.pth": "holds 1 tensors",
    }
    expected |= {
        "missing.pth": r"layer3\.0\.conv1\.weight is missing",
        "shape.pth": "another backbone",
        "code.pth": "not a file of plain tensors",
    }
    for name, message in expected.items():
        with pytest.raises(UserError, match=message) as caught:
            load_fisher(tmp_path / name, backbone)
        assert "\n" not in str(caught.value)


def test_source_labels():
    def outputs(n):
        return SimpleNamespace(fc=nn.Linear(1, n))

    known = SOURCE_CLASSES.read_text().split()
    assert len(known) == 200
    np.testing.assert_array_equal(
        source_labels([known[5], known[0], known[5]], outputs(200), "folder"), [5, 0, 5]
    )  # some suffice
    np.testing.assert_array_equal(source_labels(["b", "a", "c"], outputs(3), "folder"), [1, 0, 2])
    with pytest.raises(UserError, match="folder has 2 class folders, .* 1000 classes"):
        source_labels(["a", "b"], outputs(1000), "folder")
    with pytest.raises(UserError, match="no classifier to compare labels with"):
        source_labels(["a"], SimpleNamespace(fc=None), "folder")
