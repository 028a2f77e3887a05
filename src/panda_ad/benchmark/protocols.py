# SPDX-License-Identifier: Apache-2.0
"""What is run: jobs of a data set under the paper's protocols, and the settings their figures depend on."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from panda_ad.benchmark.sources import FIRST_20, Images
from panda_ad.errors import UserError
from panda_ad.params import AdaptParams, Params
from panda_ad.system.files import digest_file

Protocol = Literal["one-vs-rest", "leave-one-out"]

FAMILIES: dict[str, tuple[str, ...]] = {
    "raw": ("none", "normalized", "whitened", "ocsvm", "iforest", "gaussian", "deep_svdd"),
    "trajectory": ("compactness", "ses"),
    "ewc": ("ewc",),
    "oe": ("oe",),
}
"""Methods that share their work: the pretrained features, or one training run.

SES keeps the run's snapshots, compactness the last.
"""

OUTLIERS = 4
"""Where training images are limited, at most so many times as many outliers are used."""

METHODS = tuple(method for methods in FAMILIES.values() for method in methods)

TUNING_CLASSES = {
    "cifar10": ("airplane", "bird", "deer", "frog", "ship"),
    "fashion_mnist": ("T-shirt-top", "Trouser", "Pullover", "Dress", "Coat"),
}
"""Normal classes by which whatever is chosen may be chosen.

Tables report them apart from the others. A set that is not named here is for reporting alone.
"""


@dataclass(frozen=True)
class Settings:
    """All that a figure depends on, apart from which data set, class, method and seed.

    Attributes
    ----------
    params : backbone and gallery are used.
    adapt : family ('trajectory', 'ewc', 'oe') -> its `adapt` section.
    train, test : at most so many training images per class and test images per data set or category; None: all.
    """

    params: Params
    adapt: Mapping[str, AdaptParams]
    train: int | None
    test: int | None

    def of(self, family: str, seed: int) -> Params:
        """Return the parameters that a family trains by."""
        return self.params.model_copy(update={"adapt": self.adapt[family], "seed": seed})

    @functools.cached_property
    def contents(self) -> dict[str, str | None]:
        """Return name and hash of what weights, Fisher images and outliers hold, read once.

        Of published weights it is their name.
        """
        weights = self.params.backbone.weights
        given = {
            "fisher": self.adapt["ewc"].fisher,
            "outliers": self.adapt["oe"].outliers if "oe" in self.adapt else None,
        }
        found = {name: None if path is None else _content(Path(path)) for name, path in given.items()}
        return {"weights": _content(Path(weights)) if Path(weights).is_file() else weights, **found}

    def facts(self, family: str) -> dict[str, Any]:
        """Return the part that the cells of a family depend on, as JSON."""
        backbone = self.params.backbone.model_dump(exclude={"cache_gb"})
        backbone["weights"] = self.contents["weights"]
        facts: dict[str, Any] = {
            "backbone": backbone,
            "train": self.train,
            "test": self.test,
            "normalize": self.params.gallery.normalize,
        }
        if family in ("raw", "trajectory", "ewc"):
            facts["k"] = self.params.gallery.k
        if family in ("trajectory", "ewc"):
            facts["whiten"] = self.params.gallery.whiten
        if family in self.adapt:
            unused = {"outliers", "fisher"} | (set() if family == "ewc" else {"ewc_lambda", "fisher_samples"})
            facts["adapt"] = self.adapt[family].model_dump(exclude={"method", *unused})
        if family == "ewc":
            facts["fisher"] = self.contents["fisher"]
        if family == "oe":
            facts["outliers"] = f"{self.contents['outliers']}, at the normal images' resolution"
        return facts

    def key(self, family: str) -> str:
        """Short hash of `facts`."""
        return hashlib.sha256(json.dumps(self.facts(family), sort_keys=True).encode()).hexdigest()[:12]


def _content(path: Path) -> str:
    """Return the name of a file or folder, with a hash of what it holds; of a folder, of its files' names and sizes.

    Raises
    ------
    UserError
        There is no such file or folder.
    """
    if not path.exists():
        raise UserError(f"benchmark: {path}: no such file or folder")
    if path.is_dir():
        listing = sorted(
            (str(file.relative_to(path)), file.stat().st_size) for file in path.rglob("*") if file.is_file()
        )
        return f"{path.name} ({hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:12]})"
    return f"{path.name} ({digest_file(path)[:12]})"


@dataclass(frozen=True)
class Job:
    """One unit of work: the methods of a family, for one normal class of a data set and one seed.

    Attributes
    ----------
    category : '' for one-vs-rest sets, else the MVTec-like category.
    target : what the table has a line for: the normal class, the class left out, or the category.
    normal : the classes that are normal.
    """

    dataset: str
    category: str
    protocol: str
    target: str
    normal: tuple[str, ...]
    seed: int
    family: str
    methods: tuple[str, ...] = field(default=())

    @property
    def label(self) -> str:
        """Short name for people."""
        return f"{self.dataset} {self.target} {self.family} seed {self.seed}"

    def cell_path(self, out: Path, method: str, settings: Settings) -> Path:
        """Where the finished cell of `method` is written."""
        return (
            out
            / "cells"
            / self.dataset
            / f"{self.protocol}-{self.target}"
            / f"{method}-s{self.seed}-{settings.key(self.family)}.json"
        )

    def missing(self, out: Path, settings: Settings) -> list[str]:
        """Methods that have no finished cell yet."""
        return [m for m in self.methods if not self.cell_path(out, m, settings).exists()]


def jobs_of(
    dataset: str,
    sets: Mapping[str, Images],
    protocol: Protocol,
    methods: Sequence[str],
    seeds: Sequence[int],
    classes: Sequence[str] | None,
) -> list[list[Job]]:
    """Jobs of a data set, a list per normal class (or class left out, or category) in the order of its classes.

    Parameters
    ----------
    sets : category -> images, as `read_set` gives them.
    classes : only these classes or categories; None: all (the first 20 of Flowers and CUB, as in the paper).

    Raises
    ------
    UserError
        A method or class is unknown.
    """
    unknown = [m for m in methods if m not in METHODS]
    if unknown:
        raise UserError(f"benchmark: no method {unknown[0]!r}; there are {', '.join(METHODS)}")
    targets = list(_targets(dataset, sets, protocol))
    names = [target for _, target, _ in targets]
    absent = [c for c in classes or () if c not in names]
    if absent:
        raise UserError(f"benchmark: {dataset} has no class {absent[0]!r}; it has {', '.join(names)}")
    result = []
    for category, target, normal in targets:
        if classes and target not in classes:
            continue
        jobs = [
            Job(dataset, category, "category" if category else protocol, target, normal, seed, family, chosen)
            for seed in seeds
            for family, all_methods in FAMILIES.items()
            if (chosen := tuple(m for m in all_methods if m in methods))
        ]
        result.append(jobs)
    return result


def _targets(
    dataset: str, sets: Mapping[str, Images], protocol: Protocol
) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """(category, target, normal classes)."""
    for category, images in sets.items():
        names = list(images.train)
        if category:
            yield category, category, ("good",)
        elif protocol == "leave-one-out":
            for name in names:
                yield "", name, tuple(n for n in names if n != name)
        else:
            for name in names[:20] if dataset in FIRST_20 else names:
                yield "", name, (name,)


def choose(count: int, limit: int | None, name: str) -> np.ndarray:
    """Return sorted indices of at most `limit` of `count` images.

    They are the same at each run and for each seed, method and protocol.
    """
    if limit is None or limit >= count:
        return np.arange(count)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return np.sort(np.random.default_rng(seed).choice(count, limit, replace=False))


def choose_test(images: Images, limit: int | None) -> np.ndarray:
    """Return sorted indices of at most `limit` test images.

    The classes are represented as in the whole set, to within one image.
    """
    if limit is None or limit >= len(images.test):
        return np.arange(len(images.test))
    of_class = np.asarray(images.test_class)
    chosen = []
    for name in sorted(set(images.test_class)):
        members = np.flatnonzero(of_class == name)
        share = max(1, round(limit * len(members) / len(of_class)))
        chosen.append(members[choose(len(members), share, f"test {name}")])
    return np.sort(np.concatenate(chosen))


def train_files(images: Images, normal: Sequence[str], limit: int | None) -> list[Path]:
    """Return training images of the normal classes: at most `limit` in all, drawn evenly from them."""
    share = None if limit is None else max(1, limit // len(normal))
    return [images.train[name][i] for name in normal for i in choose(len(images.train[name]), share, f"train {name}")]
