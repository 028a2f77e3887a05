# SPDX-License-Identifier: Apache-2.0
"""What stages share: the backbone, the activation cache, and access to images by manifest row."""

from __future__ import annotations

import functools
import json
import os
from typing import TYPE_CHECKING

import numpy as np

from panda_ad.errors import UserError
from panda_ad.system.paths import CACHE, FEATURES
from panda_ad.system.processes import keep_freed_memory

if TYPE_CHECKING:
    import pandas as pd

    from panda_ad.features.backbones import Backbone
    from panda_ad.features.cache import Activations, Item
    from panda_ad.features.images import CachedImages
    from panda_ad.params import Params

BACKBONE = "backbone.json"  # beside features: the weights' fingerprint, and the precision they were computed in


def backbone_for(params: Params) -> Backbone:
    """Return the backbone that the parameters name."""
    from panda_ad.features.backbones import load_backbone

    return load_backbone(params.backbone.name, params.backbone.weights)


def activations_for(params: Params, backbone: Backbone, category: str | None = None) -> Activations:
    """Return the activation cache of a backbone at the parameters' input size.

    It has the parameters' precision or, given a category, that of the category's features: `auto` may mean another
    precision where `extract` ran, and a model's parts must be of one. UserError if the features are of other weights:
    DVC sees a weights file's name, not what it holds.
    """
    from panda_ad.features.backbones import resolve_precision
    from panda_ad.features.cache import Activations

    precision = params.backbone.precision
    if category is not None:
        made = json.loads((FEATURES / category / BACKBONE).read_text())
        check_weights(made["fingerprint"], backbone, f"{FEATURES / category}", "extract")
        precision = made["precision"]
    gray = params.data.gray_range  # another range makes other pictures of the same files
    root = CACHE / ("activations" if gray is None else f"activations-gray-{gray[0]}-{gray[1]}")
    return Activations(backbone, params.backbone.size, resolve_precision(precision), root, params.backbone.cache_gb)


def check_weights(fingerprint: str, backbone: Backbone, what: str, stage: str) -> None:
    """UserError unless `what` was made with the backbone's weights."""
    if fingerprint != backbone.fingerprint:
        raise UserError(
            f"{what} was made with other weights than backbone.weights holds now; "
            f"run `dvc repro --force --single-item {stage}`, then `dvc repro`"
        )


def items_of(rows: pd.DataFrame, params: Params) -> list[Item]:
    """Return manifest rows as images of the activation cache."""
    from panda_ad.data.images import Decoding, read_image
    from panda_ad.data.layouts import image_root
    from panda_ad.features.cache import Item

    root, decoding = image_root(params), Decoding.of(params.data)
    return [
        Item(sha256, functools.partial(read_image, f"{root}/{path}", sha256, decoding))
        for sha256, path in zip(rows["sha256"], rows["path"], strict=True)
    ]


def category_rows(category: str) -> dict[str, pd.DataFrame]:
    """Return a category's manifest rows by split: train, calibration, test.

    Their index is the row in the category's pretrained.npy.
    """
    from panda_ad.data.manifest import load_manifest

    rows = load_manifest(FEATURES / category / "rows.csv")
    return {split: rows[rows["split"] == split] for split in ("train", "calibration", "test")}


def pretrained_features(category: str) -> np.ndarray:
    """Unadapted pooled features of a category's images, float32 (N, D), memory-mapped, in the order of its rows."""
    return np.load(FEATURES / category / "pretrained.npy", mmap_mode="r")


def levels_needed(params: Params, backbone: Backbone) -> tuple[str, ...]:
    """Levels of the frozen layers that training and scoring read: SPADE compares all, a patch memory some."""
    levels, entry = backbone.frozen.levels, backbone.architecture
    compared = {"spade": levels, "patch_memory": entry.map_levels}.get(params.localize.method, ())
    return tuple(level for level in levels if level in compared or level == levels[-1])


def cached_images(activations: Activations, rows: pd.DataFrame, params: Params, category: str) -> CachedImages:
    """Manifest rows of a category as images that fitting and scoring read from the activation cache."""
    from panda_ad.features.images import CachedImages

    features = pretrained_features(category)[rows.index]
    return CachedImages(activations, items_of(rows, params), rows["path"].tolist(), features)


def threads() -> None:
    """Make results bit-equal for equal inputs: a fixed number of threads per machine, deterministic kernels.

    Freed memory is kept, too; see `keep_freed_memory`.
    """
    import torch

    keep_freed_memory()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    torch.set_deterministic_debug_mode("error")
