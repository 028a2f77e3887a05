# SPDX-License-Identifier: Apache-2.0
"""Time per image and peak memory of both localizers against the plain implementation.

    python benchmarks/localization.py

ResNet-18 at 224 px, 300 gallery images, K = 50, a patch memory of 2,000 patches a level, random images (blurred noise,
seeded). Each method runs in a process of its own, so that its peak memory is its own. Plain: float32, pairwise
differences by broadcasting, in chunks of gallery rows that fit in memory, a sample of positions timed and scaled up.
Times leave out the backbone.
CPU ms is the processor time of all threads: on a busy machine it says more than the time on the clock, and with
OMP_NUM_THREADS=1 it is close to what the clock shows on an idle one.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from panda_ad.features.backbones import load_backbone
from panda_ad.features.export import export_network
from panda_ad.params import LocalizeParams
from panda_ad.scoring.localize.localizer import build_localizer, load_localizer
from panda_ad.scoring.localize.maps import local_means, positions
from panda_ad.scoring.localize.patch_memory import PatchMemory
from panda_ad.scoring.localize.search import nearest, pack
from panda_ad.scoring.localize.spade import Spade

LEVELS = {"spade": ("layer1", "layer2", "layer3"), "patch_memory": ("layer2", "layer3")}
SAMPLE = 48  # positions per layer timed in the plain implementation


def random_images(seed: int, count: int, size: int) -> Tensor:
    """float32 (count, 3, size, size): noise of a coarse and a fine scale, roughly normalized as photographs are."""
    noise = np.random.default_rng(seed).normal(size=(count, 3, size, size)).astype(np.float32)
    coarse, fine = (ndimage.gaussian_filter(noise, (0, 0, s, s)) * s for s in (8, 1.5))
    return torch.from_numpy(coarse * 3 + fine)


def features(images: Tensor) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Levels (float16) and pooled features of preprocessed images."""
    network = export_network(load_backbone("embedded"), (images.shape[2], images.shape[3]))
    features, levels = network.features_and_maps(network.activations(images.numpy()), LEVELS["spade"])
    return levels, features[0]


def build(folder: Path, count: int, size: int) -> None:
    """Build and save both localizers, the gallery's activations on disk as in the pipeline."""
    arrays: dict[str, np.ndarray] = {}
    pooled = np.empty((count, 512), np.float32)
    for i in range(0, count, 20):
        maps, pooled[i : i + 20] = features(random_images(1000 + i, min(20, count - i), size))
        for name, value in maps.items():
            if name not in arrays:
                arrays[name] = np.lib.format.open_memmap(
                    folder / f"{name}.npy", "w+", np.float16, (count, *value.shape[1:])
                )
            arrays[name][i : i + len(value)] = value
    for method in ("spade", "patch_memory"):
        start = time.perf_counter()
        params = LocalizeParams(method=method, neighbors=50, memory_limit=2000, sigma=4.0, tiles=None)
        localizer = build_localizer(
            params, LEVELS[method], lambda i: {k: np.array(v[i]) for k, v in arrays.items()}, pooled, 0
        )
        (folder / method).mkdir()
        localizer.save(folder / method)
        print(f"built {method} in {time.perf_counter() - start:.1f} s", file=sys.stderr)


def plain_distance(queries: Tensor, rows: Tensor) -> Tensor:
    """Return distances (P,) of queries (P, C) to rows (N, C) in the obvious way, by broadcasting.

    As many gallery rows are taken at a time as make 1 GB.
    """
    step = max(1, 2**28 // (len(queries) * queries.shape[1]))
    best = torch.full((len(queries),), torch.inf)
    for i in range(0, len(rows), step):
        best = torch.minimum(best, (queries[:, None] - rows[None, i : i + step]).square().sum(2).amin(1))
    return best.sqrt()


def measure(folder: Path, method: str, plain: bool, repeats: int, size: int) -> dict[str, float]:
    """Measure one method in this process.

    Return seconds per image and processor seconds per image (medians) and peak memory in MB; for plain also the largest
    relative difference.
    """
    localizer = load_localizer(folder / method)
    maps, pooled = features(random_images(0, 2, size))
    if not plain:
        localizer.heatmaps(maps, pooled, (size, size))
        times, cpu = [], []
        for i in range(repeats):
            one = {name: value[i % 2 : i % 2 + 1] for name, value in maps.items()}
            start, busy = time.perf_counter(), time.process_time()
            localizer.heatmaps(one, pooled[i % 2 : i % 2 + 1], (size, size))
            times.append(time.perf_counter() - start)
            cpu.append(time.process_time() - busy)
        return {"seconds": float(np.median(times)), "cpu": float(np.median(cpu)), "peak": peak()}
    seconds, cpu_seconds, difference = 0.0, 0.0, 0.0
    for queries, rows, ours in searches(localizer, maps, pooled):
        chosen = torch.linspace(0, len(queries) - 1, min(SAMPLE, len(queries))).long()
        start, busy = time.perf_counter(), time.process_time()
        expected = plain_distance(*(torch.from_numpy(x).float() for x in (queries[chosen.numpy()], rows))).numpy()
        seconds += (time.perf_counter() - start) * len(queries) / len(chosen)
        cpu_seconds += (time.process_time() - busy) * len(queries) / len(chosen)
        difference = max(difference, float((np.abs(ours[chosen.numpy()] - expected) / expected).max()))
    return {"seconds": seconds, "cpu": cpu_seconds, "peak": peak(), "difference": difference}


Search = tuple[np.ndarray, np.ndarray, np.ndarray]


def searches(localizer, maps: dict[str, np.ndarray], pooled: np.ndarray) -> list[Search]:
    """Return (queries, gallery rows, our distances) of each search that the first image needs."""
    if isinstance(localizer, PatchMemory):
        asked = [(positions(local_means(maps[name][0])), m.values) for name, m in localizer.memories.items()]
        return [(queries, rows, nearest(queries, [pack(rows)])) for queries, rows in asked]
    assert isinstance(localizer, Spade)
    chosen = localizer.nearest_images(pooled[0])
    out = []
    for level in localizer.levels:
        queries = positions(maps[level][0])
        rows = np.concatenate(localizer.values[level][chosen])
        out.append((queries, rows, nearest(queries, [pack(rows)])))
    return out


def peak() -> float:
    """Largest resident memory of this process so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Run each measurement in its own process and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gallery", type=int, default=300, help="gallery images")
    parser.add_argument("--size", type=int, default=224, help="input size, pixels")
    parser.add_argument("--repeats", type=int, default=20, help="images timed")
    parser.add_argument("--step", nargs=3, metavar=("FOLDER", "METHOD", "WHAT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        folder, method, what = args.step
        if what == "build":
            build(Path(folder), args.gallery, args.size)
        else:
            print(json.dumps(measure(Path(folder), method, what == "plain", args.repeats, args.size)))
        return

    def step(*words: str) -> str:
        sizes = [f"--{name}={getattr(args, name)}" for name in ("gallery", "size", "repeats")]
        return subprocess.run(
            [sys.executable, __file__, *sizes, "--step", *words], check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    with tempfile.TemporaryDirectory() as folder:
        step(folder, "both", "build")
        print(f"{args.gallery} gallery images at {args.size} px, {torch.get_num_threads()} threads\n")
        head = (
            "ms/image",
            "CPU ms",
            "peak MB",
            "plain ms",
            "CPU ms",
            "plain MB",
            "faster",
            "(CPU)",
            "largest difference",
        )
        print(f"{'method':<13}" + "".join(f"{name:>10}" for name in head))
        for method in ("spade", "patch_memory"):
            ours, plain = (json.loads(step(folder, method, what)) for what in ("ours", "plain"))
            times = [1e3 * run[name] for run in (ours, plain) for name in ("seconds", "cpu")]
            print(
                f"{method:<13}{times[0]:>10.0f}{times[1]:>10.0f}{ours['peak']:>10.0f}"
                f"{times[2]:>10.0f}{times[3]:>10.0f}{plain['peak']:>10.0f}"
                f"{times[2] / times[0]:>9.0f}x{times[3] / times[1]:>9.0f}x{plain['difference']:>14.1e} of the distance"
            )


if __name__ == "__main__":
    main()
