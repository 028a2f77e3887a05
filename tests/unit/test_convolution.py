"""Convolutions over small maps against the library's, in float64 and as training uses them."""

import copy
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from panda_ad.adapt import convolution
from panda_ad.adapt.convolution import (
    POSITIONS,
    FilteredConvolution,
    UnrolledConvolution,
    filtering,
    fixed_batch_norm,
    small_convolutions,
)
from panda_ad.adapt.train import adapt
from panda_ad.features.backbones import load_backbone
from panda_ad.params import load_params


def values(*shape):
    """What bfloat16 holds exactly, so that only the results' rounding differs."""
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16().float().requires_grad_(True)
    )


def agree(function, x, weight, stride, padding, tolerance):
    """Result and both gradients within `tolerance` of float64's largest value."""
    exact = [t.detach().double().requires_grad_(True) for t in (x, weight)]
    expected = F.conv2d(*exact, None, stride, padding)
    toward = values(*expected.shape).detach()
    wanted = torch.autograd.grad(expected, exact, toward.double())
    y = function(x, weight)
    assert y.dtype == torch.float32 and y.shape == expected.shape
    for a, b in zip((y, *torch.autograd.grad(y, (x, weight), toward)), (expected, *wanted), strict=True):
        assert a.shape == b.shape and (a.double() - b).abs().max() <= tolerance * b.abs().max()


@settings(max_examples=40, deadline=None)
@given(h=st.integers(1, 14), w=st.integers(1, 14), c=st.integers(1, 9), out=st.integers(1, 9), b=st.integers(1, 4))
@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 2**-5)])
def test_minimal_filtering_is_convolution_over_maps_of_any_shape(precision, tolerance, h, w, c, out, b):
    agree(
        lambda x, kernel: FilteredConvolution.apply(x, kernel, precision, None),
        values(b, c, h, w),
        values(out, c, 3, 3),
        1,
        1,
        tolerance,
    )


@pytest.mark.parametrize("side", [2, 4])
def test_filters_are_kept_while_no_gradient_is_asked_for_and_the_weight_stays(side):
    x, layer = values(2, 4, side, side).detach(), torch.nn.Conv2d(4, 6, 3, padding=1, bias=False)
    with small_convolutions() as mode:
        assert layer(x).requires_grad and not mode._filters
        with torch.no_grad():
            first, again = layer(x), layer(x)
            assert len(mode._filters) == 1 and torch.equal(first, again)
            layer.weight.mul_(2)
            torch.testing.assert_close(layer(x), 2 * first)
            layer.load_state_dict({"weight": torch.ones(6, 4, 3, 3)})
            torch.testing.assert_close(layer(x), F.conv2d(x, torch.ones(6, 4, 3, 3), padding=1))
        version = layer.weight._version
        layer(x).square().sum().backward()
        torch.optim.SGD(layer.parameters(), lr=0.1, fused=True).step()
        assert layer.weight._version == version, "the fused step counts as a change by itself"
        with torch.no_grad():
            torch.testing.assert_close(
                layer(x), F.conv2d(x.double(), layer.weight.double(), padding=1).float(), rtol=1e-3, atol=1e-3
            )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), small_convolutions(torch.bfloat16):
        torch.testing.assert_close(layer(x), layer(x))


def test_bfloat16_filtering_errs_about_twice_as_much_as_the_direct_sum():
    for side in (2, 4, 8):
        x, weight = (
            torch.randn(*shape, generator=torch.Generator().manual_seed(side))
            for shape in ((8, 64, side, side), (64, 64, 3, 3))
        )
        exact = F.conv2d(x.double(), weight.double(), padding=1)
        direct = UnrolledConvolution.apply(x, weight, 1, 1, torch.bfloat16)
        filtered = FilteredConvolution.apply(x, weight, torch.bfloat16, None)
        errors = [float((y - exact).norm() / exact.norm()) for y in (direct, filtered)]
        assert 0 < errors[1] < 2.5 * errors[0], (side, errors)


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-6)])
@pytest.mark.parametrize(
    ("h", "w", "k", "stride", "padding"),
    [(2, 2, 3, 1, 1), (4, 4, 3, 2, 1), (5, 3, 3, 2, 1), (4, 4, 1, 2, 0), (3, 4, 5, 1, 2), (1, 1, 3, 1, 1)],
)
def test_unrolling_equals_the_librarys_convolution(h, w, k, stride, padding, precision, tolerance):
    agree(
        lambda x, kernel: UnrolledConvolution.apply(x, kernel, stride, padding, precision),
        values(3, 8, h, w),
        values(6, 8, k, k),
        stride,
        padding,
        tolerance,
    )


@pytest.mark.parametrize("outputs", [2, 4])
@pytest.mark.parametrize("n", range(1, 11))
def test_one_axis_by_hand(n, outputs):
    """y_i = w_0 x_(i-1) + w_1 x_i + w_2 x_(i+1), zeros outside; two positions take three products, one takes one."""
    a, g, b = (m.double() for m in filtering(n, outputs))
    rng = np.random.default_rng(n)
    x, w = torch.from_numpy(rng.normal(size=n)), torch.from_numpy(rng.normal(size=3))
    products = (g @ w)[:, None] * (b @ x)
    assert len(products) == {1: 1, 2: 3}.get(n, outputs + 2)
    expected = np.convolve(x, w.flip(0))[1:-1]
    np.testing.assert_allclose(torch.einsum("nmt,mt->n", a, products), expected, atol=1e-5)


def test_batch_norm_with_fixed_statistics():
    x, norm = values(3, 5, 4, 4), torch.nn.BatchNorm2d(5).eval()
    torch.manual_seed(0)
    for tensor in (norm.running_mean, norm.weight.data, norm.bias.data):
        tensor.normal_()
    norm.running_var.uniform_(0.5, 2)
    expected = norm(x)
    toward = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, (x, norm.weight, norm.bias), toward)
    found = fixed_batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(found, (x, norm.weight, norm.bias), toward), wanted, rtol=1e-4, atol=1e-4
    )


def test_only_small_plain_convolutions_are_taken(monkeypatch):
    taken = []
    for kind in (FilteredConvolution, UnrolledConvolution):
        monkeypatch.setattr(kind, "apply", lambda x, *rest, kind=kind: taken.append(kind.__name__) or x)

    def names(x, weight, stride=1, padding=1, dilation=1, groups=1, precision=torch.float32):
        taken.clear()
        o, c, k, _ = weight.shape
        layer = torch.nn.Conv2d(c * groups, o, k, stride, padding, dilation, groups, bias=False)
        with small_convolutions(precision):
            layer._conv_forward(x, weight, None)
        return taken.copy()

    side = int(POSITIONS**0.5)
    assert names(values(2, 4, side, side), values(4, 4, 3, 3)) == ["FilteredConvolution"]
    assert names(values(2, 4, 4, 4), values(4, 4, 3, 3), stride=2) == ["UnrolledConvolution"]
    assert names(values(2, 4, 4, 4), values(4, 4, 1, 1), padding=0) == ["UnrolledConvolution"]
    assert names(values(2, 4, 4, 4), values(4, 4, 3, 3), precision=torch.bfloat16) == ["FilteredConvolution"]
    assert names(values(2, 4, 4, 4).double(), values(4, 4, 3, 3).double()) == []
    assert names(values(2, 4, side + 1, side + 1), values(4, 4, 3, 3)) == []
    assert names(values(2, 4, 4, 4), values(4, 2, 3, 3), groups=2) == []
    assert names(values(2, 4, 4, 4), values(4, 4, 3, 3), padding=2, dilation=2) == []


@pytest.mark.parametrize(
    ("side", "precision", "tolerance"),
    [(8, torch.float32, 1e-4), (16, torch.float32, 1e-4), (7, torch.float32, 1e-4), (8, torch.bfloat16, 0.04)],
)
def test_the_heads_features_and_gradient_are_the_librarys(side, precision, tolerance):
    backbone = load_backbone("embedded")
    x = torch.rand(4, 128, side, side, generator=torch.Generator().manual_seed(0)).contiguous(
        memory_format=torch.channels_last
    )
    found = []
    for products in (False, True):
        head = copy.deepcopy(backbone.adapted).eval().requires_grad_(True)
        if products:
            with (
                torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16),
                small_convolutions(precision),
            ):
                features = head(x)
        else:
            features = head(x)
        features.float().square().sum().backward()
        found.append((features.detach().float(), torch.cat([p.grad.flatten() for p in head.parameters()])))
    for plain, ours in zip(*found, strict=True):
        assert 0 < (plain - ours).norm() < tolerance * plain.norm()


def test_training_goes_where_the_librarys_convolutions_go(monkeypatch, repo_root):
    """Twenty steps whose length hardly depends on rounding, each being clipped: the same weights to a few parts in a thousand of the way."""
    backbone = load_backbone("embedded")
    layer2 = torch.rand(40, 128, 8, 8, generator=torch.Generator().manual_seed(1)).half().numpy()
    params = load_params(repo_root / "params.yaml").adapt.model_copy(
        update={"method": "compactness", "epochs": 10, "learning_rate": 0.5}
    )
    ours = adapt(backbone, layer2, params, seed=0).snapshots[-1]
    monkeypatch.setattr(convolution, "small_convolutions", lambda precision: nullcontext())
    plain = adapt(backbone, layer2, params, seed=0).snapshots[-1]
    start = backbone.adapted.state_dict()
    moved = sum(float((plain[k] - start[k]).square().sum()) for k in plain) ** 0.5
    apart = sum(float((plain[k] - ours[k]).square().sum()) for k in plain) ** 0.5
    assert 0 < apart < 5e-3 * moved
