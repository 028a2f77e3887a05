# SPDX-License-Identifier: Apache-2.0
"""Training images in the light of other sessions, so that a new lamp of the usual kind is nothing new.

What known sessions differ by in brightness and color says what the next one may bring. Further copies of the training
images, lit as a session drawn from that distribution would light them, join the gallery and the patch memory.
They do not calibrate. Measured in benchmarks/new_lamp.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import trange

from panda_ad.features.images import Images, Index
from panda_ad.features.network import Network
from panda_ad.system.cores import side_by_side

LEAST = 3
"""Sessions that tell by how much they differ."""
COPIES = 2
"""Copies of each training image."""
MOST = 1000
"""Most copies of all; of more images some are drawn. A copy's activations are computed at each fit, not cached."""
_BATCH = 32
_SEEN = 100  # images of a session, drawn at random, that its light is taken from
_LEAST_LIGHT = 1 / 255  # a darker channel counts as that bright


@dataclass(frozen=True)
class Relit:
    """Images and, after them, copies in another light (`features.images.Images`).

    Attributes
    ----------
    of : N images.
    network : computes the copies' activations.
    sources : int64 (N + C,), index of the image that each is or is a copy of.
    gains : float64 (C, 3), factors of each copy's R, G and B.
    """

    of: Images
    network: Network
    sources: np.ndarray
    gains: np.ndarray

    @property
    def names(self) -> Sequence[str]:
        """See `Images`: a copy has its image's."""
        return [self.of.names[i] for i in self.sources]

    @property
    def keys(self) -> Sequence[str]:
        """See `Images`: a copy has its image's."""
        return [self.of.keys[i] for i in self.sources]

    def __len__(self) -> int:
        return len(self.sources)

    def read(self, index: int) -> np.ndarray:
        """See `Images`."""
        rgb = self.of.read(int(self.sources[index]))
        copy = index - len(self.of)
        return rgb if copy < 0 else lit(rgb, self.gains[copy])

    def activations(self, index: Index, levels: Sequence[str]) -> dict[str, np.ndarray]:
        """See `Images`."""
        rows = np.arange(len(self))[index]
        own = rows < len(self.of)
        parts = [self.of.activations(rows[own], levels)] if own.any() else []
        for start in range(0, int((~own).sum()), _BATCH):
            pixels = side_by_side(lambda i: self.read(int(i)), rows[~own][start : start + _BATCH])
            parts.append(self.network.activations(self.network.preprocess(pixels)))
        place = np.argsort(np.concatenate([np.flatnonzero(own), np.flatnonzero(~own)]))
        return {level: np.concatenate([part[level] for part in parts])[place] for level in levels}

    def pretrained(self, index: Index) -> np.ndarray | None:
        """See `Images`: unknown where a copy is among them."""
        rows = np.arange(len(self))[index]
        return self.of.pretrained(rows) if (rows < len(self.of)).all() else None


def light_is_known(sessions: Sequence[str]) -> bool:
    """Return whether sessions, of each image, '' where it has none, are enough to tell by how much light differs."""
    return len(set(sessions) - {""}) >= LEAST


def relit(images: Images, sessions: Sequence[str], network: Network, seed: int) -> tuple[Images, np.ndarray]:
    """Return the images with `COPIES` of each in the light of further sessions, and `Relit.sources`.

    Of each channel's mean the logarithm is taken. A further session's is drawn from the normal distribution of the
    known sessions' means (G of them: mean m, covariance S (1 + 1 / G)); the copy's gains lead there from its own
    session's. With fewer than `LEAST` sessions there are no copies, and none of images whose session is not known ('').

    Parameters
    ----------
    sessions : of each image; () where they are not known, or where no copies are wanted.
    network : computes the copies' activations.
    """
    count, of = len(images), np.array(sessions, dtype=str)
    if not light_is_known(sessions):
        return images, np.arange(count)
    names = np.unique(of[of != ""])
    known = len(names)
    rng = np.random.default_rng(seed)
    means = np.empty((known, 3))
    for g in trange(known, desc="light", unit="session", disable=None):
        some = rng.permutation(np.flatnonzero(of == names[g]))[:_SEEN]
        means[g] = np.log([_light(images.read(int(i))) for i in some]).mean(axis=0)
    copied = np.sort(rng.permutation(np.repeat(np.flatnonzero(of != ""), COPIES))[:MOST])
    covariance = np.cov(means, rowvar=False) * (1 + 1 / known)
    drawn = rng.multivariate_normal(means.mean(axis=0), covariance, len(copied), method="eigh")
    gains = np.exp(drawn - means[np.searchsorted(names, of[copied])])
    sources = np.concatenate([np.arange(count), copied])
    return Relit(images, network, sources, gains), sources


def lit(rgb: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """Return an image, uint8 (H, W, 3), with its channels multiplied by gains (3,), clipped at 255."""
    return np.asarray(np.clip(np.rint(rgb * gains.astype(np.float32)), 0, 255), np.uint8)


def _light(rgb: np.ndarray) -> np.ndarray:
    return np.asarray(np.maximum(rgb.reshape(-1, 3).mean(axis=0) / 255, _LEAST_LIGHT))
