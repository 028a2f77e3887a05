"""From folders of images to a list of entries: which image is in which category and split, with what label and mask.

Two layouts (parameter `data.layout`):

- `mvtec`: `<category>/train/good/*`, `<category>/test/good/*`, `<category>/test/<defect>/*` and, optional,
  `<category>/ground_truth/<defect>/<stem>_mask.*` (or `<stem>.*`).
- `folders`: `train/<class>/*` and `test/<class>/*`. A category is one class, or the classes of `data.normal_classes`: it trains on
  those in train/, and tests on all of test/, where every other class is anomalous. torchvision's sets are read as this.

Hidden files and the droppings of file managers are passed over; every other file in an image folder counts as an image. What
lies where the layout has no place for it becomes an entry with its `problem`, so that nothing is left out in silence.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from panda_ad.data import torchvision_sets
from panda_ad.errors import UserError
from panda_ad.params import Params

_DROPPINGS = {"thumbs.db", "desktop.ini", "__macosx"}


@dataclass(frozen=True)
class Entry:
    """One image of one category.

    Attributes
    ----------
    path, mask : POSIX, relative to the data's root; mask '' where there is none.
    category, defect : names; defect 'good' for normal images.
    split : 'train' or 'test'.  label : 0 normal, 1 anomalous.
    stratum : the folder that `limit_test` draws from in proportion.
    problem : '' or why the file cannot be used whatever it holds.
    """

    path: str
    category: str
    split: str
    label: int
    defect: str
    mask: str = ""
    stratum: str = "good"
    problem: str = ""


def image_root(params: Params) -> Path:
    """The folder that manifest paths are relative to; a torchvision set is unpacked first where it is not yet."""
    if params.data.layout in torchvision_sets.SETS:
        return torchvision_sets.unpack(params.data.layout, Path(params.data.root))
    return Path(params.data.root)


def list_entries(params: Params, root: Path) -> list[Entry]:
    """All images of the categories in `params`, in the order of categories, then of paths.

    Raises
    ------
    UserError
        The root or a category's folder is missing; the message lists what was found instead.
    """
    if not root.is_dir():
        raise UserError(
            f"data.root: no folder {root}; run dvc pull for the sample, or point data.root at a folder of images"
        )
    listing = _mvtec if params.data.layout == "mvtec" else _folders
    return [entry for category in params.categories for entry in listing(params, root, category)]


def _mvtec(params: Params, root: Path, category: str) -> Iterator[Entry]:
    folder = root / category
    if not folder.is_dir():
        found = [p.name for p in visible(root) if (p / "train").is_dir() or (p / "test").is_dir()]
        raise UserError(f"categories: no folder {category!r} in {root}; {_found(found)}")
    for split in ("train", "test"):
        for child in visible(folder / split):
            defect, label = child.name, int(child.name != "good")
            if child.is_dir():
                yield from _images(root, child, category, split, label, defect, folder / "ground_truth" / defect)
            else:
                yield _stray(
                    root,
                    child,
                    category,
                    split,
                    f"lies beside the folders of images: move it into {split}/good or {split}/<defect>",
                )


def _images(
    root: Path, folder: Path, category: str, split: str, label: int, defect: str, mask_folder: Path | None
) -> Iterator[Entry]:
    """A folder's images, with their masks where they are defective."""
    masks = {}
    if label and split == "test" and mask_folder is not None:
        masks = {p.stem: p for p in visible(mask_folder)}
    used = set()
    for path in visible(folder):
        if path.is_dir():
            yield _stray(
                root,
                path,
                category,
                split,
                "is a folder inside a folder of images and is not read: move its images up",
                label,
                defect,
            )
            continue
        mask = masks.get(f"{path.stem}_mask") or masks.get(path.stem)
        used.add(mask)
        problem = ""
        if label and split == "train" and mask_folder is not None:
            problem = "a defective image in train: only train/good may hold training images"
        yield _entry(root, path, category, split, label, defect, _relative(root, mask) if mask else "", defect, problem)
    for mask in masks.values():
        if mask not in used:
            yield _stray(root, mask, category, split, f"is a mask without an image in {split}/{defect}", label, defect)


def _folders(params: Params, root: Path, category: str) -> Iterator[Entry]:
    normal = params.data.normal_classes.get(category, [category])
    classes = {split: [p for p in visible(root / split) if p.is_dir()] for split in ("train", "test")}
    for name in normal:
        if name not in {p.name for p in classes["train"]}:
            key = f"data.normal_classes.{category}" if category in params.data.normal_classes else "categories"
            raise UserError(
                f"{key}: no class {name!r} in {root / 'train'}; {_found([p.name for p in classes['train']])}"
            )
    for split in ("train", "test"):
        for folder in classes[split]:
            label = int(folder.name not in normal)
            if split == "train" and label:
                continue
            for e in _images(root, folder, category, split, label, folder.name if label else "good", None):
                yield Entry(**{**e.__dict__, "stratum": folder.name})
        for path in visible(root / split):
            if not path.is_dir():
                yield _stray(
                    root, path, category, split, f"lies beside the class folders: move it into {split}/<class>"
                )


def visible(folder: Path) -> list[Path]:
    """A folder's entries in the order of their names, without hidden ones and file managers' droppings; none where there is no such folder."""
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as e:
        raise UserError(f"{folder}: cannot be listed ({e.strerror})") from None
    return [folder / name for name in names if not name.startswith(".") and name.lower() not in _DROPPINGS]


def _entry(
    root: Path,
    path: Path,
    category: str,
    split: str,
    label: int,
    defect: str,
    mask: str = "",
    stratum: str = "good",
    problem: str = "",
) -> Entry:
    relative = _relative(root, path)
    for text in (relative, mask):
        if printable(text) != text:
            problem, mask, relative = "its name is not valid UTF-8: rename it", printable(mask), printable(relative)
    return Entry(relative, category, split, label, printable(defect), mask, printable(stratum), problem)


def _stray(
    root: Path, path: Path, category: str, split: str, problem: str, label: int = 0, defect: str = "good"
) -> Entry:
    return _entry(root, path, category, split, label, defect, problem=problem)


def _relative(root: Path, path: Path) -> str:
    return PurePosixPath(path.relative_to(root)).as_posix()


def printable(text: str) -> str:
    """The text with bytes that are not UTF-8 (which Python keeps as lone surrogates) written as \\x escapes."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def _found(names: list[str]) -> str:
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return f"found: {shown}" if names else "it holds none at all"
