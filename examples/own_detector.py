# SPDX-License-Identifier: Apache-2.0
"""Fit a model to good images and score others, without DVC, MLflow or Prefect.

    python examples/own_detector.py GOOD_FOLDER BUNDLE IMAGE...

Run it from a folder that holds params.yaml. The model is saved to BUNDLE, which `panda-ad score --bundle` reads too.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from panda_ad.data.images import read_image
from panda_ad.data.listing import image_files
from panda_ad.features.backbones import load_backbone
from panda_ad.features.export import export_network
from panda_ad.features.images import DecodedImages
from panda_ad.params import Params
from panda_ad.params_file import load_params
from panda_ad.scoring.bundle import save_bundle
from panda_ad.scoring.config import FitParams
from panda_ad.scoring.detector import Detector
from panda_ad.scoring.fit import fit_detector


def fit(good: Sequence[np.ndarray], params: Params) -> Detector:
    """Fit a detector to decoded images, uint8 (H, W, 3)."""
    backbone = load_backbone(params.backbone.name, params.backbone.weights)
    network = export_network(backbone, params.backbone.size)
    sections = FitParams(gallery=params.gallery, localize=params.localize, verdict=params.verdict, seed=params.seed)
    return fit_detector(network, DecodedImages(network, good), sections)


if __name__ == "__main__":
    folder, bundle, *files = (Path(argument) for argument in sys.argv[1:])
    detector = fit([read_image(file) for file in image_files([folder])], load_params())
    bundle.mkdir(parents=True)
    save_bundle(detector, bundle)
    for file in files:
        (verdict,) = detector.score([read_image(file)])
        print(f"{file}  {verdict.score:.3f}  p = {verdict.p_value:.3f}  {'defect' if verdict.anomalous else 'good'}")
