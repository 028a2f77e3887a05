# SPDX-License-Identifier: Apache-2.0
"""Networks of timm by name, as sequences of modules.

timm: Wightman, https://github.com/huggingface/pytorch-image-models, Apache-2.0.
Its feature extractors know which modules run in which order and at which stride.
Networks that are no such sequence (transformers, networks with several branches) are refused.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from typing import Any

import timm
import torch
from torch import nn

from panda_ad.errors import UserError
from panda_ad.features.architectures import TIMM, Architecture, State


@functools.lru_cache(maxsize=4)
def timm_architecture(name: str) -> Architecture:
    """Return the entry of `timm/<name>`: frozen up to a stride of 8, adapted beyond.

    Raises
    ------
    UserError
        timm has no network of that name, or one that cannot be divided.
    """
    short = name.removeprefix(TIMM)
    if not timm.is_model(short):
        close = ", ".join(timm.list_models(f"*{short[:8]}*")[:5])
        raise UserError(f"backbone.name: timm has no network {short!r}" + (f"; it has {close}, ..." if close else ""))
    with torch.device("meta"):
        net: Any = timm.create_model(short, features_only=True)
    names, strides = net.feature_info.module_name(), net.feature_info.reduction()
    levels = {module.replace(".", "_"): stride for module, stride in zip(names, strides, strict=True)}
    frozen = tuple(level for level, stride in levels.items() if 4 <= stride <= 8)
    adapted = tuple(level for level, stride in levels.items() if stride > 8)
    if not (frozen and adapted and levels.keys() <= _in_order(net).keys() and _is_sequence(short)):
        raise UserError(
            f"backbone.name: {name} is no sequence of convolutional layers that can be divided at stride 8; "
            "take a ResNet, an EfficientNet, a MobileNet, a RegNet or a ConvNeXt"
        )
    facts: Any = timm.get_pretrained_cfg(short)
    return Architecture(
        name=name,
        source=f"https://huggingface.co/{facts.hf_hub_id}"
        if facts.hf_hub_id
        else (facts.url or "no published weights"),
        licence=facts.license or "not stated",
        build=lambda _classes: nn.Sequential(_in_order(timm.create_model(short, features_only=True))),
        frozen_levels=frozen,
        adapted_levels=adapted,
        feature_levels=adapted[-1:],
        map_levels=(frozen[-1], adapted[0]),
        mean=facts.mean,
        std=facts.std,
        interpolation="bicubic" if facts.interpolation == "bicubic" else "bilinear",
        input_size=facts.input_size[1],
    )


def timm_state(name: str, state: State | None) -> State:
    """Return the weights of `timm/<name>` under its modules' names.

    Parameters
    ----------
    state : a whole network's, as timm publishes it; None: timm's own, from its cache or the hub it downloads from.

    Raises
    ------
    ValueError
        `state` is not that of this network.
    Exception
        Whatever timm and the hub's client raise where weights cannot be had.
    """
    short = name.removeprefix(TIMM)
    overlay: dict[str, Any] | None = None if state is None else {"state_dict": state}
    net = timm.create_model(short, features_only=True, pretrained=True, pretrained_cfg_overlay=overlay)
    if state is not None:  # timm loads what it finds and says nothing of the rest
        given = {_flat(key) for key in state}
        missing = [
            key for key in net.state_dict() if _flat(key) not in given and not key.endswith("num_batches_tracked")
        ]
        if missing:
            raise ValueError(f"not the weights of {name}: {missing[0]} is missing")
    return nn.Sequential(_in_order(net)).state_dict()


def _flat(key: str) -> str:
    """Return a parameter's name alike in a network (`stages.0.conv`) and its feature extractor (`stages_0.conv`)."""
    return key.replace(".", "_")


def _in_order(net: nn.Module) -> OrderedDict[str, nn.Module]:
    """Return the modules of one of timm's feature extractors by the names of its levels, in the order they run in."""
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for name, module in net.named_children():
        if name == "blocks" and isinstance(module, nn.Sequential):  # EfficientNets and MobileNets
            modules |= {f"{name}_{i}": block for i, block in module.named_children()}
        else:
            modules[name] = module
    return modules


@torch.inference_mode()
def _is_sequence(short: str) -> bool:
    """Return whether the modules, run in order, give the levels that the extractor gives, as (1, C, h, w)."""
    net: Any = timm.create_model(short, features_only=True).eval()
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    names = {module.replace(".", "_") for module in net.feature_info.module_name()}
    found = []
    try:
        expected, y = net(x.clone()), x.clone()
        for name, module in _in_order(net).items():
            y = module(y)
            if name in names:
                found.append(y)
    except (RuntimeError, AssertionError, TypeError, AttributeError):
        return False
    channels = net.feature_info.channels()
    return len(found) == len(expected) and all(
        torch.equal(a, b) and a.ndim == 4 and a.shape[1] == c for a, b, c in zip(found, expected, channels, strict=True)
    )
