# SPDX-License-Identifier: Apache-2.0
"""Our default beside anomalib's PatchCore: same network, weights, images and metrics, in turn in one process.

    make peers        makes benchmarks/peers/.venv and compares on the sample
    benchmarks/peers/.venv/bin/python benchmarks/peers/compare.py FOLDER... [--size 224] [--limit-train 200]

Each FOLDER is a category in MVTec's layout (train/good, test/<kind>, ground_truth/<kind>). Every fifth training image
is kept out of both systems: the peer's own threshold comes from them, ours from scores out of fold; 'our rule' is the
promise of 5 % kept by these images' scores, for both. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "src")]  # this environment has no panda-ad installed

import anomalib_patchcore  # noqa: E402
from own_detector import fit as fit_ours  # noqa: E402

from panda_ad.data.images import read_image  # noqa: E402
from panda_ad.data.listing import image_files  # noqa: E402
from panda_ad.data.masks import read_mask  # noqa: E402
from panda_ad.evaluation.image_metrics import auroc, paired_bootstrap, percentiles  # noqa: E402
from panda_ad.evaluation.masks import reduce_mask  # noqa: E402
from panda_ad.evaluation.pixel_metrics import au_pro, pixel_auroc  # noqa: E402
from panda_ad.params_file import load_params  # noqa: E402
from panda_ad.scoring.bundle import save_bundle  # noqa: E402
from panda_ad.scoring.calibration import threshold  # noqa: E402
from panda_ad.scoring.verdict import resize_map  # noqa: E402

RATE = 0.05  # promised share of good parts that alarm
SIDE = 256  # longest side of the masks that pixel metrics compare, pixels
HEADER = (
    "| set | system | image AUROC | minus ours [95 %] | pixel AUROC | AU-PRO | false alarms, own rule | found | "
    "false alarms, our rule | found | fit s | one image ms | of eight ms | MB |\n" + "|---" * 14 + "|"
)


@dataclass(frozen=True)
class Category:
    """One category's files: training, calibration and test images, labels (N,), masks (None where there are none)."""

    name: str
    train: list[Path]
    calibration: list[Path]
    test: list[Path]
    labels: np.ndarray
    masks: list[np.ndarray] | None


@dataclass(frozen=True)
class Result:
    """What one system made of a category.

    Attributes
    ----------
    scores : (N,) of the test images.  calibration : of the held-out normal images.
    maps : of the test images, each of its mask's size; None without masks.
    own_threshold : by the system's own rule.
    """

    name: str
    scores: np.ndarray
    calibration: np.ndarray
    maps: list[np.ndarray] | None
    own_threshold: float
    fit_seconds: float
    one: float
    eight: float
    megabytes: float


def main() -> None:
    """Compare on each folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--size", type=int, nargs="+", default=[224], help="input sizes, pixels a side")
    parser.add_argument("--limit-train", type=int, default=200, help="the coreset's time grows with the square")
    parser.add_argument("--ratio", type=float, default=0.1, help="share of patches in the peer's memory")
    parser.add_argument("--peers", nargs="*", default=["patchcore"], choices=list(anomalib_patchcore.COVERED))
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "anomalib"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print(HEADER, flush=True)
    for folder in options.folders:
        category = read_category(folder, options.limit_train)
        for size in options.size:
            ours = run_ours(category, size)
            show(category, ours, ours)
            for kind in options.peers:
                if kind != "mh_patchcore" or size == 224:
                    show(category, run_peer(kind, category, size, options.ratio), ours)


def read_category(folder: Path, limit: int) -> Category:
    """List a category in MVTec's layout, with a seeded choice of training images."""
    good = sorted(image_files([folder / "train" / "good"]))
    good = [good[i] for i in np.sort(np.random.default_rng(0).permutation(len(good))[:limit])]
    test = sorted(image_files([folder / "test"]))
    labels = np.array([file.parent.name != "good" for file in test]).astype(int)
    masks = [mask_of(folder, file) for file in test] if (folder / "ground_truth").is_dir() else None
    return Category(folder.name, [x for i, x in enumerate(good) if i % 5], good[::5], test, labels, masks)


def mask_of(folder: Path, file: Path) -> np.ndarray:
    """Read an image's mask, bool (h, w), at most SIDE pixels; all False for a good image."""
    height, width = read_image(file).shape[:2]
    scale = min(1.0, SIDE / max(height, width))
    size = (round(height * scale), round(width * scale))
    if file.parent.name == "good":
        return np.zeros(size, bool)
    (found,) = (folder / "ground_truth" / file.parent.name).glob(f"{file.stem}*")
    mask = read_mask(found)
    return mask if mask.shape == size else reduce_mask(mask, size)


def run_ours(category: Category, size: int) -> Result:
    """Fit and score with the defaults of params.yaml at an input size, without adaptation."""
    params = load_params(ROOT / "params.yaml")
    params = params.model_copy(update={"backbone": params.backbone.model_copy(update={"input_size": size})})
    images = [read_image(file) for file in category.train]
    start = time.process_time()
    detector = fit_ours(images, params)
    seconds = time.process_time() - start

    def score(images: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        verdicts = detector.score(images, heatmaps=True)
        return np.array([v.score for v in verdicts]), np.stack([v.heatmap for v in verdicts])

    with tempfile.TemporaryDirectory() as folder:
        save_bundle(detector, Path(folder))
        megabytes = sum(f.stat().st_size for f in Path(folder).rglob("*") if f.is_file()) / 1e6
    limit = float(detector.threshold().value)
    return measured(f"panda-ad, {size} px", category, score, limit, seconds, megabytes)


def run_peer(kind: str, category: Category, size: int, ratio: float) -> Result:
    """Fit and score with anomalib."""
    start = time.process_time()
    peer = anomalib_patchcore.fit(kind, category.train, category.calibration, size, ratio)
    seconds = time.process_time() - start
    return measured(f"anomalib {kind}, {size} px", category, peer.score, peer.threshold, seconds, peer.bytes() / 1e6)


def measured(
    name: str,
    category: Category,
    score: Callable[[Sequence[np.ndarray]], tuple[np.ndarray, np.ndarray]],
    own_threshold: float,
    fit_seconds: float,
    megabytes: float,
) -> Result:
    """Score the calibration and test images, and time one image and a batch of eight (processor time, one thread)."""
    found, maps = [], []
    for i, file in enumerate(category.test):
        scores, heatmaps = score([read_image(file)])
        found.append(scores[0])
        if category.masks is not None:
            maps.append(resize_map(heatmaps[0].astype(np.float32), category.masks[i].shape))
    calibration = np.array([score([read_image(file)])[0][0] for file in category.calibration])
    image = read_image(category.test[0])
    one, eight = processor_ms(lambda: score([image])), processor_ms(lambda: score([image] * 8)) / 8
    return Result(
        name,
        np.array(found),
        calibration,
        maps if category.masks is not None else None,
        own_threshold,
        fit_seconds,
        one,
        eight,
        megabytes,
    )


def processor_ms(call: Callable[[], object], rounds: int = 15) -> float:
    """Return the median processor time of a call, ms."""
    call()
    times = []
    for _ in range(rounds):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return 1000 * statistics.median(times)


def show(category: Category, result: Result, ours: Result) -> None:
    """Print a row."""
    labels = category.labels
    figures = [f"{auroc(labels, result.scores):.4f}"]
    difference = paired_bootstrap(auroc, labels, result.scores, ours.scores)
    low, high = percentiles(difference, 0.95)
    figures.append("" if result is ours else f"{difference.mean():+.4f} [{low:+.4f}, {high:+.4f}]")
    if result.maps is not None and category.masks is not None:
        figures += [f"{metric(category.masks, result.maps):.4f}" for metric in (pixel_auroc, au_pro)]
    else:
        figures += ["", ""]
    for limit in (result.own_threshold, threshold(result.calibration, RATE).value):
        figures += [f"{(result.scores[labels == label] > limit).mean():.3f}" for label in (0, 1)]
    figures += [f"{x:.1f}" for x in (result.fit_seconds, result.one, result.eight, result.megabytes)]
    print(f"| {category.name} | {result.name} | " + " | ".join(figures) + " |", flush=True)


if __name__ == "__main__":
    main()
