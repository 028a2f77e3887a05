# SPDX-License-Identifier: Apache-2.0
"""What stages share: the backbone, the activation cache, and access to images by manifest row."""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

import numpy as np

from panda_ad.errors import UserError
from panda_ad.system.paths import CACHE, FEATURES, NETWORK
from panda_ad.system.processes import keep_freed_memory

if TYPE_CHECKING:
    import pandas as pd

    from panda_ad.features.backbones import Backbone
    from panda_ad.features.cache import Activations, Item
    from panda_ad.features.images import CachedImages
    from panda_ad.features.network import Network
    from panda_ad.params import Params


def backbone_for(params: Params) -> Backbone:
    """Return the backbone that the parameters name."""
    from panda_ad.features.backbones import load_backbone

    return load_backbone(params.backbone.name, params.backbone.weights)


def network_for() -> Network:
    """Return the pretrained network that stage `extract` has left. UserError where it has not."""
    from panda_ad.features.network import load_network

    try:
        return load_network(NETWORK)
    except (OSError, LookupError, TypeError, ValueError) as e:
        raise UserError(f"{NETWORK}: missing or damaged ({type(e).__name__}); run `dvc repro`") from None


def activations_for(params: Params, network: Network) -> Activations:
    """Return the activation cache of a network."""
    from panda_ad.features.cache import Activations

    gray = params.data.gray_range  # another range makes other pictures of the same files
    root = CACHE / ("activations" if gray is None else f"activations-gray-{gray[0]}-{gray[1]}")
    return Activations(network, root, params.backbone.cache_gb)


def check_weights(fingerprint: str, expected: str, what: str, stage: str) -> None:
    """UserError unless the weights that `what` was made with are those expected.

    DVC sees a weights file's name, not what it holds.
    """
    if fingerprint != expected:
        raise UserError(
            f"{what} was made with other weights than are in use now; "
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


def levels_needed(params: Params, network: Network) -> tuple[str, ...]:
    """Levels of the frozen layers that training and scoring read: SPADE compares all, a patch memory some."""
    levels = network.frozen_levels
    compared = {"spade": levels, "patch_memory": network.map_levels}.get(params.localize.method, ())
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
