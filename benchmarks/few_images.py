# SPDX-License-Identifier: Apache-2.0
"""What a model of few good images is worth: image AUROC, defects caught, and false alarms against what was promised.

    python benchmarks/few_images.py CATEGORY_FOLDER... [--draws 10]      # MVTec's layout

As `panda-ad start` fits: the default network, nothing adapts, no image is held out. Each draw takes other training
images; the test images are all, always. n images can promise a rate of 1 / (n + 1) at best, or 5 %.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from panda_ad.commands.start import FIT, NETWORK, FileImages
from panda_ad.data.listing import image_files
from panda_ad.evaluation.image_metrics import auroc
from panda_ad.features.backbones import load_backbone
from panda_ad.features.export import export_network
from panda_ad.features.images import Index
from panda_ad.scoring.fit import fit_detector

COUNTS = (4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Chosen:
    """Some of other images (`features.images.Images`), whose activations are known already."""

    of: FileImages
    at: np.ndarray

    @property
    def names(self) -> Sequence[str]:
        """See `Images`."""
        return [self.of.names[i] for i in self.at]

    @property
    def keys(self) -> Sequence[str]:
        """See `Images`."""
        return [self.of.keys[i] for i in self.at]

    def __len__(self) -> int:
        return len(self.at)

    def read(self, index: int) -> np.ndarray:
        """See `Images`."""
        return self.of.read(int(self.at[index]))

    def activations(self, index: Index, levels: Sequence[str]) -> dict[str, np.ndarray]:
        """See `Images`."""
        return self.of.activations(self.at[index], levels)

    def pretrained(self, _index: Index) -> np.ndarray | None:
        """See `Images`: unknown."""
        return None


def figures(train: FileImages, test: FileImages, defective: np.ndarray, chosen: np.ndarray) -> tuple[float, ...]:
    """Return AUROC, share of defects caught, share of good test images that alarm, and the rate that is expected."""
    detector = fit_detector(train.network, Chosen(train, chosen), FIT)
    scores = np.concatenate([found.score for found in detector.score_images(test, heatmaps=False)])
    limit = detector.threshold()
    alarms = scores > limit.value
    return (
        auroc(defective.astype(np.int64), scores),
        alarms[defective].mean(),
        alarms[~defective].mean(),
        limit.expected,
    )


def report(folder: Path, draws: int) -> None:
    """Print a row for each number of images."""
    network = export_network(load_backbone(*NETWORK), (128, 128))
    train = FileImages(network, image_files([folder / "train" / "good"]))
    files = image_files([folder / "test"])
    test, defective = FileImages(network, files), np.array([file.parent.name != "good" for file in files])
    rng = np.random.default_rng(0)
    for count in [*(n for n in COUNTS if n < len(train)), len(train)]:
        times = draws if count < len(train) else 1
        rows = [
            figures(train, test, defective, np.sort(rng.permutation(len(train))[:count]))
            for _ in tqdm(range(times), desc=f"{folder.name}, {count} images", disable=None)
        ]
        mean, spread = np.mean(rows, axis=0), np.std(rows, axis=0)
        print(
            f"| {folder.name} | {count} | {100 * mean[0]:.1f} ± {100 * spread[0]:.1f} | {100 * mean[1]:.0f} % | "
            f"{100 * mean[3]:.1f} % | {100 * mean[2]:.1f} % ± {100 * spread[2]:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--draws", type=int, default=10)
    arguments = parser.parse_args()
    print("| set | good images | image AUROC ± deviation | defects caught | promised | false alarms ± deviation |")
    print("| --- | --- | --- | --- | --- | --- |")
    for path in arguments.folders:
        report(path, arguments.draws)
