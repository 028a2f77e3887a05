# SPDX-License-Identifier: Apache-2.0
"""Pretrained feature extractors (paper, section 3.1), split where PANDA splits them.

The *frozen layers* stay as they are, the *adapted layers* are fine-tuned.
`architectures.py` says where a network is divided, `pretrained.py` has its weights.
"""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from panda_ad.errors import UserError
from panda_ad.features.architectures import TIMM, Architecture, architecture
from panda_ad.features.pretrained import EMBEDDED, is_file, published, state_of_file

__all__ = ["EMBEDDED", "AdaptedLayers", "Backbone", "FrozenLayers", "fingerprint", "load_backbone", "with_state"]

_EMBEDDED_NAME = "resnet18"


class _Layers(nn.Module):
    """Modules run one after another.

    Attributes
    ----------
    levels : names of those whose outputs are looked at, in order; the last module is one of them.
    """

    def __init__(self, modules: Mapping[str, nn.Module], levels: tuple[str, ...]):
        super().__init__()
        self.levels = levels
        for name, module in modules.items():
            self.add_module(name, module)

    def _outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        outputs = []
        for name, module in self.named_children():
            x = module(x)
            if name in self.levels:
                outputs.append(x)
        return tuple(outputs)


class FrozenLayers(_Layers):
    """The layers that stay as pretrained."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map (B, 3, H, W) float32, normalized, to (B, C, h, w) for each level; the adapted layers read the last."""
        return self._outputs(x)


class AdaptedLayers(_Layers):
    """The layers that PANDA adapts.

    Attributes
    ----------
    feature_levels : levels whose means are the pooled features.
        A name that is not in `levels` is the input, the last frozen level.
    """

    def __init__(self, modules: Mapping[str, nn.Module], levels: tuple[str, ...], feature_levels: tuple[str, ...]):
        super().__init__(modules, levels)
        self.feature_levels = feature_levels

    def maps(self, x: Tensor) -> tuple[Tensor, ...]:
        """Map the last level of the frozen layers (B, C, h, w) to (B, C', h', w') for each level."""
        return self._outputs(x)

    def pool(self, x: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Map the input (B, C, h, w) and what `maps` makes of it to pooled features (B, D)."""
        by_level = dict(zip(self.levels, maps, strict=True))
        means = [by_level.get(level, x).mean(dim=(2, 3)) for level in self.feature_levels]
        return means[0] if len(means) == 1 else torch.cat(means, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map the last level of the frozen layers (B, C, h, w) to pooled features (B, D)."""
        return self.pool(x, self.maps(x))


class Backbone(nn.Module):
    """A network as frozen layers, adapted layers and classifier, in eval mode, all parameters frozen.

    Attributes
    ----------
    name : of its architecture.
    architecture : what is known of that.
    classifier : the pretrained classifier, last adapted level (B, C, h, w) -> (B, classes).
        None where the weights hold none. Only the Fisher estimate uses it.
    fingerprint : sha256 over every tensor but the classifier's, hex.
        Equal weights have equal fingerprints whatever file they came from.
    """

    def __init__(self, name: str, state: Mapping[str, Tensor]):
        """Build from a state dict (any float dtype).

        Raises
        ------
        ValueError
            The state dict does not fit `name`.
        UserError
            There is no network of that name.
        """
        super().__init__()
        self.name, self.architecture = name, architecture(name)
        state = {
            k: v.to(torch.float32, copy=True)
            for k, v in self.architecture.rename(dict(state)).items()
            if not _counts(k)
        }
        net, classified = _network(self.architecture, state)
        frozen, adapted, classifier = _divided(net, self.architecture)
        self.frozen = FrozenLayers(frozen, self.architecture.frozen_levels)
        self.adapted = AdaptedLayers(adapted, self.architecture.adapted_levels, self.architecture.feature_levels)
        self.classifier = nn.Sequential(OrderedDict(classifier)) if classified else None
        self.fingerprint = fingerprint({k: v for k, v in state.items() if k.partition(".")[0] not in classifier})
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    @property
    def fc(self) -> nn.Linear | None:
        """The classifier's last layer."""
        if self.classifier is None:
            return None
        last = self.classifier[-1]
        assert isinstance(last, nn.Linear)
        return last

    def tensors(self) -> dict[str, Tensor]:
        """Return the network's state dict without the classifier, contiguous float32: what a bundle stores."""
        parts = {**self.frozen.state_dict(), **self.adapted.state_dict()}
        return {k: v.contiguous() for k, v in parts.items() if not _counts(k)}


def _counts(key: str) -> bool:
    """Return whether a tensor is batch norm's count of training steps, which nothing reads."""
    return key.endswith("num_batches_tracked")


def _divided(net: nn.Sequential, entry: Architecture) -> tuple[dict[str, nn.Module], ...]:
    """Return modules of the frozen layers, of the adapted layers, and of the classifier, by name."""
    modules = dict(net.named_children())
    names = list(modules)
    cut, end = (names.index(levels[-1]) + 1 for levels in (entry.frozen_levels, entry.adapted_levels))
    return tuple({name: modules[name] for name in part} for part in (names[:cut], names[cut:end], names[end:]))


def _network(entry: Architecture, state: Mapping[str, Tensor]) -> tuple[nn.Sequential, bool]:
    """Return the network with the weights of `state`, and whether `state` has the classifier's.

    Raises ValueError where they do not fit.
    """
    classes = state["fc.weight"].shape[0] if "fc.weight" in state else 0
    with torch.device("meta"):
        net = entry.build(classes or 1)
    classifier = _divided(net, entry)[2]
    counters = {k for k in net.state_dict() if _counts(k)}
    expected = {k for k in net.state_dict().keys() - counters if classes or k.partition(".")[0] not in classifier}
    if set(state) != expected:
        missing = sorted(expected - set(state))
        odd = missing or sorted(set(state) - expected)
        raise ValueError(f"not the weights of a {entry.name}: {odd[0]} is {'missing' if missing else 'unexpected'}")
    try:
        net.load_state_dict({**state, **{k: torch.tensor(0) for k in counters}}, strict=False, assign=True)
    except RuntimeError as e:
        raise ValueError(f"not the weights of a {entry.name}: {str(e).splitlines()[1].strip()}") from None
    return net, bool(classes)


def fingerprint(state: dict[str, Tensor]) -> str:
    """Return the sha256 (hex) over names, shapes and float32 values of the tensors."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().float().contiguous()
        digest.update(f"{key}{tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def load_backbone(name: str, weights: str = "DEFAULT") -> Backbone:
    """Load a backbone by parameters `backbone.name` and `backbone.weights`.

    Parameters
    ----------
    name : `embedded`, a name of `architectures.ARCHITECTURES`, or `timm/<name>`.
    weights : `DEFAULT`, a name of torchvision's weight enum (`IMAGENET1K_V1`, ...), or a path.
        The path ends in `.safetensors`, `.pth` or `.pt`.

    Raises
    ------
    UserError
        Unknown name; weights cannot be had or do not fit. Names the file expected and the alternatives.
    """
    known = architecture(_EMBEDDED_NAME if name == "embedded" else name).name
    if not is_file(weights):
        return Backbone(known, published(name, weights))
    try:
        state = state_of_file(Path(weights))
        if known.startswith(TIMM):
            from panda_ad.features.timm_networks import timm_state

            state = timm_state(known, state)
        return Backbone(known, state)
    except (ValueError, RuntimeError) as e:
        raise UserError(f"backbone.weights: {weights} cannot be used: {' '.join(str(e).split())[:200]}") from None


def with_state(adapted: AdaptedLayers, state: Mapping[str, Tensor]) -> AdaptedLayers:
    """Return a copy of the adapted layers with other weights."""
    other = copy.deepcopy(adapted)
    other.load_state_dict(dict(state), strict=False)
    return other
