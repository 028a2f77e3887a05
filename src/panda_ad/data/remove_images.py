# SPDX-License-Identifier: Apache-2.0
"""Take images that turned out to be bad out of the training data; copies of them stay in quarantine."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from panda_ad.data.layouts import image_root
from panda_ad.data.links import refuse_links
from panda_ad.data.manifest import existing_images
from panda_ad.data.quarantine import quarantine
from panda_ad.errors import UserError
from panda_ad.params import Params


def remove_images(params: Params, category: str, named: Sequence[str], reason: str = "") -> list[str]:
    """Move good training images of a category into quarantine/<time> beside the data's root.

    Parameters
    ----------
    named : paths relative to the data's root, or sha256 of the files (8 hex digits or more).
    reason : kept in reasons.csv.

    Returns
    -------
    Their paths, relative to the data's root.

    Raises
    ------
    UserError
        A name is not that of exactly one training image; nothing has been changed.
    """
    if category not in params.categories:
        raise UserError(f"--category: {category!r} is not one of categories in params.yaml")
    if params.data.layout not in ("mvtec", "folders"):
        raise UserError(f"data.layout: {params.data.layout} is a published set, which nothing is taken out of")
    root = image_root(params)
    refuse_links(root)
    there = existing_images(params, category)
    training = [(e.path, r.get("sha256", "")) for e, r in there if e.split == "train" and not e.label]
    found: dict[str, None] = {}
    for name in named:
        digits = re.fullmatch("[0-9a-f]{8,64}", name) is not None
        own = [path for path, sha256 in training if path == name or (digits and sha256.startswith(name))]
        if len(own) != 1:
            said = "several training images begin so" if own else "no training image has this path or sha256"
            raise UserError(f"--remove: {name[:200]}: {said}")
        found[own[0]] = None
    why = f"taken out of the training data{f': {reason}' if reason else ''}"
    quarantine(root.absolute().parent / "quarantine", [(Path(f"{root}/{path}"), why) for path in found])
    for path in found:
        Path(f"{root}/{path}").unlink()
    return list(found)
