# SPDX-License-Identifier: Apache-2.0
"""A backbone with the adapted layers of each snapshot, as ONNX files.

Images become activations, activations become features and maps. `export.py` makes it from PyTorch's layers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from panda_ad.features.engine import Engine, Session, check_engine
from panda_ad.features.preprocessing import preprocess
from panda_ad.system.cores import side_by_side
from panda_ad.system.files import write_json

Activations = Mapping[str, np.ndarray]
"""Level name to float16 (N, C, h, w)."""

POOLED = "pooled"
"""Output of the adapted layers beside their levels."""
FACTS, FROZEN, ADAPTED = "network.json", "frozen.onnx", "adapted_{}.onnx"


@dataclass(frozen=True)
class NetworkFacts:
    """What is known of a network without running it: network.json.

    Attributes
    ----------
    name : of the architecture.
    fingerprint : of the pretrained weights.
    size : network input (height, width), pixels.
    interpolation, mean, std : see `preprocessing.InputRules`.
    frozen_levels : outputs of the frozen layers, from fine to coarse; the adapted layers read the last.
    adapted_levels : outputs of the adapted layers, from fine to coarse, beside the pooled features.
    map_levels : levels that a patch memory compares.
    engine : what computed the activations and features that a model was calibrated with.
    """

    name: str
    fingerprint: str
    size: tuple[int, int]
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    frozen_levels: tuple[str, ...]
    adapted_levels: tuple[str, ...]
    map_levels: tuple[str, ...]
    engine: Engine


@dataclass(frozen=True)
class Network:
    """What scoring needs of a network. All arrays are NumPy's; only this class knows how they are computed.

    Each image is computed alone; several are computed side by side.

    Attributes
    ----------
    facts : on it.
    frozen : the frozen layers, (1, 3, H, W) float32 -> float16 (1, C, h, w) per level.
    adapted : the adapted layers of each snapshot, last level -> pooled features (1, D) float32 and float16 levels.
    steps : training step of each snapshot; 0 is the pretrained one.
    """

    facts: NetworkFacts
    frozen: Session
    adapted: tuple[Session, ...]
    steps: tuple[int, ...]

    @property
    def size(self) -> tuple[int, int]:
        """Network input (height, width), pixels."""
        return self.facts.size

    @property
    def frozen_levels(self) -> tuple[str, ...]:
        """Levels of `activations`; the adapted layers read the last."""
        return self.facts.frozen_levels

    @property
    def inner_levels(self) -> tuple[str, ...]:
        """Levels before the pooled features, from fine to coarse: those that heat maps may compare."""
        return (*self.frozen_levels, *self.facts.adapted_levels[:-1])

    @property
    def map_levels(self) -> tuple[str, ...]:
        """Levels that a patch memory compares."""
        return self.facts.map_levels

    @property
    def key(self) -> str:
        """Return what the frozen activations and the pretrained features depend on, as hex."""
        about = {**asdict(self.facts), "frozen": hashlib.sha256(self.frozen.model).hexdigest()}
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

    def preprocess(self, images: Sequence[np.ndarray], size: tuple[int, int] | None = None) -> np.ndarray:
        """Resize and normalize images, uint8 (H, W, 3) of any size: float32 (N, 3, H, W), of `size` or the input's."""
        return np.stack(side_by_side(lambda image: preprocess(image, size or self.size, self.facts), images))

    def activations(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Return frozen activations of preprocessed images, float32 (N, 3, H, W), rounded to float16."""
        return _run(self.frozen, pixels, self.frozen_levels)

    def features(self, activations: Activations, pretrained: np.ndarray | None = None) -> list[np.ndarray]:
        """Return pooled features of N images under each snapshot, S arrays (N, D) float32.

        `pretrained` (N, D) are those under the pretrained layers, where they are known already.
        """
        values = activations[self.frozen_levels[-1]]
        return [
            pretrained if pretrained is not None and step == 0 else _run(layers, values, [POOLED])[POOLED]
            for layers, step in zip(self.adapted, self.steps, strict=True)
        ]

    def features_and_maps(
        self, activations: Activations, levels: Sequence[str], pretrained: np.ndarray | None = None
    ) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
        """Return `features`, and maps of some levels under the last snapshot, whose layers are run once for both."""
        wanted = [level for level in levels if level not in self.frozen_levels]
        if not wanted:
            return self.features(activations, pretrained), {level: activations[level] for level in levels}
        others = Network(self.facts, self.frozen, self.adapted[:-1], self.steps[:-1])
        found = _run(self.adapted[-1], activations[self.frozen_levels[-1]], [POOLED, *wanted])
        features = [*others.features(activations, pretrained), found[POOLED]]
        known = {**activations, **found}
        return features, {level: known[level] for level in levels}

    def maps(self, activations: Activations, levels: Sequence[str]) -> dict[str, np.ndarray]:
        """Return maps of some levels under the last snapshot, float16 (N, C, h, w) each."""
        wanted = [level for level in levels if level not in self.frozen_levels]
        known = dict(activations)
        if wanted:
            known |= _run(self.adapted[-1], activations[self.frozen_levels[-1]], wanted)
        return {level: known[level] for level in levels}

    def save(self, folder: Path) -> None:
        """Write network.json, frozen.onnx and adapted_<s>.onnx into an existing folder."""
        write_json(folder / FACTS, asdict(self.facts) | {"steps": self.steps})
        (folder / FROZEN).write_bytes(self.frozen.model)
        for s, layers in enumerate(self.adapted):
            (folder / ADAPTED.format(s)).write_bytes(layers.model)


def load_network(folder: Path) -> Network:
    """Read what `Network.save` wrote.

    Raises
    ------
    UserError
        The engine or precision is not here, or a file is no network that it can run.
    OSError, LookupError, TypeError, ValueError
        A file is missing or damaged.
    """
    about = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    check_engine(about["engine"], str(folder))
    steps = tuple(about.pop("steps"))
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in about.items()}
    values["engine"] = Engine(**about["engine"])
    facts = NetworkFacts(**values)
    names = [FROZEN, *(ADAPTED.format(s) for s in range(len(steps)))]
    sessions = [Session((folder / name).read_bytes(), str(folder / name)) for name in names]
    return Network(facts, sessions[0], tuple(sessions[1:]), steps)


def _run(layers: Session, values: np.ndarray, outputs: Sequence[str]) -> dict[str, np.ndarray]:
    """Return outputs by name of layers for N inputs (N, ...), each computed alone."""
    found = side_by_side(lambda i: layers(values[i : i + 1], outputs), range(len(values)))
    return {name: np.concatenate(parts) for name, parts in zip(outputs, zip(*found, strict=True), strict=True)}
