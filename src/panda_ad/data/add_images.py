# SPDX-License-Identifier: Apache-2.0
"""Add new images to the data set: each is decoded and compared with what is there before it counts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from panda_ad.data import images, torchvision_sets
from panda_ad.data.expectations import MIN_SIDE, empty_mask_reason, small_reason
from panda_ad.data.images import Decoding
from panda_ad.data.layouts import Entry, category_folder
from panda_ad.data.links import refuse_links
from panda_ad.data.listing import describe, find_images, is_image, nfc, same_name, visible
from panda_ad.data.manifest import existing_images
from panda_ad.data.quarantine import image_suffix, plain_stem, quarantine
from panda_ad.data.records import Record, image_record, mask_record, remember
from panda_ad.errors import UserError
from panda_ad.params import Params
from panda_ad.system.files import renamed_file

Label = Literal["good", "defect"]
Split = Literal["train", "test"]


@dataclass(frozen=True)
class Request:
    """What is to be added.

    Attributes
    ----------
    category : one of the parameters'.
    paths : files, or folders of images (searched recursively; files that are no images are passed over).
    label : what the files are said to show. Defects go to test, never to train.
    kind : of defect, default 'defect'.
        For good images of a category with several normal classes (layout `folders`) it is the class.
    split : of good images, default train.
    masks : folder with a mask for each image, <stem>_mask.* or <stem>.*; None: no masks.
        Images of the set without a mask get theirs.
    session : the folder that they go to inside the folder of images, where `data.sessions` goes by folders; None: none.
    """

    category: str
    paths: tuple[Path, ...]
    label: Label = "good"
    kind: str | None = None
    split: Split | None = None
    masks: Path | None = None
    session: str | None = None


@dataclass
class Additions:
    """What became of the files.

    Attributes
    ----------
    folder : where good ones went, relative to the data's root.
    label : of the request.
    added : (file, its path in the set, relative to the data's root).
    duplicates : (file, the image with the same content).
    refused : (file, reason).
    doubtful : (file, a sign that it is only part of a picture), of those added.
    passed_over : what was found in the folders beside images, in words; '' for nothing.
    quarantine : folder with copies of the refused files and reasons.csv.
        None where none was refused, or all were copied before.
    quarantined_before : of the refused, how many an earlier quarantine holds.
    """

    folder: str
    label: Label
    added: list[tuple[Path, str]] = field(default_factory=list)
    duplicates: list[tuple[Path, str]] = field(default_factory=list)
    refused: list[tuple[Path, str]] = field(default_factory=list)
    doubtful: list[tuple[Path, str]] = field(default_factory=list)
    passed_over: str = ""
    quarantine: Path | None = None
    quarantined_before: int = 0


@dataclass(frozen=True)
class _Target:
    """Folders, relative to the data's root, that images and masks of one kind go to."""

    images: str
    masks: str
    label: int


def add_images(params: Params, request: Request) -> Additions:
    """Copy the usable ones of some files into the data set, the others into quarantine/<time> beside its root.

    The same picture twice, by the file's or by the decoded pixels' sha256, is added once.
    A new image's name is its old one and 16 hex digits of its content's sha256.
    So doing it again, or again after a kill, adds nothing twice.

    Raises
    ------
    UserError
        The request itself cannot be met (unknown category, masks of good images, ...); nothing has been changed.
    """
    target, root = _target(params, request), Path(params.data.root)
    files, passed_over = _files(request)
    if root.is_dir():
        refuse_links(root)
    has_images = category_folder(root, request.category).is_dir() if params.data.layout == "mvtec" else root.is_dir()
    there = existing_images(params, request.category) if has_images else []
    masks = request.masks
    if masks is not None and not masks.is_dir():
        raise UserError(f"--masks: no folder {masks}")
    given = _masks_of(files, masks) if masks else {}
    for folder in (target.images, target.masks):
        # of a run that was killed; the repository's lock admits one writer
        for stale in (root / folder).glob(".*.tmp"):
            stale.unlink()
    batch = _Batch(params, target, given, there, wants_masks=masks is not None)
    for file in files:
        batch.add(file)
    if batch.read:
        remember(root, batch.read, Decoding.of(params.data))
    found = batch.found
    found.passed_over = passed_over
    if masks is not None:
        spare = set(_mask_files(masks)) - set(given.values())
        found.refused += [(path, "is a mask without an image") for path in sorted(spare)]
    if found.refused:
        found.quarantine, found.quarantined_before = quarantine(root.absolute().parent / "quarantine", found.refused)
    return found


class _Batch:
    """The files of one request on their way into the set."""

    def __init__(
        self,
        params: Params,
        target: _Target,
        given: dict[Path, Path],
        there: list[tuple[Entry, Record]],
        wants_masks: bool,
    ) -> None:
        self.found = Additions(target.images, "defect" if target.label else "good")
        self.read: list[tuple[str, str, Record]] = []
        self._root, self._decoding, self._target = Path(params.data.root), Decoding.of(params.data), target
        self._given, self._wants_masks = given, wants_masks
        self._contents = _Contents(there)
        self._unmasked = {e.path for e, _ in there if not e.mask and e.path.startswith(f"{target.images}/")}

    def add(self, file: Path) -> None:
        """Put one file where it belongs, or say why not."""
        try:
            data = images.read_bytes(file, decoding=self._decoding)
        except UserError as e:
            self.found.refused.append((file, str(e).removeprefix(f"{file}: ")))
            return
        record = image_record(data, str(file), self._decoding)
        if problem := _unusable(record):
            self.found.refused.append((file, problem))
        elif (twin := self._contents.find(record)) is not None:
            self._add_twin(file, record, *twin)
        else:
            path = f"{self._target.images}/{_name(file, record['sha256'])}"
            # the mask before its image: a kill between the two leaves an image that is still to be added
            if not self._wants_masks or self._add_mask(file, record, path):
                self._write("image", path, data, record)
                self.found.added.append((file, path))
                if reason := record.get("doubt"):
                    self.found.doubtful.append((file, reason))
                self._contents.add(path, self._target.label, record)

    def _add_twin(self, file: Path, record: Record, path: str, label: int) -> None:
        """Take in a file with the content of an image of the set: it may bring the mask that was missing."""
        if label != self._target.label:
            self.found.refused.append((file, f"the same picture as {path}, which has the other label"))
        elif self._wants_masks and file in self._given and path in self._unmasked:
            if self._add_mask(file, record, path):
                self.found.duplicates.append((file, f"{path}, which has its mask now"))
        else:
            self.found.duplicates.append((file, path))

    def _add_mask(self, file: Path, image: Record, path: str) -> bool:
        data, record, problem = _mask(self._given.get(file), image, self._decoding)
        if problem:
            self.found.refused.append((file, problem))
            return False
        suffix = image_suffix(self._given[file])
        self._write("mask", f"{self._target.masks}/{Path(path).stem}_mask{suffix}", data, record)
        return True

    def _write(self, kind: str, name: str, data: bytes, record: Record) -> None:
        path = self._root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with renamed_file(path) as temporary:
            temporary.write_bytes(data)
        self.read.append((kind, name, record))


def refuse_kind(kind: str, option: str = "--kind") -> None:
    """Raise UserError where a kind of defect, or a session, cannot be a folder's name."""
    if not kind.strip() or kind.startswith(".") or not kind.isprintable() or set(kind) & set('/\\:*?"<>|'):
        raise UserError(f"{option}: {kind!r} cannot be a folder's name; use letters, digits, - and _")


def _target(params: Params, request: Request) -> _Target:
    """Find out where images of a request go. UserError where it makes no sense."""
    category, kind = request.category, request.kind
    layout = params.data.layout
    if layout in torchvision_sets.SETS:
        raise UserError(
            f"data.layout: {layout} is a published set, which nothing is added to; ingest is for mvtec and folders"
        )
    if layout not in ("mvtec", "folders"):
        raise UserError(f"data.layout: ingest is for mvtec and folders, and does not know where {layout} keeps images")
    if category not in params.categories:
        raise UserError(
            f"--category: {category!r} is not one of categories in params.yaml "
            f"({', '.join(params.categories)}); add it there first"
        )
    if kind is not None:
        refuse_kind(kind)
    if request.session is not None:
        refuse_kind(request.session, "--session")
        if params.data.sessions != "folder":
            raise UserError("--session: params.yaml tells sessions otherwise; set data.sessions: folder")
    root = Path(params.data.root)
    folder = category_folder(root, category).name if layout == "mvtec" else category
    target = (_defect_target if request.label == "defect" else _good_target)(params, request, folder)
    return target if request.session is None else replace(target, images=f"{target.images}/{request.session}")


def _defect_target(params: Params, request: Request, folder: str) -> _Target:
    category, mvtec = request.category, params.data.layout == "mvtec"
    if request.split == "train":
        raise UserError("--split train: training images are all good ones; defects go to test")
    kind = request.kind or "defect"
    normal = ["good"] if mvtec else params.data.normal_classes.get(category, [category])
    if any(same_name(kind, name) or (mvtec and kind.casefold() == name) for name in normal):
        raise UserError(f"--kind: {kind!r} is where good images of {category} are; name the kind of defect")
    if mvtec:
        return _Target(f"{folder}/test/{kind}", f"{folder}/ground_truth/{kind}", 1)
    if request.masks is not None:
        raise UserError("--masks: data.layout folders has no masks; use mvtec")
    return _Target(f"test/{kind}", f"test/{kind}", 1)


def _good_target(params: Params, request: Request, folder: str) -> _Target:
    category, kind, split = request.category, request.kind, request.split or "train"
    if request.masks is not None:
        raise UserError("--masks: good images have none; add --label defect")
    if params.data.layout == "mvtec":
        if kind not in (None, "good"):
            raise UserError(f"--kind {kind}: good images have no kind; add --label defect")
        return _Target(f"{folder}/{split}/good", f"{folder}/{split}/good", 0)
    classes = params.data.normal_classes.get(category, [category])
    if kind is None and len(classes) > 1 or kind is not None and kind not in classes:
        raise UserError(
            f"--kind: name the normal class of {category} that the images show, one of {', '.join(classes)}"
        )
    path = f"{split}/{kind or classes[0]}"
    return _Target(path, path, 0)


def _files(request: Request) -> tuple[list[Path], str]:
    """Return the images of the request, and in words what was found beside them; the masks' folder holds no images."""
    found = find_images(request.paths)
    apart = request.masks.resolve() if request.masks else None

    def outside(file: Path) -> bool:
        return apart is None or not file.resolve().is_relative_to(apart)

    files = [f for f in dict.fromkeys([*found.images, *found.unread]) if outside(f)]
    passed_over = describe(f for f in found.passed_over if outside(f))
    if not files:
        beside = f"; passed over {passed_over}" if passed_over else ""
        raise UserError(f"no images in {', '.join(map(str, request.paths))}{beside}")
    return files, passed_over


def _mask_files(folder: Path) -> list[Path]:
    return [p for p in visible(folder) if p.is_file() and is_image(p)]


def _masks_of(files: list[Path], folder: Path) -> dict[Path, Path]:
    """Return {image: its mask}, for those that have one."""
    stems: dict[str, Path] = {}
    for file in files:
        if (other := stems.setdefault(nfc(file.stem), file)) is not file:
            raise UserError(
                f"--masks: which mask is whose? {other} and {file} have the same name; ingest them one folder at a time"
            )
    by_stem: dict[str, Path] = {}
    for path in _mask_files(folder):
        if (other := by_stem.setdefault(nfc(path.stem), path)) is not path:
            raise UserError(f"--masks: {other} and {path} have the same name; keep one of them")
    pairs = {stem: by_stem.get(f"{stem}_mask") or by_stem.get(stem) for stem in stems}
    return {stems[stem]: mask for stem, mask in pairs.items() if mask is not None}


def _mask(path: Path | None, image: Record, decoding: images.Decoding) -> tuple[bytes, Record, str]:
    """Return a mask's bytes, what they hold, and '' or what is wrong with it."""
    if path is None:
        return b"", {}, "has no mask"
    try:
        data = images.read_bytes(path, decoding=decoding)
    except UserError as e:
        return b"", {}, f"its mask {e}"
    record = mask_record([data], str(path), decoding)
    problem = str(record["problem"])
    if not problem and (record["width"], record["height"]) != (image["width"], image["height"]):
        sizes = f"{record['width']} x {record['height']} pixels, the image {image['width']} x {image['height']}"
        problem = f"its mask {path} is {sizes}"
    elif not problem and not record["marked"]:
        problem = empty_mask_reason(path, record["largest"])
    return data, record, problem


def _unusable(record: Record) -> str:
    if record["problem"]:
        return str(record["problem"])
    width, height = record["width"], record["height"]
    return small_reason(width, height) if min(width, height) < MIN_SIDE else ""


class _Contents:
    """Images by content."""

    def __init__(self, there: Iterable[tuple[Entry, Record]]):
        self._by_content: dict[str, tuple[str, int]] = {}
        for entry, record in there:
            self.add(entry.path, entry.label, record)

    def add(self, path: str, label: int, record: Record) -> None:
        for key in ("sha256", "pixels"):
            if key in record:
                self._by_content.setdefault(f"{key} {record[key]}", (path, label))

    def find(self, record: Record) -> tuple[str, int] | None:
        """Return (path, label) of an image with the file's bytes or the picture's pixels."""
        found = (self._by_content.get(f"{key} {record[key]}") for key in ("sha256", "pixels"))
        return next((twin for twin in found if twin is not None), None)


def _name(file: Path, sha256: str) -> str:
    """Return a file name of characters that every file system takes, and without dots.

    What pairs images with masks ends the stem at the last dot.
    """
    return f"{plain_stem(file).replace('.', '_')}-{sha256[:16]}{image_suffix(file)}"
