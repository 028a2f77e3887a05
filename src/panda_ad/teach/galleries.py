# SPDX-License-Identifier: Apache-2.0
"""The gallery of the version in place: which images it holds, and where their files are."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from panda_ad.data.images import Decoding, read_bytes, read_image, require_digest
from panda_ad.data.layouts import image_root
from panda_ad.data.manifest import load_manifest
from panda_ad.data.quarantine import image_suffix
from panda_ad.errors import UserError
from panda_ad.features.cache import Activations, Item
from panda_ad.features.images import CachedImages
from panda_ad.params import Params, plain_name
from panda_ad.params_file import load_params
from panda_ad.registry.new_version import Held
from panda_ad.scoring.bundle import load_bundle
from panda_ad.scoring.config import FitParams
from panda_ad.scoring.detector import Detector
from panda_ad.scoring.refit import Change, changes_of, members
from panda_ad.stages.common import activations_for
from panda_ad.system.files import atomic_file

if TYPE_CHECKING:
    import pandas as pd

TAUGHT = Path("monitoring/taught")
"""Images that were added to galleries, by content: monitoring/taught/<category>/<sha256>.<suffix>."""
_ADDED = "added later"
"""Session of added images where the training images have sessions: a session of its own."""


@dataclass(frozen=True)
class Gallery:
    """Images and model of a registered version.

    Attributes
    ----------
    held : the version.
    detector : its model.
    params : that it was made with, and where images lie now.
    """

    held: Held
    detector: Detector
    params: Params

    @cached_property
    def log(self) -> list[Change]:
        """The changes since it was trained, oldest first."""
        return changes_of(self.detector)

    @cached_property
    def _manifest(self) -> pd.DataFrame:
        with self.held.file("data/manifest.csv") as file:
            return load_manifest(file, self.held.category)

    @cached_property
    def trained(self) -> pd.DataFrame:
        """Manifest rows of the images that it was trained on, in the order of stage `index`."""
        import pandas as pd

        rows = self._manifest
        parts = [rows[rows["split"] == split] for split in ("train", "calibration")]
        return pd.concat(parts).drop_duplicates("sha256")

    @cached_property
    def tests(self) -> pd.DataFrame:
        """Manifest rows of its test images."""
        return self._manifest[self._manifest["split"] == "test"]

    @cached_property
    def activations(self) -> Activations:
        """The cache of its network's activations."""
        return activations_for(self.params, self.detector.network)

    @property
    def paths(self) -> dict[str, str]:
        """Path of each image that it was trained on, by sha256, relative to the data's root."""
        return dict(zip(self.trained["sha256"], self.trained["path"], strict=True))

    @property
    def fit(self) -> FitParams:
        """How it is fitted; the false-alarm rate is the version's."""
        own = self.params
        verdict = own.verdict.model_copy(update={"false_alarm_rate": self.detector.config.false_alarm_rate})
        return FitParams(gallery=own.gallery, localize=own.localize, verdict=verdict, seed=own.seed)

    def members(self, log: Sequence[Change]) -> list[str]:
        """Return its images, sha256, after a log of changes."""
        return members(self.trained["sha256"].tolist(), log)

    def calibrating(self, images: Sequence[str]) -> np.ndarray:
        """Return the indices of the images that calibrate: the training images, or those kept out of the adaptation."""
        rows = self.trained
        held = set(rows["sha256"][rows["split"] == "calibration"]) or set(rows["sha256"])
        return np.flatnonzero([image in held for image in images])

    def sessions(self, images: Sequence[str]) -> list[str]:
        """Return the session of each image."""
        rows = self.trained
        names = rows["session"] if "session" in rows else [""] * len(rows)
        known = dict(zip(rows["sha256"], names, strict=True))
        return [known.get(image, _ADDED if any(known.values()) else "") for image in images]

    def images(self, wanted: Sequence[str]) -> CachedImages:
        """Return images, by sha256, to fit with. Each is compared with its sha256 when it is read."""
        paths, root = self.paths, image_root(self.params)
        found = [root / paths[image] if image in paths else taught(self.held.category, image) for image in wanted]
        return self._cached(
            wanted, found, [paths.get(image, str(path)) for image, path in zip(wanted, found, strict=True)]
        )

    def test_images(self) -> CachedImages:
        """Return its test images."""
        root, names = image_root(self.params), self.tests["path"].tolist()
        return self._cached(self.tests["sha256"].tolist(), [root / name for name in names], names)

    def _cached(self, keys: Sequence[str], paths: Sequence[Path], names: Sequence[str]) -> CachedImages:
        decoding = Decoding.of(self.detector.config)
        items = [
            Item(key, functools.partial(read_image, path, key, decoding)) for key, path in zip(keys, paths, strict=True)
        ]
        self.activations.warm(items, self.detector.levels)
        return CachedImages(self.activations, items, names)


def gallery_of(held: Held) -> Gallery:
    """Return the gallery of a version.

    Raises
    ------
    UserError
        Its files are gone, or its parameters are of another version of this package.
    """
    with held.file("params.yaml") as file:
        own = load_params(file)
    here = own.model_copy(update={"data": own.data.model_copy(update={"root": held.params.data.root})})
    return Gallery(held, load_bundle(held.bundle), here)


def taught(category: str, sha256: str) -> Path:
    """Return where an added image is kept. UserError if it is gone."""
    found = sorted((TAUGHT / plain_name(category)).glob(f"{sha256}*"))
    if not found:
        raise UserError(f"{TAUGHT / plain_name(category)}: {sha256[:12]}, added to the gallery, is gone; bring it back")
    return found[0]


def keep(category: str, sha256: str, file: Path, decoding: Decoding) -> None:
    """Keep a copy of an image that is added to a gallery: its file may be moved or deleted any time.

    UserError where it is not the file of `sha256`.
    """
    path = TAUGHT / plain_name(category) / f"{sha256}{image_suffix(file)}"
    if not path.exists():
        data = read_bytes(file, decoding=decoding)
        require_digest([data], sha256, file)
        with atomic_file(path) as temporary:
            temporary.write_bytes(data)
