# SPDX-License-Identifier: Apache-2.0
"""What each choice in heat maps and the image score is worth, one row a change from the default.

    python benchmarks/ablation.py FOLDER... [--size 128] [--limit-train 600]

Each FOLDER is a category in MVTec's layout (train/good, test/<kind>, ground_truth/<kind>). The default network without
adaptation, seed 0. Prints two Markdown tables in %: of heat maps, the image AUROC of the map score, that of the sum
with the feature score, and AU-PRO; of image scores, the image AUROC. Without masks AU-PRO is left out.
All rows but those of the memory's size have 1,000 patches a level, half of the default, to be quicker.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import uniform_filter

from panda_ad.data.images import read_image
from panda_ad.data.listing import image_files
from panda_ad.data.masks import read_mask
from panda_ad.evaluation.image_metrics import auroc
from panda_ad.evaluation.masks import reduce_mask
from panda_ad.evaluation.pixel_metrics import au_pro
from panda_ad.features.backbones import load_backbone
from panda_ad.features.preprocessing import preprocess
from panda_ad.scoring.detector import normalize
from panda_ad.scoring.folds import split_folds
from panda_ad.scoring.gallery import Gallery
from panda_ad.scoring.image_score import fit_robust_scale
from panda_ad.scoring.localize.maps import local_means, positions, resize
from panda_ad.scoring.localize.patch_memory import POOL, choose
from panda_ad.scoring.localize.search import nearest, pack
from panda_ad.scoring.whitening import fit_whitening

SIGMA = 4.0  # pixels at input size
HELD = 96  # most training images whose out-of-fold maps set scales
SIDE = 256  # longest side of the masks that AU-PRO compares, pixels


@dataclass(frozen=True)
class Variant:
    """How maps are made.

    Attributes
    ----------
    levels : of the network.
    joined : whether they are joined on the finest grid, as PatchCore does, to one memory of as many rows together.
    zeros : whether zeros beyond the border count in a patch.
    whitened : whether patches are whitened by the covariance of normal ones.
    greedy : whether the memory is chosen greedily, or at random.
    memory : rows per level.
    """

    levels: tuple[str, ...] = ("stage2", "stage3", "stage5")
    joined: bool = False
    zeros: bool = True
    whitened: bool = False
    greedy: bool = True
    memory: int = 1000


DEFAULT = Variant()
VARIANTS = {
    "default": DEFAULT,
    "zeros beyond the border not counted": replace(DEFAULT, zeros=False),
    "levels joined in one memory (PatchCore)": replace(DEFAULT, joined=True),
    "joined, without zeros: the former default": replace(DEFAULT, joined=True, zeros=False),
    "patches whitened": replace(DEFAULT, whitened=True),
    "memory chosen at random": replace(DEFAULT, greedy=False),
    "memory of 300 a level": replace(DEFAULT, memory=300),
    "memory of 3,000 a level": replace(DEFAULT, memory=3000),
    "with stage 6": replace(DEFAULT, levels=(*DEFAULT.levels, "stage6")),
    "without stage 2 (grid of 1/8)": replace(DEFAULT, levels=DEFAULT.levels[1:]),
}
Pair = tuple[np.ndarray, np.ndarray]
"""Of training images out-of-fold, and of test images."""


@dataclass(frozen=True)
class Category:
    """Levels, float16 (N, C, h, w), and pooled features (N, D) of training and test images; labels and masks."""

    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    labels: np.ndarray
    masks: list[np.ndarray] | None
    size: tuple[int, int]

    @property
    def held(self) -> np.ndarray:
        """Indices of the training images that scales are from."""
        count = len(self.train["pooled"])
        return np.sort(np.random.default_rng(0).permutation(count)[:HELD])


def read_category(folder: Path, size: int, limit: int) -> Category:
    """Run the network on a category's images."""
    good = sorted(image_files([folder / "train" / "good"]))
    good = [good[i] for i in np.sort(np.random.default_rng(0).permutation(len(good))[:limit])]
    test = sorted(image_files([folder / "test"]))
    labels = np.array([file.parent.name != "good" for file in test]).astype(int)
    masks = [mask_of(folder, file) for file in test] if (folder / "ground_truth").is_dir() else None
    return Category(levels_of(good, size), levels_of(test, size), labels, masks, (size, size))


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


def levels_of(files: Sequence[Path], size: int) -> dict[str, np.ndarray]:
    """Return levels and pooled features of images, by name."""
    backbone = load_backbone("efficientnet_lite0")
    names = (*backbone.frozen.levels, *backbone.adapted.levels, "pooled")
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for file in files:
        pixels = torch.from_numpy(preprocess(read_image(file), (size, size), backbone.architecture)[None])
        with torch.inference_mode():
            frozen = backbone.frozen(pixels)
            adapted = backbone.adapted.maps(frozen[-1])
            pooled = backbone.adapted.pool(frozen[-1], adapted)
        for name, value in zip(names, (*(x.half() for x in (*frozen, *adapted)), pooled), strict=True):
            found[name].append(value[0].numpy())
    return {name: np.stack(values) for name, values in found.items()}


def patches(level: np.ndarray, zeros: bool) -> np.ndarray:
    """Return patches float32 (C, h, w) of one level (C, h, w)."""
    means = local_means(level).astype(np.float32)
    return means if zeros else means / uniform_filter(np.ones(level.shape[1:], np.float32), 3, mode="constant")


def distance_maps(category: Category, variant: Variant, levels: tuple[str, ...], rows: int) -> Pair:
    """Return unsmoothed distances (N, h, w), on the finest of the levels' grids, joined where they are several."""

    def joined(layers: dict[str, np.ndarray], i: int) -> np.ndarray:
        first, *others = (patches(layers[level][i], variant.zeros) for level in levels)
        return np.concatenate([first, *(np.stack([resize(c, first.shape[1:]) for c in x]) for x in others)])

    count, rng = len(category.train["pooled"]), np.random.default_rng(0)
    quota = -(-max(POOL, rows) // count)
    drawn = []
    for i in range(count):
        image = positions(joined(category.train, i))
        drawn.append(image[rng.permutation(len(image))[:quota]])
    pool, of = np.concatenate(drawn), np.repeat(np.arange(count), [len(x) for x in drawn])
    white = fit_whitening(pool) if variant.whitened else lambda x: x
    pool = white(pool)
    chosen = choose(pool, min(rows, len(pool)), 0) if variant.greedy else rng.permutation(len(pool))[:rows]

    def distances(layers: dict[str, np.ndarray], i: int, others: np.ndarray) -> np.ndarray:
        image = joined(layers, i)
        away = nearest(white(positions(image)), [pack(pool[chosen[others]])])
        return np.asarray(away.reshape(image.shape[1:]))

    held: dict[int, np.ndarray] = {}
    for fold, _ in split_folds(count, 0):
        others = ~np.isin(of[chosen], fold)
        held |= {int(i): distances(category.train, i, others) for i in np.intersect1d(fold, category.held)}
    every = np.ones(len(chosen), bool)
    tested = [distances(category.test, i, every) for i in range(len(category.labels))]
    return np.stack([held[int(i)] for i in category.held]), np.stack(tested)


def heatmaps(category: Category, variant: Variant) -> Pair:
    """Return heat maps float32 (N, H, W)."""
    groups = [variant.levels] if variant.joined else [(level,) for level in variant.levels]
    held, tested = (np.zeros((n, *category.size), np.float32) for n in (len(category.held), len(category.labels)))
    for levels in groups:
        maps = distance_maps(category, variant, levels, variant.memory * len(variant.levels) // len(groups))
        scale = maps[0].mean() * len(groups)
        held += np.stack([resize(x / scale, category.size, SIGMA) for x in maps[0]])
        tested += np.stack([resize(x / scale, category.size, SIGMA) for x in maps[1]])
    return held, tested


def feature_scores(category: Category, normalized: bool = True, whitened: bool = True) -> Pair:
    """Return kNN scores (k = 2) of pooled features."""
    train, test = (normalize(x["pooled"]) if normalized else x["pooled"] for x in (category.train, category.test))
    held = np.empty(len(train))

    def score(known: np.ndarray, asked: np.ndarray) -> np.ndarray:
        white = fit_whitening(known) if whitened else lambda x: x
        return Gallery(white(known)).score(white(asked), 2)

    for fold, rest in split_folds(len(train), 0):
        held[fold] = score(train[rest], train[fold])
    return held, score(train, test)


def top_hundredth(maps: np.ndarray) -> np.ndarray:
    """Return the mean of the largest 1 % of each map (N, H, W)."""
    flat = maps.reshape(len(maps), -1)
    count = max(1, flat.shape[1] // 100)
    return np.asarray(np.partition(flat, -count, axis=1)[:, -count:].mean(axis=1))


def peak_per_place(maps: Pair) -> Pair:
    """Return the largest value in units of each pixel's mean and spread among normal images, out-of-fold."""

    def peaks(known: np.ndarray, asked: np.ndarray) -> np.ndarray:
        spread = known.std(axis=0)
        return np.asarray(((asked - known.mean(axis=0)) / np.maximum(spread, np.median(spread))).max(axis=(1, 2)))

    held = np.empty(len(maps[0]))
    for fold, rest in split_folds(len(held), 1):
        held[fold] = peaks(maps[0][rest], maps[0][fold])
    return held, peaks(*maps)


def units(scores: Pair) -> np.ndarray:
    """Return test scores in robust standard deviations of the out-of-fold ones."""
    return fit_robust_scale(scores[0])(scores[1])


def peak(maps: Pair) -> Pair:
    """Return the largest value of each map."""
    return maps[0].max(axis=(1, 2)), maps[1].max(axis=(1, 2))


def map_rows(category: Category) -> dict[str, str]:
    """Return the first table's cells of a category."""
    features = units(feature_scores(category))
    rows = {}
    for name, variant in VARIANTS.items():
        maps = heatmaps(category, variant)
        found = peak(maps)
        figures = [auroc(category.labels, found[1]), auroc(category.labels, features + units(found))]
        if category.masks is not None:
            at_masks = [
                resize(m, (mask.shape[0], mask.shape[1])) for m, mask in zip(maps[1], category.masks, strict=True)
            ]
            figures.append(au_pro(category.masks, at_masks))
        rows[name] = ", ".join(f"{100 * figure:.1f}" for figure in figures)
    return rows


def score_rows(category: Category) -> dict[str, str]:
    """Return the second table's cells of a category."""
    maps = heatmaps(category, DEFAULT)
    features, peaks = feature_scores(category), peak(maps)
    top = top_hundredth(maps[0]), top_hundredth(maps[1])
    found: dict[str, Callable[[], np.ndarray]] = {
        "features": lambda: features[1],
        "features, not whitened": lambda: feature_scores(category, whitened=False)[1],
        "features as they are": lambda: feature_scores(category, normalized=False, whitened=False)[1],
        "map score: largest value": lambda: peaks[1],
        "mean of the largest 1 %": lambda: top[1],
        "largest value, in units of each place": lambda: peak_per_place(maps)[1],
        "features + largest value: the default": lambda: units(features) + units(peaks),
        "features + mean of the largest 1 %": lambda: units(features) + units(top),
        "features + largest value, in units of each place": lambda: units(features) + units(peak_per_place(maps)),
        "the larger of features and largest value": lambda: np.maximum(units(features), units(peaks)),
    }
    return {name: f"{100 * auroc(category.labels, scores()):.1f}" for name, scores in found.items()}


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--size", type=int, default=128, help="input size, pixels a side")
    parser.add_argument("--limit-train", type=int, default=600)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tables: list[list[dict[str, str]]] = [[], []]
    for folder in options.folders:
        category = read_category(folder, options.size, options.limit_train)
        for table, rows in zip(tables, (map_rows, score_rows), strict=True):
            table.append(rows(category))
    for title, columns in zip(("heat maps", "image score"), tables, strict=True):
        print(f"| {title} | " + " | ".join(folder.name for folder in options.folders) + " |")
        print("| --- " * (len(columns) + 1) + "|")
        for name in columns[0]:
            print(f"| {name} | " + " | ".join(column[name] for column in columns) + " |")
        print(flush=True)


if __name__ == "__main__":
    main()
