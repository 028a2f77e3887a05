# SPDX-License-Identifier: Apache-2.0
"""Stage `extract`: frozen activations of every image into the cache, and their pretrained features into build/features.

Each category has a folder there. It holds rows.csv, its part of the manifest, and pretrained.npy, float32 (N, D), a row
of features per row of it. There is one folder each, so that new images of one category leave the others' models alone.
build/network is the pretrained network as ONNX files, which computes them here and in all stages that follow.
"""

from __future__ import annotations

import numpy as np

from panda_ad.data.manifest import load_manifest, write_manifest
from panda_ad.params_file import load_params
from panda_ad.stages.common import activations_for, backbone_for, items_of, levels_needed
from panda_ad.system.files import atomic_folder
from panda_ad.system.paths import FEATURES, MANIFEST, NETWORK
from panda_ad.system.processes import keep_freed_memory
from panda_ad.system.stage import run_stage


def main() -> None:
    """Compute what the cache does not hold yet, then the features."""
    from tqdm import tqdm

    from panda_ad.features.export import export_network

    params = load_params()
    keep_freed_memory()
    rows = load_manifest(MANIFEST)
    distinct = rows.drop_duplicates("sha256").reset_index(drop=True)
    items = items_of(distinct, params)
    network = export_network(backbone_for(params), params.backbone.size, params.backbone.precision)
    with atomic_folder(NETWORK) as folder:
        network.save(folder)
    activations = activations_for(params, network)
    computed = activations.warm(items, levels_needed(params, network), label="extract")
    with atomic_folder(FEATURES) as folder:
        (width,) = activations.features.shape
        every = np.lib.format.open_memmap(folder / "every.npy", mode="w+", dtype=np.float32, shape=(len(items), width))
        done = 0
        with tqdm(total=len(items), desc="features", unit="img") as bar:
            for pooled in activations.pooled(items):
                every[done : done + len(pooled)] = pooled
                done += len(pooled)
                bar.update(len(pooled))
        position = dict(zip(distinct["sha256"], range(len(distinct)), strict=True))
        for category, part in rows.groupby("category"):
            (folder / str(category)).mkdir()
            write_manifest(part, folder / str(category) / "rows.csv")
            np.save(folder / str(category) / "pretrained.npy", every[[position[key] for key in part["sha256"]]])
        (folder / "every.npy").unlink()
    print(f"{len(items)} images, {computed} of them new to the activation cache")


if __name__ == "__main__":
    run_stage("extract", main)
