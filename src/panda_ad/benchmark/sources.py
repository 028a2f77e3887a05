# SPDX-License-Identifier: Apache-2.0
"""The paper's data sets: where each is found, which images train and which test, and which class each test image has.

Every set lives under the folder that the environment variable PANDA_BENCH_DATA names, in the layout `SETS` states.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from panda_ad.data import torchvision_sets
from panda_ad.data.listing import image_files
from panda_ad.errors import UserError

# Superclass of each of CIFAR-100's fine classes, in the order of its labels (the paper uses the 20 coarse classes).
_COARSE = (
    "4 1 14 8 0 6 7 7 18 3 3 14 9 18 7 11 3 9 7 11 6 11 5 10 7 6 13 15 3 15 0 11 1 10 12 14 16 9 11 5 "
    "5 19 8 8 15 13 14 17 18 10 16 4 17 4 2 0 17 4 18 17 10 3 2 12 12 16 12 1 9 19 2 10 0 1 16 12 9 13 15 13 "
    "16 19 2 4 6 19 5 5 8 19 18 1 2 15 6 0 17 8 14 13"
)


@dataclass(frozen=True)
class Images:
    """Image files of a data set in a fixed order.

    Attributes
    ----------
    train : class -> its training images.
    test : all test images.
    test_class : the class of each test image.
    """

    train: dict[str, list[Path]]
    test: list[Path]
    test_class: list[str]


@dataclass(frozen=True)
class Source:
    """How a data set is read.

    Attributes
    ----------
    read : folder of the set -> its images; or, per category, -> {category: its images}.
    where : where to get the set and the layout expected, one line.
    per_category : True for MVTec's layout: one model per category, normal means class 'good'.
    """

    read: Callable[[Path], Images] | Callable[[Path], dict[str, Images]]
    where: str
    per_category: bool = False


def _folders(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")) if root.is_dir() else []


def read_class_folders(root: Path) -> Images:
    """Return the images of train/<class>/ and test/<class>/."""
    train = {name: image_files([root / "train" / name]) for name in _folders(root / "train")}
    if not train:
        raise FileNotFoundError(root / "train")
    tests = [(file, name) for name in _folders(root / "test") for file in image_files([root / "test" / name])]
    return Images(train, [file for file, _ in tests], [name for _, name in tests])


def read_mvtec(root: Path) -> dict[str, Images]:
    """Read <category>/train/good/ and <category>/test/<good or defect>/ with image files.

    `root` may be one category itself.
    """
    folders = {p.name: p for p in [root, *(root / name for name in _folders(root))] if (p / "train" / "good").is_dir()}
    if not folders:
        raise FileNotFoundError(root / "<category>" / "train" / "good")
    return {name: read_class_folders(folder) for name, folder in folders.items()}


def _unpacked(layout: str) -> Callable[[Path], Images]:
    """Return a reader of a set that the pipeline unpacks from torchvision's files.

    Torchvision downloads them if it can.
    """

    def read(root: Path) -> Images:
        return read_class_folders(root if (root / "train").is_dir() else torchvision_sets.unpack(layout, root))

    return read


def _cifar100(root: Path) -> Images:
    """CIFAR-100 by its 20 superclasses, as in the paper."""
    fine = _unpacked("cifar100")(root)
    coarse = _COARSE.split()
    if len(fine.train) != len(coarse):
        return fine  # a folder per superclass already
    of_fine = {name: f"superclass-{int(number):02}" for name, number in zip(sorted(fine.train), coarse, strict=True)}
    train: dict[str, list[Path]] = {name: [] for name in sorted(set(of_fine.values()))}
    for name, files in fine.train.items():
        train[of_fine[name]] += files
    return Images(train, fine.test, [of_fine[name] for name in fine.test_class])


def _cub(root: Path) -> Images:
    """Read Caltech-UCSD Birds 200-2011, official split.

    The paper's normal classes are the first 20, its test set the whole.
    """
    root = root if (root / "images.txt").exists() else root / "CUB_200_2011"

    def table(file: str) -> list[str]:
        return [line.split(maxsplit=1)[1].strip() for line in (root / file).read_text().splitlines()]

    train: dict[str, list[Path]] = {}
    test: list[tuple[Path, str]] = []
    for path, training in zip(table("images.txt"), table("train_test_split.txt"), strict=True):
        name = path.split("/")[0]
        if training == "1":
            train.setdefault(name, []).append(root / "images" / path)
        else:
            test.append((root / "images" / path, name))
    return Images(train, [item for item, _ in test], [name for _, name in test])


_FOLDERS = "train/<class>/ and test/<class>/ with image files"

SETS: dict[str, Source] = {
    "cifar10": Source(_unpacked("cifar10"), f"torchvision downloads it; or {_FOLDERS}"),
    "cifar100": Source(
        _cifar100,
        f"torchvision downloads it; or {_FOLDERS}, the classes being the 20 superclasses",
    ),
    "fashion_mnist": Source(
        _unpacked("fashion_mnist"), f"torchvision downloads it (FashionMNIST/raw/*-ubyte); or {_FOLDERS}"
    ),
    "cats_vs_dogs": Source(
        read_class_folders,
        f"Kaggle's 'Dogs vs. Cats' train.zip, sorted into {_FOLDERS}: "
        "the first 10,000 of cat and of dog train, the last 2,500 test",
    ),
    "flowers102": Source(
        _unpacked("flowers102"), "torchvision downloads it (flowers-102/jpg, imagelabels.mat, setid.mat)"
    ),
    "cub": Source(
        _cub, "CUB_200_2011.tgz of Caltech-UCSD Birds 200-2011, unpacked (images.txt, train_test_split.txt, images/)"
    ),
    "dior": Source(
        read_class_folders,
        f"DIOR (Li et al. 2020); crop the boxes of at least 120 px of its 19 larger classes into {_FOLDERS}",
    ),
    "wbc": Source(
        read_class_folders,
        f"Dataset 1 of Zheng et al. 2018 (white blood cells), its 4 large classes, 80/20 in {_FOLDERS}",
    ),
    "mvtec": Source(
        read_mvtec, "MVTec AD, unpacked: <category>/train/good/ and <category>/test/<defect>/", per_category=True
    ),
}

FIRST_20 = ("flowers102", "cub")
"""Sets whose first 20 classes are the normal ones (paper, appendix), while all test images are tested."""


def source_of(name: str, root: Path) -> Source:
    """Return the source of a known set, or of any folder in one of the two generic layouts."""
    if name in SETS:
        return SETS[name]
    if (root / "train").is_dir() and not (root / "train" / "good").is_dir():
        return Source(read_class_folders, _FOLDERS)
    if root.is_dir():
        return Source(read_mvtec, SETS["mvtec"].where, per_category=True)
    raise UserError(
        f"benchmark: no data set {name!r}: known are {', '.join(SETS)}; "
        f"any other name must be a folder of PANDA_BENCH_DATA with {_FOLDERS}"
        " or <category>/train/good/ and <category>/test/<defect>/"
    )


def data_folder() -> Path:
    """Return the folder PANDA_BENCH_DATA; raise UserError if it is unset or no folder."""
    value = os.environ.get("PANDA_BENCH_DATA")
    if not value:
        raise UserError(
            "benchmark: set PANDA_BENCH_DATA to the folder of unpacked data sets (cifar10/, fashion_mnist/, wbc/, ...)"
        )
    if not Path(value).is_dir():
        raise UserError(f"benchmark: PANDA_BENCH_DATA names {value}, which is not a folder; unpack the data sets there")
    return Path(value)


@functools.lru_cache(maxsize=4)
def read_set(name: str, folder: Path) -> dict[str, Images]:
    """Images of a data set found in `folder`/`name`, by category; one-vs-rest sets have the single category ''.

    Raises
    ------
    UserError
        The set is not there (or cannot be downloaded); says where to get it and the layout expected.
    """
    root = folder / name
    source = source_of(name, root)
    try:
        images = source.read(root)
    except (OSError, UserError) as e:
        raise UserError(
            f"benchmark: {name} is not in {root} ({' '.join(str(e).split())[:100]}): get it from {source.where}"
        ) from None
    return images if isinstance(images, dict) else {"": images}
