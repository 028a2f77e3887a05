# SPDX-License-Identifier: Apache-2.0
"""What 1 % new images cost: seconds of validate and extract for a whole set, and after `panda-ad ingest` of 1 % more.

    python benchmarks/ingest_cost.py [--images 5000] [--share 0.01] [--input-size 224]

In a temporary DVC project with this repository's dvc.yaml and params.yaml, one category, empty caches. The images are
templates of the sample's fabric, shifted, with noise of their own, at the sample's 160 pixels: as distinct as the real
generator's, but made in milliseconds. Wall-clock times mean something only while the machine does nothing else;
processor times are printed beside them.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from panda_ad.system.processes import child_environment

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from make_sample import image_rng, normal_image  # noqa: E402

SIDE = 160


def pictures(count: int, first: int = 0) -> list[np.ndarray]:
    """`count` distinct uint8 (SIDE, SIDE, 3), numbers `first`, ... of one endless row."""
    templates = [
        np.asarray(Image.fromarray(normal_image("fabric", image_rng(1, "fabric", "cost", i))).resize((SIDE, SIDE)))
        for i in range(16)
    ]
    found = []
    for number in range(first, first + count):
        rng = np.random.default_rng([11, number])
        shifted = np.roll(templates[number % len(templates)], tuple(rng.integers(0, SIDE, 2)), (0, 1))
        found.append(np.clip(shifted + rng.normal(0, 6, (SIDE, SIDE, 1)), 0, 255).astype(np.uint8))
    return found


def write(images: list[np.ndarray], folder: Path) -> None:
    """As JPEG files, numbered."""
    folder.mkdir(parents=True)
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{number:05d}.jpg", quality=90)


def processor_seconds() -> float:
    """Of all children so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def call(project: Path, *command: str) -> tuple[float, float]:
    """Run a command; its wall-clock and processor seconds."""
    env = child_environment({"PYTHONPATH": str(project / "src")})
    start, used = time.perf_counter(), processor_seconds()
    done = subprocess.run(
        command, cwd=project, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}")
    return time.perf_counter() - start, processor_seconds() - used


def make_project(folder: Path, images: int, size: int | None = None) -> None:
    """Make a repository with the data set, added to DVC.

    `size` is the network's input, pixels; by default params.yaml's.
    """
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "dvc.yaml", folder)
    params = re.sub(r"(?m)^categories:.*", "categories: [fabric]", (ROOT / "params.yaml").read_text(encoding="utf-8"))
    if size is not None:
        params = re.sub(r"(?m)^  input_size:.*", f"  input_size: {size}", params)
    (folder / "params.yaml").write_text(params, encoding="utf-8")
    test = max(2, images // 50)
    every = pictures(images)
    data = folder / "data" / "fabric"
    write(every[: -2 * test], data / "train" / "good")
    write(every[-2 * test : -test], data / "test" / "good")
    write([255 - pixels for pixels in every[-test:]], data / "test" / "negative")
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"], ["dvc", "add", "-q", "data"]):
        call(folder, *command)


def run(folder: Path) -> dict[str, float]:
    """Seconds of `dvc repro extract` as a whole, and of the stages within."""
    total, processor = call(folder, "dvc", "repro", "extract")
    stages = {
        s: json.loads((folder / "build" / "timings" / f"{s}.json").read_text())["seconds"]
        for s in ("validate", "extract")
    }
    return {**stages, "dvc": total - sum(stages.values()), "total": total, "processor": processor}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Cost of adding a few new images.")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--share", type=float, default=0.01, help="new images as a share of those there (default 0.01)")
    parser.add_argument("--input-size", type=int, help="of the network, pixels (default: params.yaml's)")
    options = parser.parse_args()
    new = max(1, round(options.images * options.share))
    with tempfile.TemporaryDirectory(prefix="panda-cost-") as scratch:
        folder = Path(scratch)
        make_project(folder, options.images, options.input_size)
        write(pictures(new, options.images), folder / "drop")
        full = run(folder)
        ingest, ingest_processor = call(folder, "panda-ad", "ingest", "drop", "--category", "fabric")
        again = run(folder)
    print(f"{options.images} images of {SIDE} pixels, then {new} more; seconds")
    print(
        "| run | validate | extract | dvc's own | all three | processor time | ingest | processor time |\n|"
        + " --- |" * 8
    )
    for name, t, more in (
        ("all images", full, "- | -"),
        (f"{new} new", again, f"{ingest:.1f} | {ingest_processor:.1f}"),
    ):
        figures = " | ".join(f"{t[k]:.1f}" for k in ("validate", "extract", "dvc", "total", "processor"))
        print(f"| {name} | {figures} | {more} |")
    for what, key, more_seconds in (("wall-clock", "total", ingest), ("processor time", "processor", ingest_processor)):
        shares = [100 * seconds / full[key] for seconds in (again[key], again[key] + more_seconds)]
        print(f"{what}: {shares[0]:.1f} % of the full run's; with ingest {shares[1]:.1f} %")


if __name__ == "__main__":
    main()
