# SPDX-License-Identifier: Apache-2.0
"""A gallery as data: which images belong to it after changes, and the model of exactly these.

The adapted layers stay; gallery, whitening, patch memory, scales and calibration are fitted anew. Nothing that is
fitted outlives a change, so that changes give the model of the set that they lead to, whatever the way there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from panda_ad.errors import UserError
from panda_ad.features.images import Images
from panda_ad.scoring.config import FitParams
from panda_ad.scoring.detector import Detector
from panda_ad.scoring.fit import fit_detector
from panda_ad.scoring.fit_calibration import CALIBRATED

LOG = "gallery"
"""Entry of a bundle's provenance that holds the changes, oldest first; absent where there were none."""


class Change(BaseModel):
    """A change of a gallery.

    Attributes
    ----------
    what : `undo` takes back the last `add` or `remove` that still stands.
    images : sha256 of the images' files, hex; of an undo, those of the change that it takes back.
    who, why, when : for the record.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    what: Literal["add", "remove", "undo"]
    images: tuple[str, ...]
    who: str = ""
    why: str = ""
    when: str = ""


def changes_of(detector: Detector) -> list[Change]:
    """Return the changes that led from the trained model to this one, oldest first."""
    return [Change(**entry) for entry in detector.config.provenance.get(LOG, [])]


def effective(log: Sequence[Change]) -> list[Change]:
    """Return the changes of a log that were not taken back."""
    standing: list[Change] = []
    for change in log:
        if change.what != "undo":
            standing.append(change)
        elif standing:
            standing.pop()
    return standing


def members(trained: Sequence[str], log: Sequence[Change]) -> list[str]:
    """Return the sha256 of a gallery's images after a log of changes.

    Those that the model was trained on keep their order, added ones follow in the order of their sha256. Order decides
    draws and folds, so it has to be the set's, not that of the way to it.
    """
    held = dict.fromkeys(trained)
    for change in effective(log):
        for image in change.images:
            if change.what == "add":
                held[image] = None
            else:
                held.pop(image, None)
    known = frozenset(trained)
    return [image for image in trained if image in held] + sorted(held.keys() - known)


def checked(
    trained: Sequence[str], log: Sequence[Change], what: Literal["add", "remove"], images: Sequence[str]
) -> None:
    """Raise UserError where a change names no image, or one that is there already or is not there."""
    held = set(members(trained, log))
    wrong = [image for image in images if (image in held) == (what == "add")]
    if wrong or not images:
        said = "is in the gallery already" if what == "add" else "is not in the gallery"
        raise UserError(f"gallery {what}: {wrong[0][:64]} {said}" if wrong else f"gallery {what}: name an image")


def taken_back(log: Sequence[Change]) -> Change:
    """Return the change that an undo would take back. UserError if none stands."""
    standing = effective(log)
    if not standing:
        raise UserError("gallery undo: no change of this gallery is left to take back")
    return standing[-1]


def refit(
    detector: Detector, images: Images, params: FitParams, calibrating: np.ndarray, sessions: Sequence[str] = ()
) -> Detector:
    """Fit a detector to other images with the adapted layers of a given one.

    Parameters
    ----------
    detector : whose network, classifier and configuration are kept; nothing else of it is.
    images : of the gallery, in the order of `members`.
    calibrating : ascending indices of the images whose out-of-fold scores calibrate. An added image is none of them:
        people add what raised an alarm, and such a choice says nothing of how often good parts do.
    sessions : of each image; () where they are not known.

    Raises
    ------
    UserError
        Too few images are left.
    """
    if not len(calibrating):
        raise UserError("gallery: none of the images that the model was trained on is left; train anew")
    detector = fit_detector(
        detector.network, images, params, detector.config, detector.classifier, sessions, calibrating
    )
    counts: dict[str, Any] = {
        "train_images": len(images),
        "calibration_images": min(len(calibrating), CALIBRATED),
    }
    return with_provenance(detector, counts)


def with_provenance(detector: Detector, facts: dict[str, Any]) -> Detector:
    """Return a detector with further facts on how it was made; a fact of None goes."""
    known = {k: v for k, v in (detector.config.provenance | facts).items() if v is not None}
    return replace(detector, config=detector.config.model_copy(update={"provenance": known}))
