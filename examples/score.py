# SPDX-License-Identifier: Apache-2.0
"""Score images with a bundle, without DVC, MLflow or Prefect: python examples/score.py BUNDLE IMAGE..."""

import sys
from pathlib import Path

from panda_ad.data.images import read_image
from panda_ad.scoring.bundle import load_bundle

detector = load_bundle(Path(sys.argv[1]))
for file in sys.argv[2:]:
    (verdict,) = detector.score([read_image(file)])
    print(f"{file}  {verdict.score:.3f}  p = {verdict.p_value:.3f}  {'defect' if verdict.anomalous else 'good'}")
