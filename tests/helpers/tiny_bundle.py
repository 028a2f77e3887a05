# SPDX-License-Identifier: Apache-2.0
"""A small model with everything that a bundle can hold, of images of noise; made in a second."""

from pathlib import Path

from conftest import REPO, noise

from panda_ad.features.backbones import load_backbone
from panda_ad.features.export import export_network
from panda_ad.features.images import DecodedImages
from panda_ad.params_file import load_params
from panda_ad.scoring.bundle import save_bundle
from panda_ad.scoring.config import DetectorConfig, FitParams
from panda_ad.scoring.fit import fit_detector


def make_bundle(folder: Path, seed: int = 0, images: int = 18) -> Path:
    """Write a bundle of category `nut` into an existing, empty folder."""
    params = load_params(REPO / "params.yaml")
    backbone = load_backbone("embedded")
    network = export_network(backbone, (32, 32))
    fit = FitParams(gallery=params.gallery, localize=params.localize, verdict=params.verdict)
    good = [noise(seed + i) for i in range(images)]
    save_bundle(fit_detector(network, DecodedImages(network, good), fit, DetectorConfig(category="nut")), folder)
    return folder
