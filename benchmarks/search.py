# SPDX-License-Identifier: Apache-2.0
"""Exact nearest-neighbor search of patches against other library calls: `python -m benchmarks.search`.

Three searches in float32, in one process, in turn, repeated: ours (`faiss.knn` for candidates, whose distances are
computed again), `faiss.knn` alone, and a blocked matrix product. Features are those of the embedded ResNet-18 at the
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
from panda_ad.scoring.localize.maps import positions
from panda_ad.scoring.localize.patch_memory import patch_features
from panda_ad.scoring.localize.search import nearest, pack

BLOCK = 4096  # gallery rows of one matrix product


def ours(queries: Tensor, rows: Tensor) -> Tensor:
    """Distances (P,) as heat maps use them."""
    return nearest(queries, [pack(rows)])


def faiss_search(queries: Tensor, rows: Tensor) -> Tensor:
    """Distances (P,) by `faiss.knn`, k = 1: an IndexFlatL2 without building one."""
    distances, _ = faiss.knn(queries.float().numpy(), rows.float().numpy(), 1)
    return torch.from_numpy(distances[:, 0]).clamp_(min=0).sqrt_()


def blocked_search(queries: Tensor, rows: Tensor) -> Tensor:
    """Distances (P,) by |q|^2 - 2 q g + |g|^2, a block of gallery rows at a time."""
    queries = queries.float()
    best = torch.full((len(queries),), torch.inf)
    for i in range(0, len(rows), BLOCK):
        part = rows[i : i + BLOCK].float()
        product = torch.addmm(part.square().sum(1)[None], queries, part.T, alpha=-2)
        best = torch.minimum(best, product.amin(1))
    return (best + queries.square().sum(1)).clamp_(min=0).sqrt_()


def cases(images: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return queries (P, C) of the first image and gallery rows (N, C) of the others, by name."""
    levels = {name: torch.from_numpy(values) for name, values in features(images)[0].items()}
    patches = positions(patch_features({name: levels[name] for name in ("layer2", "layer3")}))
    rows = patches[1:].flatten(0, 1)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    found = {f"patch memory, {n:,} rows": (patches[0], rows[:n]) for n in (2_000, 10_000, 20_000)}
    for name, values in levels.items():
        found[f"SPADE, 50 images, {name}"] = (positions(values)[0], positions(values[1:]).flatten(0, 1))
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
    searches = {"ours": ours, "faiss": faiss_search, "blocked": blocked_search}
    print(f"{args.size} px, {args.threads} thread(s), processor ms an image, medians of {args.repeats} in turn\n")
    print(f"{'search':<28}{'queries':>8}{'rows':>9}{'dims':>6}" + "".join(f"{name:>10}" for name in searches))
    for name, (queries, rows) in cases(images).items():
        calls = [partial(search, queries, rows) for search in searches.values()]
        expected = calls[0]()
        for call in calls[1:]:
            torch.testing.assert_close(call(), expected, rtol=1e-3, atol=2e-2)
        times: list[list[float]] = [[] for _ in calls]
        for _ in range(args.repeats):
            for call, seconds in zip(calls, times, strict=True):
                start = time.process_time()
                call()
                seconds.append(time.process_time() - start)
        columns = "".join(f"{1e3 * statistics.median(seconds):>10.0f}" for seconds in times)
        print(f"{name:<28}{len(queries):>8}{len(rows):>9}{queries.shape[1]:>6}{columns}", flush=True)


if __name__ == "__main__":
    main()
