# SPDX-License-Identifier: Apache-2.0
"""Add new images to the data set: each is decoded and compared with what is there before it counts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from panda_ad.data import images
from panda_ad.data.add_request import Label, Request, Target, target_of
from panda_ad.data.expectations import MIN_SIDE, empty_mask_reason, small_reason
from panda_ad.data.images import Decoding
from panda_ad.data.layouts import Entry, category_folder
from panda_ad.data.links import refuse_links
from panda_ad.data.listing import describe, find_images, is_image, nfc, visible
from panda_ad.data.manifest import existing_images
from panda_ad.data.quarantine import image_suffix, plain_stem, quarantine
from panda_ad.data.records import Record, image_record, mask_record, remember
from panda_ad.errors import UserError
from panda_ad.params import Params
from panda_ad.system.files import renamed_file


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
    target, root = target_of(params, request), Path(params.data.root)
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
        target: Target,
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
