# SPDX-License-Identifier: Apache-2.0
"""Look at the gallery in place: its images and changes, and those images that look least like the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from panda_ad.params_file import load_params
from panda_ad.registry.new_version import version_in_place
from panda_ad.scoring.refit import Change, effective
from panda_ad.scoring.suspects import suspicion
from panda_ad.teach.galleries import gallery_of


@dataclass(frozen=True)
class Listed:
    """A gallery as it is.

    Attributes
    ----------
    model, version : that holds it.
    images : (sha256, path in the data set or '', whether it was added after training).
    log : all changes, oldest first, those taken back too.  standing : those that were not.
    """

    model: str
    version: str
    images: list[tuple[str, str, bool]]
    log: list[Change]
    standing: list[Change]


def listed(category: str) -> Listed:
    """Return the gallery of the version in place. UserError if there is none."""
    with version_in_place(load_params(), category) as held:
        known = gallery_of(held)
        members = known.members(known.log)
        paths = known.paths
        images = [(image, paths.get(image, ""), image not in paths) for image in members]
        return Listed(held.model.name, held.number, images, known.log, effective(known.log))


def suspects(category: str) -> list[tuple[float, str, str]]:
    """Return (suspicion, sha256, path) of the gallery's images, those that look least like the others first."""
    with version_in_place(load_params(), category) as held:
        known = gallery_of(held)
        members = known.members(known.log)
        images = known.images(members)
        found = suspicion(known.detector, images, known.fit)
        return [(float(found[i]), members[i], images.names[i]) for i in np.argsort(-found, kind="stable")]
