# SPDX-License-Identifier: Apache-2.0
"""Exact nearest-neighbor search of patches against other library calls: `python -m benchmarks.search`.

Three searches in float32, in one process, in turn, repeated: ours (blocked matrix products, the winner's distance
computed again), `faiss.knn`, and PyTorch's matrix products. Features are those of the embedded ResNet-18 at the
sizes that users have, on random images (blurred noise) or on those of a folder. Processor milliseconds an image,
medians; on a busy machine ratios say more.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import faiss
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.localization import features, random_images
from panda_ad.features.architectures import ARCHITECTURES
from panda_ad.features.preprocessing import preprocess
from panda_ad.scoring.localize.maps import local_means, positions
from panda_ad.scoring.localize.search import nearest, pack

BLOCK = 4096  # gallery rows of one matrix product
PART = 8192  # gallery rows that SPADE reads at a time


def ours(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Distances (P,) as heat maps use them."""
    return nearest(queries, [pack(rows[i : i + PART]) for i in range(0, len(rows), PART)])


def faiss_search(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Distances (P,) by `faiss.knn`, k = 1: an IndexFlatL2 without building one."""
    distances, _ = faiss.knn(queries.astype(np.float32), rows.astype(np.float32), 1)
    return np.asarray(np.sqrt(np.maximum(distances[:, 0], 0)))


def torch_search(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Distances (P,) by |q|^2 - 2 q g + |g|^2, a block of gallery rows at a time, in PyTorch."""
    asked = torch.from_numpy(queries).float()
    best = torch.full((len(asked),), torch.inf)
    for i in range(0, len(rows), BLOCK):
        part = torch.from_numpy(rows[i : i + BLOCK]).float()
        product = torch.addmm(part.square().sum(1)[None], asked, part.T, alpha=-2)
        best = torch.minimum(best, product.amin(1))
    return np.asarray((best + asked.square().sum(1)).clamp_(min=0).sqrt_())


def cases(images: Tensor) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return queries (P, C) of the first image and gallery rows (N, C) of the others, float16, by name."""
    found: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for name, values in features(images)[0].items():
        means = [positions(local_means(image)) for image in values]
        rows = np.random.default_rng(0).permutation(np.concatenate(means[1:]))
        found |= {f"patch memory, {name}, {n:,} rows": (means[0], rows[:n]) for n in (1_000, 10_000)}
        found[f"SPADE, 50 images, {name}"] = (positions(values[0]), np.concatenate([positions(v) for v in values[1:]]))
    return found


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=224, help="input size, pixels")
    parser.add_argument("--images", type=Path, help="a folder of at least 51 images; default: random ones")
    parser.add_argument("--repeats", type=int, default=5, help="times each search is timed, in turn")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    images = random_images(0, 51, args.size)
    if args.images:
        files = sorted(file for file in args.images.iterdir() if file.is_file())[:51]
        pixels = [np.array(Image.open(file).convert("RGB")) for file in files]
        images = torch.stack(
            [torch.from_numpy(preprocess(rgb, (args.size, args.size), ARCHITECTURES["resnet18"])) for rgb in pixels]
        )
    searches = {"ours": ours, "faiss": faiss_search, "PyTorch": torch_search}
    print(f"{args.size} px, {args.threads} thread(s), processor ms an image, medians of {args.repeats} in turn\n")
    print(f"{'search':<36}{'queries':>8}{'rows':>9}{'dims':>6}" + "".join(f"{name:>10}" for name in searches))
    for name, (queries, rows) in cases(images).items():
        calls = [partial(search, queries, rows) for search in searches.values()]
        expected = calls[0]()
        for call in calls[1:]:
            np.testing.assert_allclose(call(), expected, rtol=1e-3, atol=2e-2)
        times: list[list[float]] = [[] for _ in calls]
        for _ in range(args.repeats):
            for call, seconds in zip(calls, times, strict=True):
                start = time.process_time()
                call()
                seconds.append(time.process_time() - start)
        columns = "".join(f"{1e3 * statistics.median(seconds):>10.1f}" for seconds in times)
        print(f"{name:<36}{len(queries):>8}{len(rows):>9}{queries.shape[1]:>6}{columns}", flush=True)


if __name__ == "__main__":
    main()
