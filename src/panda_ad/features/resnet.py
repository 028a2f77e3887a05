# SPDX-License-Identifier: Apache-2.0
"""ResNets (He et al., CVPR 2016) and Wide-ResNets (Zagoruyko and Komodakis, BMVC 2016).

Modules and parameters have torchvision's names, and torchvision's classes compute the same.
Importing them, though, imports PyTorch's compiler, which takes as long as PyTorch itself, at every stage and command.
The stride of a bottleneck is that of its 3x3 convolution, as in torchvision ('ResNet v1.5').
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

_LAYOUTS = {  # blocks per layer, and the inner width of the first layer's bottlenecks (None: basic blocks)
    "resnet18": ((2, 2, 2, 2), None),
    "resnet34": ((3, 4, 6, 3), None),
    "resnet50": ((3, 4, 6, 3), 64),
    "resnet101": ((3, 4, 23, 3), 64),
    "resnet152": ((3, 8, 36, 3), 64),
    "wide_resnet50_2": ((3, 4, 6, 3), 128),
    "wide_resnet101_2": ((3, 4, 23, 3), 128),
}
NAMES = tuple(_LAYOUTS)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def _downsample(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    """Return what brings a block's input to the shape of its output; None where it has that shape."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside the identity: (B, inputs, h, w) -> (B, outputs, h / stride, w / stride)."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = _conv(outputs, outputs, 3), nn.BatchNorm2d(outputs)
        self.downsample = _downsample(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, h, w) to (B, outputs, h / stride, w / stride)."""
        out = self.bn1(self.conv1(x)).relu_()
        out = self.bn2(self.conv2(out))
        out += x if self.downsample is None else self.downsample(x)
        return out.relu_()


class Bottleneck(nn.Module):
    """A 1x1 convolution to `width` channels, a 3x3 one, a 1x1 one to `outputs`, beside the identity.

    Shapes are those of BasicBlock.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, width: int):
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, width, 1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = _conv(width, width, 3, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = _conv(width, outputs, 1), nn.BatchNorm2d(outputs)
        self.downsample = _downsample(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, inputs, h, w) to (B, outputs, h / stride, w / stride)."""
        out = self.bn1(self.conv1(x)).relu_()
        out = self.bn2(self.conv2(out)).relu_()
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return out.relu_()


class ResNet(nn.Sequential):
    """The network in order, by torchvision's names: conv1, bn1, relu, maxpool, layer1 to layer4, avgpool, flatten, fc.

    Parameters
    ----------
    name : one of NAMES. KeyError for another.
    classes : outputs of the classifier `fc`.
    """

    def __init__(self, name: str, classes: int):
        super().__init__()
        counts, bottleneck = _LAYOUTS[name]
        layers: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
            bn1=nn.BatchNorm2d(64),
            relu=nn.ReLU(),
            maxpool=nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
        )
        channels = 64
        for layer, count in enumerate(counts):
            outputs = (64 if bottleneck is None else 256) << layer
            blocks: list[nn.Module] = []
            for i in range(count):
                shape = (channels, outputs, 2 if layer and not i else 1)
                blocks.append(
                    BasicBlock(*shape) if bottleneck is None else Bottleneck(*shape, width=bottleneck << layer)
                )
                channels = outputs
            layers[f"layer{layer + 1}"] = nn.Sequential(*blocks)
        layers |= {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(channels, classes)}
        super().__init__(layers)
