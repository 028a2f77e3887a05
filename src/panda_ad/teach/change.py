# SPDX-License-Identifier: Apache-2.0
"""Teach the version in place without training: add images to its gallery, remove some, take the last change back.

Each change is a version of its own, evaluated on the test images and put in place by the gate. Its bundle keeps the
changes since training, with who, when and why.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from panda_ad.data.images import Decoding, read_image
from panda_ad.errors import UserError
from panda_ad.params import plain_name
from panda_ad.params_file import load_params
from panda_ad.registry import audit
from panda_ad.registry.lineage import CHANGED
from panda_ad.registry.new_version import Successor, succeed, version_to_change
from panda_ad.registry.promote import Decision
from panda_ad.scoring.refit import LOG, Change, checked, refit, taken_back, with_provenance
from panda_ad.stages.evaluate import measured, no_scores, score_cached, write_measured
from panda_ad.system.files import digest_file
from panda_ad.teach.galleries import Gallery, gallery_of, keep

_SHORT = 12
"""Hex digits of a sha256 that people write."""


def add(category: str, files: Sequence[Path] | Mapping[str, Path]) -> Decision:
    """Add good images to the gallery of the version in place.

    Parameters
    ----------
    files : the images; as a mapping, by the sha256 that each has to have.

    Raises
    ------
    UserError
        A file is no image, is there already or is a test image; no version is in place, a file of it is gone, ...
    Busy
        Another run is at work.
    """
    known = files if isinstance(files, Mapping) else {digest_file(file): file for file in files}
    return _change(category, "add", known)


def remove(category: str, images: Sequence[str]) -> Decision:
    """Remove images, by sha256 or its first digits (eight or more), or by path, with all that followed from them."""
    return _change(category, "remove", dict.fromkeys(images, Path()))


def undo(category: str) -> Decision:
    """Take the last change of the gallery in place back."""
    return _change(category, "undo", {})


def _change(category: str, what: str, named: Mapping[str, Path]) -> Decision:
    with version_to_change(load_params(), category, f"gallery {what} of {category}") as held:
        known = gallery_of(held)
        trained = known.trained["sha256"].tolist()
        if what == "undo":
            images = taken_back(known.log).images
        elif what == "add":
            checked(trained, known.log, "add", list(named))
            images = _admitted(known, named)
        else:
            images = tuple(_identified(known, name) for name in named)
            checked(trained, known.log, "remove", images)
        who, why = audit.acting()
        change = Change(what=what, images=images, who=who, why=why, when=audit.now())  # type: ignore[arg-type]
        return _put_in_place(known, change)


def _put_in_place(known: Gallery, change: Change) -> Decision:
    held, log = known.held, [*known.log, change]
    members = known.members(log)
    detector = refit(
        known.detector, known.images(members), known.fit, known.calibrating(members), known.sessions(members)
    )
    detector = with_provenance(detector, {LOG: [c.model_dump() for c in log], "scores_of_versions": None})
    tests = known.tests
    scores = score_cached(detector, known.test_images()) if len(tests) else no_scores(detector)
    found = measured(detector, known.params, tests, scores)
    said = f"gallery {change.what} {', '.join(image[:_SHORT] for image in change.images[:3])}"
    said += f" and {len(change.images) - 3} more" if len(change.images) > 3 else ""
    new = Successor(
        detector,
        f"{said} ({change.when})",
        f"panda-ad gallery {change.what}",
        f"Version {held.number} with {said}: {len(members)} images.",
        said,
        tags={"panda.calibration_images": str(len(detector.calibration)), CHANGED: str(len(log))},
    )
    return succeed(held, new, lambda folder: write_measured(folder / plain_name(held.category), found))


def _admitted(known: Gallery, files: Mapping[str, Path]) -> tuple[str, ...]:
    """Check and keep the files that are to be added; return their sha256 in ascending order."""
    tests, decoding = set(known.tests["sha256"]), Decoding.of(known.detector.config)
    for sha256, file in files.items():
        if sha256 in tests:
            raise UserError(f"{file}: a test image of this version; what the model knows cannot test it")
        read_image(file, sha256, decoding)
    for sha256, file in files.items():
        keep(known.held.category, sha256, file, decoding)
    return tuple(sorted(files))


def _identified(known: Gallery, name: str) -> str:
    """Return the sha256 of the gallery's image that a person named."""
    by_path = dict(zip(known.trained["path"], known.trained["sha256"], strict=True))
    found = {by_path[name]} if name in by_path else set()
    if re.fullmatch("[0-9a-f]{8,64}", name):
        found = {image for image in known.members(known.log) if image.startswith(name)}
    if len(found) != 1:
        said = "several images of the gallery begin so" if found else "no image of the gallery has this path or sha256"
        raise UserError(f"gallery remove: {name[:200]}: {said}; `panda-ad gallery list` names them")
    return found.pop()
