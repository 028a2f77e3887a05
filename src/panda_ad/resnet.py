"""ResNets (He et al., arXiv 1512.03385, with the stride in the 3x3 convolution) and Wide ResNets (arXiv 1605.07146), as torchvision has them.

Same modules, names and order of operations as torchvision.models.resnet, so its weights fit and give the same bits. They are written out
because importing torchvision takes each process longer than all the other imports together: it brings PyTorch's compiler with it.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class _Shape(NamedTuple):
    """bottleneck: three convolutions a block, not two; blocks of each layer; width of a bottleneck's inner convolutions, 64 is 1."""

    bottleneck: bool
    blocks: tuple[int, int, int, int]
    base_width: int = 64


SHAPES = {
    "resnet18": _Shape(False, (2, 2, 2, 2)),
    "resnet34": _Shape(False, (3, 4, 6, 3)),
    "resnet50": _Shape(True, (3, 4, 6, 3)),
    "resnet101": _Shape(True, (3, 4, 23, 3)),
    "resnet152": _Shape(True, (3, 8, 36, 3)),
    "wide_resnet50_2": _Shape(True, (3, 4, 6, 3), 128),
    "wide_resnet101_2": _Shape(True, (3, 4, 23, 3), 128),
}


class Block(nn.Module):
    """A residual block: two 3x3 convolutions, or 1x1, 3x3, 1x1 (bottleneck)."""

    def __init__(self, bottleneck: bool, inputs: int, width: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False) if bottleneck else _conv3x3(inputs, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width, stride if bottleneck else 1)
        self.bn2 = nn.BatchNorm2d(width)
        if bottleneck:
            self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(outputs)
        self.bottleneck = bottleneck
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H / stride, W / stride)."""
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        if self.bottleneck:
            y = self.bn3(self.conv3(self.relu(y)))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


def _conv3x3(inputs: int, outputs: int, stride: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class ResNet(nn.Module):
    """The parts of a network by one of the names in SHAPES; `classes` is the classifier's number of outputs."""

    def __init__(self, name: str, classes: int):
        super().__init__()
        shape = SHAPES[name]
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        layers = []
        for number, blocks in enumerate(shape.blocks):
            planes = 64 << number
            width, outputs = (planes * shape.base_width // 64, planes * 4) if shape.bottleneck else (planes, planes)
            layer = nn.Sequential()
            for block in range(blocks):
                layer.append(Block(shape.bottleneck, inputs, width, outputs, 2 if block == 0 and number > 0 else 1))
                inputs = outputs
            layers.append(layer)
        self.layer1, self.layer2, self.layer3, self.layer4 = layers
        self.fc = nn.Linear(inputs, classes)
