# SPDX-License-Identifier: Apache-2.0
"""Stage `extract`: frozen activations of every image into the cache, and their pretrained features into build/features.

Each category has a folder there. It holds rows.csv, its part of the manifest; pretrained.npy, float32 (N, D), a row of
features per row of it; and backbone.json, what they were computed with. There is one folder each, so that new images
of one category leave the others' models alone.
"""

from __future__ import annotations

import numpy as np

from panda_ad.data.manifest import load_manifest, write_manifest
from panda_ad.params import load_params
from panda_ad.stages.common import BACKBONE, activations_for, backbone_for, items_of, levels_needed, threads
from panda_ad.system.files import atomic_folder, write_json
from panda_ad.system.paths import FEATURES, MANIFEST
from panda_ad.system.stage import run_stage


def main() -> None:
    """Compute what the cache does not hold yet, then the features."""
    import torch
    from tqdm import tqdm

    params = load_params()
    threads()
    rows = load_manifest(MANIFEST)
    distinct = rows.drop_duplicates("sha256").reset_index(drop=True)
    items = items_of(distinct, params)
    backbone = backbone_for(params)
    activations = activations_for(params, backbone)
    computed = activations.warm(items, levels_needed(params, backbone), label="extract")
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
            facts = {
                "fingerprint": backbone.fingerprint,
                "precision": "bf16" if activations.precision == torch.bfloat16 else "fp32",
            }
            write_json(folder / str(category) / BACKBONE, facts)
            np.save(folder / str(category) / "pretrained.npy", every[[position[key] for key in part["sha256"]]])
        (folder / "every.npy").unlink()
    print(f"{len(items)} images, {computed} of them new to the activation cache")


if __name__ == "__main__":
    run_stage("extract", main)
