# SPDX-License-Identifier: Apache-2.0
"""Promised against realized false-alarm rates where sessions differ, and whether the stated intervals hold.

    python benchmarks/promise.py [--repetitions 200]           # simulated features, whose truth is known
    python benchmarks/promise.py --real GOOD_FOLDER [...]      # sessions made of real images, by light and by size

One model is calibrated in three ways: on images held out at random, on each image left out of the gallery alone, and
on out-of-fold scores with whole sessions as folds, which is what panda-ad does where sessions are known. The first two
cannot tell sessions apart: they state the interval of exchangeable images.

Simulated: a part is a point in 24 dimensions with tails as heavy as Student's of 8 degrees of freedom. A session moves
all its parts by a lamp and a camera position, one direction each, and by its lot, in any direction. Its true rate is
that of 1,000 parts. Real: images sorted by brightness or by height are cut into ten sessions; each in turn is not seen.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from panda_ad.data.images import read_image
from panda_ad.data.listing import image_files
from panda_ad.features.backbones import load_backbone
from panda_ad.features.export import export_network
from panda_ad.features.images import DecodedImages
from panda_ad.params import GalleryParams, Params
from panda_ad.params_file import load_params
from panda_ad.scoring.calibration import Threshold, threshold
from panda_ad.scoring.config import DetectorConfig
from panda_ad.scoring.detector import Detector
from panda_ad.scoring.fit import NormalFeatures, fit_galleries, out_of_fold, training_features
from panda_ad.scoring.folds import split_folds

RATE = 0.05
SESSIONS = (4, 8, 16)
PARTS = (20, 60)
"""Parts of a session: at least, and fewer than."""
DIMENSIONS = 24
NEVER_SEEN = 20
TRUTH = 1000
"""Parts that a session's true rate is taken from."""
LAMP, CAMERA, LOT = 2.5, 1.5, 0.4
"""Standard deviations of what moves a session, in those of a part; LOT is of each dimension."""
GALLERY = GalleryParams(k=2, normalize=False, whiten=True, compression="none", size=1)


@dataclass(frozen=True)
class Calibrated:
    """A model of normal features with its threshold."""

    normal: NormalFeatures
    threshold: Threshold

    def rate(self, features: np.ndarray) -> float:
        """Return the share of good parts, float32 (N, D), that raise an alarm."""
        return float((self.normal.score([features], GALLERY.k)[0] > self.threshold.value).mean())


def held_out(features: np.ndarray, _sessions: np.ndarray, seed: int) -> Calibrated:
    """Calibrate on three tenths of the images, drawn at random and kept out of the model."""
    order = np.random.default_rng(seed).permutation(len(features))
    part, rest = np.split(order, [round(0.3 * len(order))])
    normal = fit_galleries([features[rest]], GALLERY, GALLERY.whiten, seed)
    return Calibrated(normal, threshold(normal.score([features[part]], GALLERY.k)[0], RATE))


def leave_one_out(features: np.ndarray, _sessions: np.ndarray, seed: int) -> Calibrated:
    """Calibrate on each image's distance from all others; the whitening has seen it."""
    normal = fit_galleries([features], GALLERY, GALLERY.whiten, seed)
    return Calibrated(normal, threshold(normal.galleries[0].leave_one_out(GALLERY.k), RATE))


def by_session(features: np.ndarray, sessions: np.ndarray, seed: int) -> Calibrated:
    """Calibrate as `fit_detector` does where sessions are known."""
    normal = fit_galleries([features], GALLERY, GALLERY.whiten, seed)
    scores, within = (
        out_of_fold([features], folds, GALLERY, GALLERY.whiten, seed).scores[0]
        for folds in (split_folds(len(features), seed, list(sessions)), split_folds(len(features), seed))
    )
    return Calibrated(normal, threshold(scores, RATE, sessions=list(sessions), within=within))


WAYS: dict[str, Callable[[np.ndarray, np.ndarray, int], Calibrated]] = {
    "held out at random": held_out,
    "leave one out": leave_one_out,
    "by session": by_session,
}


def parts_of(rng: np.random.Generator, place: np.ndarray, count: int) -> np.ndarray:
    """Draw `count` parts, float32 (count, D), of a session at `place`, (D,)."""
    scales = np.linspace(1.5, 0.5, DIMENSIONS)
    tails = np.sqrt(8 / rng.chisquare(8, (count, 1)))
    return (place + rng.normal(size=(count, DIMENSIONS)) * scales * tails).astype(np.float32)


def places(rng: np.random.Generator, count: int) -> np.ndarray:
    """Draw where sessions lie, (count, D)."""
    lamp, camera = np.eye(DIMENSIONS)[[0, -1]]
    moved = rng.normal(size=(count, 2)) * (LAMP, CAMERA)
    return moved @ np.stack([lamp, camera]) + LOT * rng.normal(size=(count, DIMENSIONS))


def simulate(count: int, repetitions: int) -> dict[str, np.ndarray]:
    """Return for each way (repetitions, 4): rates of known sessions and of new ones, coverage, the interval's width."""
    found: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in WAYS}
    for seed in tqdm(range(repetitions), desc=f"{count} sessions", disable=None):
        rng = np.random.default_rng([count, seed])
        known = places(rng, count)
        sizes = rng.integers(*PARTS, count)
        features = np.concatenate([parts_of(rng, place, n) for place, n in zip(known, sizes, strict=True)])
        sessions = np.repeat([f"session {i}" for i in range(count)], sizes)
        same = np.concatenate([parts_of(rng, place, TRUTH // count) for place in known])
        new = [parts_of(rng, place, TRUTH) for place in places(rng, NEVER_SEEN)]
        for name, calibrate in WAYS.items():
            model = calibrate(features, sessions, seed)
            rates = np.array([model.rate(parts) for parts in new])
            low, high = model.threshold.interval
            covered = (rates >= low - 0.5 / TRUTH) & (rates <= high + 0.5 / TRUTH)
            found[name].append((model.rate(same), rates.mean(), covered.mean(), high - low))
    return {name: np.array(rows) for name, rows in found.items()}


def report_simulation(repetitions: int) -> None:
    """Print a table of the simulation."""
    print("| sessions | calibration | known sessions | sessions never seen | interval covers | its width |")
    print("| --- | --- | --- | --- | --- | --- |")
    for count in SESSIONS:
        for name, rows in simulate(count, repetitions).items():
            known, new, covered, width = rows.mean(axis=0)
            error = 1.96 * rows[:, 2].std() / np.sqrt(len(rows))
            print(
                f"| {count} | {name} | {100 * known:.1f} % | {100 * new:.1f} % | "
                f"{100 * covered:.1f} % ± {100 * error:.1f} | {100 * width:.0f} points |"
            )


def real_sets(folder: Path, params: Params) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield (name, features, sessions) of a folder of good images, by brightness and, where it differs, by height."""
    images = [read_image(file) for file in image_files([folder])]
    network = export_network(load_backbone(params.backbone.name, params.backbone.weights), params.backbone.size)
    config = DetectorConfig(normalize=params.gallery.normalize)
    detector = Detector(config, network, (), np.empty(0))
    (features,) = training_features(detector, DecodedImages(network, images))
    covariates = {"brightness": [image.mean() for image in images], "height": [image.shape[0] for image in images]}
    for name, values in covariates.items():
        if len(set(values)) >= 10:
            order = np.argsort(values, kind="stable")
            sessions = np.empty(len(images), dtype=np.int64)
            for i, part in enumerate(np.array_split(order, 10)):
                sessions[part] = i
            yield f"{folder.parent.parent.name}, {len(images)} images by {name}", features, sessions


def report_real(folders: list[Path]) -> None:
    """Print a table of realized rates on sessions of real images that were left out."""
    print("| good images | calibration | session left out: mean | worst | says |")
    print("| --- | --- | --- | --- | --- |")
    for folder in folders:
        for title, features, sessions in real_sets(folder, load_params()):
            for name, calibrate in WAYS.items():
                rates, said = [], []
                for left in range(10):
                    known = sessions != left
                    model = calibrate(features[known], sessions[known].astype(str), 0)
                    rates.append(model.rate(features[~known]))
                    said.append(model.threshold.interval)
                low, high = np.mean(said, axis=0)
                print(
                    f"| {title} | {name} | {100 * np.mean(rates):.1f} % | {100 * max(rates):.0f} % | "
                    f"{100 * low:.1f} to {100 * high:.0f} % |",
                    flush=True,
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=200)
    parser.add_argument("--real", type=Path, nargs="+", help="folders of good images")
    arguments = parser.parse_args()
    if arguments.real:
        report_real(arguments.real)
    else:
        report_simulation(arguments.repetitions)
