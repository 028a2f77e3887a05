# SPDX-License-Identifier: Apache-2.0
"""A model to score with: from the registry, or from a bundle folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from panda_ad.errors import UserError
from panda_ad.scoring.bundle import load_bundle
from panda_ad.scoring.detector import Detector


@dataclass(frozen=True)
class Model:
    """A detector and what it is registered as.

    Attributes
    ----------
    name, version : of the registered version; '' for a bundle folder.
    note : '' or, where an alias was asked for, that a hand put it on this version.
    """

    detector: Detector
    name: str = ""
    version: str = ""
    note: str = ""


def load_model(model: str | None, bundle: Path | None, false_alarm_rate: float | None = None) -> Model:
    """Return the detector of a bundle folder or of a registered model.

    Raises
    ------
    UserError
        Not exactly one of the two is given, or it cannot be loaded.
    """
    if (model is None) == (bundle is None):
        raise UserError("give one of --model models:/NAME@staging and --bundle FOLDER")
    if false_alarm_rate is not None and not 0 < false_alarm_rate < 1:
        raise UserError(f"--false-alarm-rate: a share between 0 and 1 is expected, found {false_alarm_rate}")
    if model is not None:
        from panda_ad.registry.versions import download_version, note_on

        name, version, folder = download_version(model)
        return Model(load_bundle(folder, false_alarm_rate), name, version, note_on(model))
    assert bundle is not None
    return Model(load_bundle(bundle, false_alarm_rate))
