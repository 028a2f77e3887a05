# SPDX-License-Identifier: Apache-2.0
"""torchvision's CIFAR10, CIFAR100, FashionMNIST and Flowers102, unpacked once to class-per-folder images.

They are read by `torchvision.datasets` from `data.root`, where torchvision keeps the originals, and puts them if it can
download them. They are written, without loss, to `.cache/datasets/<name>/{train,test}/<class>/<index>.png`.
Flowers102's files are JPEG already and are copied.
From there on they are a data set in the layout `folders`.

Splits are the published ones; Flowers102 trains on its train and val parts together (20 images per class).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from panda_ad.errors import UserError
from panda_ad.system.files import atomic_folder, write_json

CACHE = Path(".cache") / "datasets"

SETS = {
    "cifar10": (
        "CIFAR10",
        "cifar-10-batches-py",
        ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch", "batches.meta"],
    ),
    "cifar100": ("CIFAR100", "cifar-100-python", ["train", "test", "meta"]),
    "fashion_mnist": (
        "FashionMNIST",
        "FashionMNIST/raw",
        ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"],
    ),
    "flowers102": ("Flowers102", "flowers-102", ["imagelabels.mat", "setid.mat", "jpg"]),
}
"""Layout name -> torchvision's class, and the folder and files it reads under data.root."""


def class_folder(name: str) -> str:
    """Return a class's name as folder and category: 'T-shirt/top' -> 'T-shirt-top', "colt's foot" -> 'colts foot'."""
    return re.sub(r"[/\\:%@]+", "-", name).replace("'", "").replace('"', "").lstrip(".")


def unpack(layout: str, root: Path) -> Path:
    """Return the folder `.cache/datasets/<layout>` with the whole set in it.

    It is written now where it is missing or its source has changed.

    Raises
    ------
    UserError
        The set is not under `root` and cannot be downloaded, or is damaged; names the files expected.
    """
    name, folder, files = SETS[layout]
    target, stamp = CACHE / layout, _stamp(root / folder, files)
    if stamp is None and (target / "source.json").is_file():
        return target  # the originals were removed after unpacking
    if (target / "source.json").is_file() and json.loads((target / "source.json").read_text()) == stamp:
        return target
    with atomic_folder(target) as temporary:
        for split in ("train", "test"):
            _write(temporary / split, _images(layout, root, split), f"unpack {name} {split}")
        write_json(temporary / "source.json", _stamp(root / folder, files))
    return target


def _stamp(folder: Path, files: list[str]) -> dict[str, list[int]] | None:
    """Return size and time of each source file; None where one is missing."""
    try:
        return {file: [(s := (folder / file).stat()).st_size, s.st_mtime_ns] for file in files}
    except OSError:
        return None


def _images(layout: str, root: Path, split: str) -> Iterable[tuple[str, Any]]:
    """Return (class folder, picture) of each image of a split; a picture is a PIL image or a path to copy from."""
    import torchvision.datasets

    name, folder, files = SETS[layout]
    dataset = getattr(torchvision.datasets, name)
    try:
        root.mkdir(parents=True, exist_ok=True)
        if layout == "flowers102":
            parts = [
                dataset(root, part, download=True) for part in (["train", "val"] if split == "train" else ["test"])
            ]
            return _flowers(parts)
        loaded = dataset(root, train=split == "train", download=True)
        return ((class_folder(loaded.classes[label]), image) for image, label in loaded)
    except (
        Exception
    ) as e:  # torchvision raises RuntimeError, URLError, OSError, and struct's, pickle's and numpy's errors on damage
        reason = " ".join(str(e).split())[:120] or type(e).__name__
        raise UserError(
            f"data.layout {layout}: torchvision cannot read or download {name} ({reason}); "
            f"put {', '.join(files)} into {root / folder} (unpacked from the original archive), "
            "or set data.root to where it is"
        ) from None


def _flowers(parts: list[Any]) -> Iterator[tuple[str, Path]]:
    # torchvision offers the files' paths under private names only; to decode 8,000 photos and write PNG takes 5 GB
    for part in parts:
        for file, label in zip(part._image_files, part._labels, strict=True):
            yield class_folder(part.classes[label]), Path(file)


def _write(folder: Path, images: Iterable[tuple[str, Any]], title: str) -> None:
    from tqdm import tqdm

    for index, (name, picture) in enumerate(tqdm(images, desc=title, unit="image", disable=None)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        if isinstance(picture, Path):
            try:
                shutil.copyfile(picture, folder / name / f"{index:05d}{picture.suffix}")
            except FileNotFoundError:
                raise UserError(f"{picture}: missing from the set; unpack its original archive again") from None
        else:
            picture.save(folder / name / f"{index:05d}.png", compress_level=1)
