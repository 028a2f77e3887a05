"""Unrolled convolutions against the library's in float32."""

import copy

import pytest
import torch
import torch.nn.functional as F

from panda_ad.adapt.convolution import POSITIONS, UnrolledConvolution, small_convolutions
from panda_ad.backbones import load_backbone


def values(*shape):
    """What bfloat16 holds exactly, so that only the results' rounding differs."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16().float().requires_grad_(True)


@pytest.mark.parametrize(("h", "w", "k", "stride", "padding"), [(2, 2, 3, 1, 1), (4, 4, 3, 2, 1), (5, 3, 3, 2, 1), (4, 4, 1, 2, 0), (3, 4, 5, 1, 2), (1, 1, 3, 1, 1)])
def test_equals_the_librarys_convolution_and_its_gradients(h, w, k, stride, padding):
    x, weight = values(3, 8, h, w), values(6, 8, k, k)
    expected = F.conv2d(x, weight, None, stride, padding)
    toward = values(*expected.shape).detach()
    wanted = torch.autograd.grad(expected, (x, weight), toward)
    y = UnrolledConvolution.apply(x, weight, stride, padding)
    assert y.dtype == torch.bfloat16 and y.shape == expected.shape
    found = torch.autograd.grad(y, (x, weight), toward.bfloat16())
    for a, b in zip((y.float(), *found), (expected, *wanted), strict=True):
        # bfloat16 keeps 8 bits; sums over k k taps are rounded once each
        assert a.shape == b.shape and (a.float() - b).abs().max() <= 2**-6 * b.abs().max()


def test_only_small_plain_convolutions_are_taken():
    def taken(x, weight, **options):
        with small_convolutions():
            return torch.nn.Conv2d._conv_forward(layer(weight, **options), x, weight, None).dtype == torch.bfloat16

    def layer(weight, stride=1, padding=1, dilation=1, groups=1):
        o, c, k, _ = weight.shape
        return torch.nn.Conv2d(c * groups, o, k, stride, padding, dilation, groups, bias=False)

    side = int(POSITIONS**0.5)
    assert taken(values(2, 4, side, side), values(4, 4, 3, 3))
    assert not taken(values(2, 4, side + 1, side + 1), values(4, 4, 3, 3))
    assert not taken(values(2, 4, 4, 4), values(4, 2, 3, 3), groups=2)
    assert not taken(values(2, 4, 4, 4), values(4, 4, 3, 3), padding=2, dilation=2)


def test_the_heads_gradient_is_that_of_bfloat16_training():
    backbone = load_backbone("embedded")
    x = torch.rand(4, 128, 8, 8, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)
    gradients = []
    for unrolled in (False, True):
        head = copy.deepcopy(backbone.head).eval().requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16):
            if unrolled:
                with small_convolutions():
                    features = head(x)
            else:
                features = head(x)
        features.float().square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in head.parameters()]))
    assert 0 < (gradients[0] - gradients[1]).norm() < 0.01 * gradients[0].norm()
