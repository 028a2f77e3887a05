# SPDX-License-Identifier: Apache-2.0
"""What scoring costs: one image to its verdict, and `panda-ad score` of many, beside the bare network.

python benchmarks/scoring_speed.py BUNDLE IMAGES [--count 1000]

IMAGES is a folder; its files are taken again until there are `--count`. Figures are processor time; the wall
time of the command stands beside it.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from panda_ad.data.images import read_image
from panda_ad.data.listing import image_files
from panda_ad.scoring.bundle import load_bundle

_ROUNDS = 30


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    args = parser.parse_args()
    detector = load_bundle(args.bundle)
    network, files = detector.network, image_files([args.images])
    image = read_image(files[0])
    x = network.preprocess([image])
    calls: dict[str, Callable[[], object]] = {
        "bare network, all snapshots": lambda: network.features(network.activations(x)),
        "decode": lambda: read_image(files[0]),
        "resize and normalize": lambda: network.preprocess([image]),
        "decoded image to verdict": lambda: detector.score([image]),
        "decoded image to verdict with heat map": lambda: detector.score([image], heatmaps=True),
    }
    print(f"{network.facts.name}, input {network.size}, image {image.shape[:2]}, {len(network.steps)} snapshots")
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            times[name].append(time.thread_time() - start)
    for name, values in times.items():
        print(f"{name}: {statistics.median(values) * 1e3:.1f} ms of processor")
    with tempfile.TemporaryDirectory() as folder:
        many = Path(folder) / "many"
        many.mkdir()
        for i in range(args.count):
            os.symlink(files[i % len(files)].resolve(), many / f"{i:05}{files[i % len(files)].suffix}")
        command = [sys.executable, "-m", "panda_ad.cli", "score", str(many), "--bundle", str(args.bundle)]
        for what, options in (("", []), (" with overlays", ["--heatmaps", f"{folder}/overlays"])):
            before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
            subprocess.run([*command, "--out", f"{folder}/out.csv", *options], check=True, stderr=subprocess.DEVNULL)
            after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
            cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            print(
                f"panda-ad score of {args.count}{what}: {cpu / args.count * 1e3:.1f} ms of processor an image, "
                f"{args.count / wall:.1f} images/s, peak {after.ru_maxrss / 1024:.0f} MB"
            )


if __name__ == "__main__":
    main()
