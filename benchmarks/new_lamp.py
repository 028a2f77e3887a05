# SPDX-License-Identifier: Apache-2.0
"""What a new lamp does to a model, with copies of the training images in other sessions' light and without.

    python benchmarks/new_lamp.py CATEGORY_FOLDER... [--sessions 3 4 8] [--spread 0.1] [--repetitions 6]
    python benchmarks/new_lamp.py --left-out CATEGORY_FOLDER      # sessions of real light: images sorted by brightness

Folders as MVTec's. The default model, not adapted, 128 px. Lamps are drawn: each session's strength from a log-normal
distribution (`--spread`), its color cast from one a third as wide. Of a model that knows some sessions, four others
with all test images are asked for: AUROC, defects caught, false alarms (5 % are promised), and those of the worst.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from panda_ad.commands.start import FIT, NETWORK
from panda_ad.data.images import read_image
from panda_ad.data.listing import image_files
from panda_ad.evaluation.image_metrics import auroc
from panda_ad.features.backbones import load_backbone
from panda_ad.features.export import export_network
from panda_ad.features.images import DecodedImages
from panda_ad.features.network import Network
from panda_ad.scoring.detector import Detector
from panda_ad.scoring.fit import fit_detector
from panda_ad.scoring.relight import lit

NEW = 4
"""Sessions never seen, of each repetition."""
TRAIN, TEST = 300, 250
"""Most images of the real sessions, drawn at random: sorting takes ten fits."""


def fitted(network: Network, images: Sequence[np.ndarray], sessions: Sequence[str], relight: bool) -> Detector:
    """Fit the default model, with copies in other light or without."""
    params = FIT.model_copy(update={"gallery": FIT.gallery.model_copy(update={"relight": relight})})
    return fit_detector(network, DecodedImages(network, images), params, sessions=list(sessions))


def scores(detector: Detector, images: Sequence[np.ndarray]) -> np.ndarray:
    """Return image scores, (N,)."""
    shown = DecodedImages(detector.network, images)
    return np.concatenate([found.score for found in detector.score_images(shown, heatmaps=False)])


def read(folder: Path) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Return good training images, test images, and which of these are defective."""
    files = image_files([folder / "test"])
    train = [read_image(file) for file in image_files([folder / "train" / "good"])]
    return train, [read_image(file) for file in files], np.array([file.parent.name != "good" for file in files])


def drawn_lamps(network: Network, folder: Path, sessions: int, spread: float, repetitions: int) -> None:
    """Print a row with copies and one without."""
    train, test, bad = read(folder)
    found: dict[bool, list[list[float]]] = {False: [], True: []}
    for seed in tqdm(range(repetitions), desc=f"{folder.name}, {sessions} sessions", disable=None):
        rng = np.random.default_rng(seed)
        strength, cast = rng.normal(size=(2, sessions + NEW)) * [[spread], [spread / 3]]
        lamps = np.exp(strength)[:, None] * np.stack([1 + cast, np.ones_like(cast), 1 - cast], axis=1)
        of = np.arange(len(train)) % sessions
        known = [lit(rgb, lamps[g]) for rgb, g in zip(train, of, strict=True)]
        for relight, rows in found.items():
            model = fitted(network, known, [str(g) for g in of], relight)
            limit = model.threshold().value
            for lamp in lamps[sessions:]:
                s = scores(model, [lit(rgb, lamp) for rgb in test])
                rows.append([auroc(bad.astype(np.int64), s), (s[bad] > limit).mean(), (s[~bad] > limit).mean()])
    for relight, rows in found.items():
        mean, worst = 100 * np.mean(rows, axis=0), 100 * max(row[2] for row in rows)
        print(
            f"| {folder.name} | {sessions} | {'yes' if relight else 'no'} | {mean[0]:.1f} | {mean[1]:.0f} % | "
            f"{mean[2]:.1f} % | {worst:.0f} % |",
            flush=True,
        )


def left_out(network: Network, folder: Path) -> None:
    """Print, for five of ten sessions by brightness, what a model without it does to it."""
    train, test, bad = read(folder)
    rng = np.random.default_rng(0)
    train = [train[i] for i in np.sort(rng.permutation(len(train))[:TRAIN])]
    at = np.sort(rng.permutation(len(test))[:TEST])
    defects = [test[i] for i in at if bad[i]]
    of = np.empty(len(train), dtype=np.int64)
    for g, part in enumerate(np.array_split(np.argsort([rgb.mean() for rgb in train], kind="stable"), 10)):
        of[part] = g
    for left in (0, 2, 5, 7, 9):
        known = [rgb for rgb, g in zip(train, of, strict=True) if g != left]
        new = [rgb for rgb, g in zip(train, of, strict=True) if g == left]
        for relight in (False, True):
            model = fitted(network, known, [str(g) for g in of if g != left], relight)
            good, odd, limit = scores(model, new), scores(model, defects), model.threshold().value
            labels = np.repeat([0, 1], [len(good), len(odd)])
            print(
                f"| {folder.name} | {left + 1} of 10 | {'yes' if relight else 'no'} | "
                f"{100 * auroc(labels, np.concatenate([good, odd])):.1f} | {100 * (odd > limit).mean():.0f} % | "
                f"{100 * (good > limit).mean():.1f} % |",
                flush=True,
            )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--sessions", type=int, nargs="+", default=[3, 4, 8])
    parser.add_argument("--spread", type=float, default=0.1)
    parser.add_argument("--repetitions", type=int, default=6)
    parser.add_argument("--left-out", action="store_true")
    arguments = parser.parse_args()
    exported = export_network(load_backbone(*NETWORK), (128, 128))
    if arguments.left_out:
        print("| set | session left out, by brightness | copies | AUROC | defects caught | false alarms |")
        print("| --- | --- | --- | --- | --- | --- |")
    else:
        print("| set | sessions known | copies | AUROC | defects caught | false alarms | worst session's |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
    for path in arguments.folders:
        if arguments.left_out:
            left_out(exported, path)
            continue
        for count in arguments.sessions:
            drawn_lamps(exported, path, count, arguments.spread, arguments.repetitions)
