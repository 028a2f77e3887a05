# SPDX-License-Identifier: Apache-2.0
"""How hard the sample data is: image AUROC of kNN (k = 2, squared L2) on raw pixels and on pretrained features.

    python benchmarks/sample_difficulty.py [--data data] [--sizes 64 96 128 160]

Raw pixels must stay below 0.75 on average, so that the sample is no toy; pretrained features must clearly pass it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import rankdata

from panda_ad.features.backbones import load_backbone
from panda_ad.features.export import export_network
from panda_ad.features.network import Network

Images = list[NDArray[np.uint8]]
RAW_LIMIT = 0.75


def knn_scores(gallery: NDArray[np.float32], queries: NDArray[np.float32], k: int = 2) -> NDArray[np.float64]:
    """Sum of squared L2 distances to the k nearest of `gallery` (M, D), for `queries` (N, D) -> (N,)."""
    g, q = gallery.astype(np.float64), queries.astype(np.float64)
    distances = (q**2).sum(1)[:, None] - 2 * q @ g.T + (g**2).sum(1)[None]
    nearest: NDArray[np.float64] = np.partition(distances, k - 1, axis=1)[:, :k]
    return nearest.sum(axis=1)


def auroc(normal: NDArray[np.float64], defective: NDArray[np.float64]) -> float:
    """Share of (defective, normal) pairs in which the defective image scores higher; ties count half."""
    ranks = rankdata(np.concatenate([normal, defective]))
    n, m = len(normal), len(defective)
    return float((ranks[n:].sum() - m * (m + 1) / 2) / (n * m))


def pixels(images: Images, side: int) -> NDArray[np.float32]:
    """Raw pixels of the images resized to `side` x `side`, 0..1, (N, side * side * 3)."""
    resized = [
        np.asarray(Image.fromarray(rgb).resize((side, side), Image.Resampling.BOX), np.float32) for rgb in images
    ]
    return np.stack(resized).reshape(len(images), -1) / np.float32(255)


def features(images: Images, network: Network) -> NDArray[np.float32]:
    """Pooled features under the pretrained layers, (N, D)."""
    return network.features(network.activations(network.preprocess(images)))[0]


def read(folder: Path) -> Images:
    """Return the images of a folder, by name."""
    return [np.array(Image.open(path).convert("RGB")) for path in sorted(folder.iterdir())]


def evaluate(
    category: Path, methods: dict[str, Callable[[Images], NDArray[np.float32]]]
) -> dict[str, tuple[float, dict[str, float]]]:
    """AUROC over all defects, and per kind of defect, of each method."""
    train, good = read(category / "train" / "good"), read(category / "test" / "good")
    kinds = {p.name: read(p) for p in sorted((category / "test").iterdir()) if p.name != "good"}
    result = {}
    for name, embed in methods.items():
        gallery = embed(train)
        normal = knn_scores(gallery, embed(good))
        scores = {kind: knn_scores(gallery, embed(images)) for kind, images in kinds.items()}
        overall = auroc(normal, np.concatenate(list(scores.values())))
        result[name] = (overall, {kind: auroc(normal, s) for kind, s in scores.items()})
    return result


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description="Image AUROC of kNN on raw pixels and on pretrained features of the sample data."
    )
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96, 128, 160], help="network input sizes")
    options = parser.parse_args()
    backbone = load_backbone("embedded")
    methods: dict[str, Callable[[Images], NDArray[np.float32]]] = {}
    for side in (32, 64):
        methods[f"raw pixels {side}"] = partial(pixels, side=side)
    for side in options.sizes:
        methods[f"embedded {side}"] = partial(features, network=export_network(backbone, (side, side)))
    table = {p.name: evaluate(p, methods) for p in sorted(options.data.iterdir()) if p.is_dir()}
    print(f"{'image AUROC':16s}" + "".join(f"{c:>10s}" for c in table) + f"{'mean':>10s}")
    for name in methods:
        values = [table[c][name][0] for c in table]
        print(f"{name:16s}" + "".join(f"{v:10.3f}" for v in [*values, float(np.mean(values))]))
    for category, rows in table.items():
        print(f"\n{category}, by kind\n{'':16s}" + "".join(f"{kind:>16s}" for kind in next(iter(rows.values()))[1]))
        for name, (_, kinds) in rows.items():
            print(f"{name:16s}" + "".join(f"{v:16.3f}" for v in kinds.values()))
    raw = max(float(np.mean([table[c][f"raw pixels {side}"][0] for c in table])) for side in (32, 64))
    print(f"\nraw pixels reach {raw:.3f}, limit {RAW_LIMIT}")


if __name__ == "__main__":
    main()
