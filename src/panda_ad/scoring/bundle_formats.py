# SPDX-License-Identifier: Apache-2.0
"""Earlier layouts of a bundle, brought to today's names at load. Nothing else knows them.

1  features score; no whitening, no localizer with tiles.
2  `whiten`.
3  tiles.
4  `score`, `scales`, usual.safetensors.
5  today's names: pixel_statistics.safetensors, snapshots in weights.safetensors; one format, whatever the model uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

FORMAT = 5
"""Version of the bundle's layout that is written; a bundle of a newer one is refused."""


_SPADE_LEVELS = ["layer1", "layer2", "layer3"]


def upgrade_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of bundle.json as format `FORMAT` has it."""
    new = {
        "whiten": False,
        "score": "features",
        "dataset": "",
        "method": "none",
        "provenance": {},
        "scales": [],
        **config,
    }
    new.pop("scorer", None)  # said by whether there is a classifier
    new["scales"] = [{"center": s.get("center", s.get("centre")), "spread": s["spread"]} for s in new["scales"]]
    return new


def upgrade_localizer(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of localizer.json as format `FORMAT` has it."""
    new = {
        "tiles": 1,
        "levels": ["layer2", "layer3"] if config["method"] == "patch_memory" else _SPADE_LEVELS,
        **config,
    }
    if "neighbours" in new:
        new["neighbors"] = new.pop("neighbours")
    return new


def tensor_name(name: str) -> str:
    """Return today's name of a tensor in weights.safetensors."""
    return "snapshots." + name.removeprefix("heads.") if name.startswith("heads.") else name


def pixel_statistics_file(folder: Path) -> Path:
    """Return the file that holds the pixel statistics."""
    old = folder / "usual.safetensors"
    return old if old.exists() else folder / "pixel_statistics.safetensors"
