# SPDX-License-Identifier: Apache-2.0
"""Stage `index`: build a category's model, the bundle."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from panda_ad import __version__
from panda_ad.data.images import Decoding
from panda_ad.errors import UserError
from panda_ad.features.engine import Session
from panda_ad.features.network import ADAPTED, Network
from panda_ad.params import Params
from panda_ad.params_file import load_params
from panda_ad.scoring.bundle import save_bundle
from panda_ad.scoring.config import DetectorConfig, FitParams
from panda_ad.scoring.fit import fit_detector
from panda_ad.scoring.fit_calibration import CALIBRATED
from panda_ad.scoring.relight import light_is_known
from panda_ad.stages.common import (
    activations_for,
    cached_images,
    category_rows,
    check_weights,
    levels_needed,
    network_for,
)
from panda_ad.system.files import atomic_folder
from panda_ad.system.paths import BUILD
from panda_ad.system.processes import keep_freed_memory
from panda_ad.system.stage import run_stage


def main(category: str) -> None:
    """Write build/bundle/<category>."""
    params = load_params()
    keep_freed_memory()
    rows = category_rows(category)
    pretrained = network_for()
    activations = activations_for(params, pretrained)
    good = pd.concat([rows["train"], rows["calibration"]])
    held = len(rows["calibration"])
    train = cached_images(activations, good, params, category)
    activations.warm(train.items, levels_needed(params, pretrained))
    network, classifier, facts = adapted_network(category, pretrained)
    config = DetectorConfig(
        dataset=params.dataset,
        category=category,
        method=facts["method"],
        gray_range=Decoding.of(params.data).gray_range if params.data.gray_range else None,
        max_megapixels=params.data.max_megapixels,
        provenance=provenance(params, pretrained, facts)
        | {"train_images": len(train), "calibration_images": min(held or len(train), CALIBRATED)},
    )
    fit = FitParams(gallery=params.gallery, localize=params.localize, verdict=params.verdict, seed=params.seed)
    unadapted = np.arange(len(good) - held, len(good)) if held else None
    sessions = good["session"].tolist()
    detector = fit_detector(network, train, fit, config, classifier, sessions, unadapted)
    with atomic_folder(BUILD / "bundle" / category) as folder:
        save_bundle(detector, folder)
    limit = detector.threshold()
    copies = " with copies in other sessions' light" if params.gallery.relight and light_is_known(sessions) else ""
    print(
        f"{category}: {len(train)} normal images{copies}, {len(network.steps)} snapshot(s), "
        f"threshold {limit.value:.4g}"
        + (f"; false alarms {limit.sessions}" if limit.sessions else "")
        + (f"; {limit.message}" if limit.message else "")
    )


def adapted_network(category: str, pretrained: Network) -> tuple[Network, dict[str, np.ndarray] | None, dict]:
    """Return what stage `adapt` has left: the network, outlier exposure's classifier, and the facts of adapt.json.

    UserError where a file is missing, or of another network.
    """
    folder = BUILD / "adapt" / category
    try:
        facts = json.loads((folder / "adapt.json").read_text(encoding="utf-8"))
        check_weights(facts["fingerprint"], pretrained.facts.fingerprint, str(folder), f"adapt@{category}")
        sessions = [
            Session((folder / ADAPTED.format(step)).read_bytes(), str(folder / ADAPTED.format(step)))
            if step > 0
            else pretrained.adapted[0]
            for step in facts["steps"]
        ]
        file = folder / "classifier.safetensors"
        classifier = load_file(file) if file.exists() else None
    except (OSError, LookupError, TypeError, ValueError) as e:
        raise UserError(
            f"{folder}: missing or damaged ({type(e).__name__}); run `dvc repro --force --single-item adapt@{category}`"
        ) from None
    return replace(pretrained, adapted=tuple(sessions), steps=tuple(facts["steps"])), classifier, facts


def provenance(params: Params, pretrained: Network, facts: dict) -> dict[str, object]:
    """Return how the model's network was made."""
    return {
        "panda_ad": __version__,
        "backbone": params.backbone.name,
        "weights": params.backbone.weights,
        "fingerprint": pretrained.facts.fingerprint,
        "collapsed_at": facts["collapsed_at"],
        "adaptation": facts["provenance"],
    }


if __name__ == "__main__":
    run_stage("index", main)
