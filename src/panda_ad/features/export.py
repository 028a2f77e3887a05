# SPDX-License-Identifier: Apache-2.0
"""From PyTorch's layers to the ONNX files that scoring runs. Nothing else makes a `Network`."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from panda_ad.features.backbones import AdaptedLayers, Backbone, FrozenLayers, with_state
from panda_ad.features.engine import Session, engine_for
from panda_ad.features.network import POOLED, Network, NetworkFacts

_OPSET = 18  # of ONNX (2023): the newest that PyTorch's tracing exporter was written for
_LIMIT = torch.finfo(torch.float16).max


class _Frozen(nn.Module):
    """The frozen layers, rounded to float16, the form in which activations are cached."""

    def __init__(self, layers: FrozenLayers):
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(_half(level) for level in self.layers(x))


class _Adapted(nn.Module):
    """The adapted layers: pooled features in float32, then the levels in float16."""

    def __init__(self, layers: AdaptedLayers):
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x.float()
        maps = self.layers.maps(x)
        return (self.layers.pool(x, maps), *map(_half, maps))


def export_network(backbone: Backbone, size: tuple[int, int], precision: str = "fp32") -> Network:
    """Return a backbone with its pretrained layers as a network of an input size (height, width), pixels.

    UserError where no engine computes in that precision.
    """
    entry = backbone.architecture
    facts = NetworkFacts(
        name=backbone.name,
        fingerprint=backbone.fingerprint,
        size=size,
        interpolation=entry.interpolation,
        mean=entry.mean,
        std=entry.std,
        frozen_levels=backbone.frozen.levels,
        adapted_levels=backbone.adapted.levels,
        map_levels=entry.map_levels,
        engine=engine_for(precision),
    )
    x = torch.zeros(1, 3, *size)
    frozen = Session(_onnx(_Frozen(backbone.frozen), x, facts.frozen_levels), "frozen layers")
    adapted = Session(_adapted(backbone.adapted, _example(facts, frozen)), "adapted layers")
    return Network(facts, frozen, (adapted,), (0,))


def with_snapshots(
    pretrained: Network, layers: AdaptedLayers, states: Sequence[Mapping[str, Tensor]], steps: Sequence[int]
) -> Network:
    """Return a network with the adapted layers of each of some steps.

    Parameters
    ----------
    pretrained : as `export_network` returns it.
    layers : its pretrained adapted layers.
    states : state dicts of the steps after 0, in order.
    """
    x, rest = _example(pretrained.facts, pretrained.frozen), iter(states)
    sessions = [
        pretrained.adapted[0]
        if step == 0
        else Session(_adapted(with_state(layers, next(rest)), x), f"adapted layers of step {step}")
        for step in steps
    ]
    return replace(pretrained, adapted=tuple(sessions), steps=tuple(steps))


def _half(x: Tensor) -> Tensor:
    return x.clamp(-_LIMIT, _LIMIT).half()


def _example(facts: NetworkFacts, frozen: Session) -> Tensor:
    """Return an input of the adapted layers, float16 (1, C, h, w)."""
    (last,) = frozen(torch.zeros(1, 3, *facts.size).numpy(), facts.frozen_levels[-1:])
    return torch.from_numpy(last)


def _adapted(layers: AdaptedLayers, x: Tensor) -> bytes:
    return _onnx(_Adapted(layers), x, [POOLED, *layers.levels])


def _onnx(module: nn.Module, x: Tensor, outputs: Sequence[str]) -> bytes:
    """Return a module as an ONNX file's bytes; `x` is an example of its input.

    The tracing exporter takes 0.2 s of processor time and gives the same bytes for the same weights. The newer one
    (`dynamo=True`) takes 1.2 to 5 s, in each stage again, for networks that compute the same.
    """
    with tempfile.TemporaryDirectory(prefix="panda-ad-onnx-") as folder, warnings.catch_warnings():
        file = Path(folder) / "layers.onnx"
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(), (x,), file, dynamo=False, opset_version=_OPSET, input_names=["x"], output_names=list(outputs)
        )
        return file.read_bytes()
