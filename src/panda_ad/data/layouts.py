# SPDX-License-Identifier: Apache-2.0
"""From folders of images to a list of entries: each image's category, split, label and mask.

Two layouts (parameter `data.layout`):

- `mvtec`: `<category>/train/good/*`, `<category>/test/good/*`, `<category>/test/<defect>/*` and, optional, masks
  (`mask_files`). `<category>/validation/good/*` (MVTec LOCO) are training images too.
- `folders`: `train/<class>/*` and `test/<class>/*`. A category is one class, or the classes of `data.normal_classes`.
  It trains on those in train/, and tests on all of test/, where every other class is anomalous.
  torchvision's sets are read as this.

What lies where the layout has no place for it becomes an entry with its `problem`, and files that are no images are
counted in a warning, so that nothing is left out in silence.
Names are compared as people read them, whatever their Unicode form.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from panda_ad.data import torchvision_sets
from panda_ad.data.links import refuse_links
from panda_ad.data.listing import describe, is_image, nfc, printable, same_name, visible
from panda_ad.data.mask_files import MASK_FOLDERS, MaskFiles
from panda_ad.errors import UserError
from panda_ad.params import Params

SPLITS = {"train": "train", "test": "test", "validation": "train", "val": "train"}
"""Folder of a category -> split."""
GOOD_NAMES = frozenset([
    "good", "goods", "ok", "okay", "io", "normal", "nominal", "pass", "passed", "gut", "defect_free", "defect-free",
    "non_defective", "no_defect",
])  # fmt: skip
"""Folder names, of good parts, that must not be taken for a kind of defect; all but the first stop a data set."""


@dataclass(frozen=True)
class Entry:
    """One image of one category.

    Attributes
    ----------
    path, mask : POSIX, relative to the data's root.
        `mask` is '' where there is none, a folder where it is several files to join.
    category, defect : names; defect 'good' for normal images.
    split : 'train' or 'test'.
    label : 0 normal, 1 anomalous.
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


@dataclass(frozen=True)
class Listing:
    """The entries of a data set in the order of categories, then of paths, and a line on each thing passed over."""

    entries: list[Entry] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Folder:
    """A folder of images, and what all images in it are."""

    root: Path
    path: Path
    category: str
    split: str
    label: int
    defect: str
    sessions: bool = False  # whether it may hold a folder of images per session

    def entry(self, path: Path, mask: Path | None = None, problem: str = "") -> Entry:
        """Return one of its files as an entry; a name that is not UTF-8 is a problem, since no table could hold it."""
        relative, mask_name = _relative(self.root, path), _relative(self.root, mask) if mask else ""
        if any(printable(text) != text for text in (relative, mask_name)):
            problem = "its name is not valid UTF-8: rename it"
        defect = printable(self.defect)
        names = printable(relative), self.category, self.split, self.label, defect, printable(mask_name)
        return Entry(*names, stratum=defect, problem=printable(" ".join(problem.split())))


def image_root(params: Params) -> Path:
    """Return the folder that manifest paths are relative to; a torchvision set is unpacked first if it is not yet."""
    if params.data.layout in torchvision_sets.SETS:
        return torchvision_sets.unpack(params.data.layout, Path(params.data.root))
    return Path(params.data.root)


def list_entries(params: Params, root: Path) -> Listing:
    """List all images of the categories in `params`.

    Raises
    ------
    UserError
        The root or a category's folder is missing (the message lists what was found instead), or holds links (`links`).
    """
    if not root.is_dir():
        raise UserError(
            f"data.root: no folder {root}; run dvc pull for the sample, or point data.root at a folder of images"
        )
    refuse_links(root)
    listing = Listing()
    layout = LAYOUTS.get(params.data.layout, _folders)  # torchvision's sets are unpacked as class folders
    for category in params.categories:
        passed: list[Path] = []
        listing.entries.extend(layout(params, root, category, passed, listing.warnings))
        if passed:
            listing.warnings.append(
                f"{category}: files that are no images to read were passed over: {describe(passed)}"
            )
    return Listing(listing.entries, [printable(" ".join(line.split())) for line in listing.warnings])


def category_folder(root: Path, category: str) -> Path:
    """Return a category's folder, in whatever Unicode form its name is written on this disk."""
    return next((p for p in visible(root) if same_name(p.name, category) and p.is_dir()), root / category)


def _mvtec(params: Params, root: Path, category: str, passed: list[Path], warnings: list[str]) -> Iterator[Entry]:
    folder = category_folder(root, category)
    if not folder.is_dir():
        found = [p.name for p in visible(root) if (p / "train").is_dir() or (p / "test").is_dir()]
        raise UserError(f"categories: no folder {category!r} in {root}; {_found(found)}")
    found_splits: dict[str, list[Path]] = {name: [] for name in SPLITS}
    mask_folders = []
    for child in visible(folder):
        name = child.name.casefold()
        if not child.is_dir():
            passed.append(child)
        elif name in SPLITS:
            found_splits[name].append(child)
        elif name in MASK_FOLDERS:
            mask_folders.append(child)
        else:
            warnings.append(f"{category}: {child} is not read: the layout has no such folder")
    if extra := [p for name in ("validation", "val") for p in found_splits[name]]:
        warnings.append(f"{category}: {', '.join(map(str, extra))} read as training images")
    names = [nfc(p.name) for tests in found_splits["test"] for p in visible(tests) if p.is_dir()]
    warnings += [
        f"{category}: kinds of defect that differ by case or by marks at their ends only: {t}" for t in _twins(names)
    ]
    masks = MaskFiles(mask_folders, passed)
    for name in ("train", "validation", "val", "test"):
        for split_folder in found_splits[name]:
            part = _Folder(root, split_folder, category, SPLITS[name], 0, "good", params.data.sessions == "folder")
            yield from _split(part, masks, passed)
    for path, problem in masks.unused():
        yield _Folder(root, path, category, "test", 1, "good").entry(path, problem=problem)


def alike(name: str) -> str:
    """Return what names have in common that a file system or a person may take for one another."""
    return name.casefold().strip(" ._-")


def _twins(names: Iterable[str]) -> Iterator[str]:
    """Yield the names, quoted, that are `alike`; 'good' in any case is one."""
    groups: dict[str, set[str]] = defaultdict(set)
    for name in names:
        groups[alike(name)].add(name)
    for key, group in sorted(groups.items()):
        if len(group) > 1 and key != "good":
            yield ", ".join(map(repr, sorted(group)))


def _split(split: _Folder, masks: MaskFiles, passed: list[Path]) -> Iterator[Entry]:
    """Yield the images of one of a category's train, validation and test folders."""
    kinds = [child for child in visible(split.path) if child.is_dir()]
    where = split.path.name
    if split.split == "test":
        masks.kinds = [nfc(p.name) for p in kinds if p.name.casefold() != "good"]
        masks.claim_direct(
            {nfc(p.name): [f for f in _files(p, split.sessions) if f.is_file() and is_image(f)] for p in kinds}
        )
    for child in visible(split.path):
        defect = nfc(child.name)
        if not child.is_dir():
            if is_image(child):
                problem = f"lies beside the folders of images: move it into {where}/good or {where}/<defect>"
                yield split.entry(child, problem=problem)
            else:
                passed.append(child)
        elif defect.casefold() != "good" and (defect.casefold() in GOOD_NAMES or alike(defect) == "good"):
            problem = (
                f"is this the folder of good images? Then call it {where}/good; a kind of defect needs another name"
            )
            yield split.entry(child, problem=problem)
        elif defect.casefold() == "good":
            yield from _images(replace(split, path=child), passed)
        else:
            part = replace(split, path=child, label=1, defect=defect)
            yield from _images(part, passed, masks if split.split == "test" else None)


def _images(folder: _Folder, passed: list[Path], masks: MaskFiles | None = None) -> Iterator[Entry]:
    """Yield a folder's images, with their masks where there are any."""
    files = []
    for path in _files(folder.path, folder.sessions):
        if path.is_dir():
            deep = path.parent != folder.path
            hint = "" if deep else ", or set data.sessions: folder where each such folder is a session"
            problem = f"is a folder inside a folder of images and is not read: move its images up{hint}"
            yield folder.entry(path, problem=problem)
        elif is_image(path):
            files.append(path)
        else:
            passed.append(path)
    pairs = masks.of(folder.defect, files) if masks is not None else {}
    for path in files:
        mask, problem = pairs.get(path, (None, ""))
        yield folder.entry(path, mask, problem)


def _files(folder: Path, sessions: bool) -> list[Path]:
    """Return a folder's entries; with `sessions`, the entries of each folder in it in place of that folder."""
    entries = visible(folder)
    return [f for p in entries for f in (visible(p) if p.is_dir() else [p])] if sessions else entries


def _folders(params: Params, root: Path, category: str, passed: list[Path], warnings: list[str]) -> Iterator[Entry]:
    normal = [nfc(name) for name in params.data.normal_classes.get(category, [category])]
    classes = {split: [p for p in visible(root / split) if p.is_dir()] for split in ("train", "test")}
    for name in normal:
        if name not in {nfc(p.name) for p in classes["train"]}:
            key = f"data.normal_classes.{category}" if category in params.data.normal_classes else "categories"
            raise UserError(
                f"{key}: no class {name!r} in {root / 'train'}; {_found([p.name for p in classes['train']])}"
            )
    names = {nfc(p.name) for split in classes for p in classes[split]}
    other = sorted(name for name in names - set(normal) if alike(name) in {alike(n) for n in normal})
    if other:
        warnings.append(f"{category}: counted as anomalous, though named like a normal class: {', '.join(other)}")
    for split in ("train", "test"):
        for folder in classes[split]:
            label = int(nfc(folder.name) not in normal)
            if split == "train" and label:
                continue
            defect, sessions = nfc(folder.name) if label else "good", params.data.sessions == "folder"
            part = _Folder(root, folder, category, split, label, defect, sessions)
            yield from (replace(e, stratum=folder.name) for e in _images(part, passed))
        for path in visible(root / split):
            if path.is_dir():
                continue
            if is_image(path):
                problem = f"lies beside the class folders: move it into {split}/<class>"
                yield _Folder(root, root / split, category, split, 0, "good").entry(path, problem=problem)
            else:
                passed.append(path)


LAYOUTS: dict[str, Callable[[Params, Path, str, list[Path], list[str]], Iterator[Entry]]] = {
    "mvtec": _mvtec,
    "folders": _folders,
}
"""What lists a category's entries, by `data.layout`.

(parameters, root, category, files passed over, warnings) -> entries; the last two are lists to append to.
"""


def _relative(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix()


def _found(names: list[str]) -> str:
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    return f"found: {shown}" if names else "it holds none at all"
