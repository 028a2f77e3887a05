"""Take new images into the data set: each is decoded and compared with what is there before it counts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from panda_ad.data import images, torchvision_sets
from panda_ad.data.checks import MIN_SIDE
from panda_ad.data.layouts import Entry, visible
from panda_ad.data.manifest import known_images
from panda_ad.data.quarantine import image_suffix, plain_stem, quarantine
from panda_ad.data.records import Record, image_record, mask_record, remember
from panda_ad.errors import UserError
from panda_ad.params import Params
from panda_ad.system.files import renamed_file

Label = Literal["good", "defect"]
Split = Literal["train", "test"]


@dataclass
class Intake:
    """What became of the files.

    Attributes
    ----------
    folder : where good ones went, relative to the data's root.
    added : (file, its path in the set, relative to the data's root).
    known : (file, the image with the same content).
    refused : (file, reason).
    quarantine : folder with copies of the refused files and reasons.csv; None where none was refused, or all were copied before.
    quarantined_before : of the refused, how many an earlier quarantine holds.
    """

    folder: str
    added: list[tuple[Path, str]] = field(default_factory=list)
    known: list[tuple[Path, str]] = field(default_factory=list)
    refused: list[tuple[Path, str]] = field(default_factory=list)
    quarantine: Path | None = None
    quarantined_before: int = 0


@dataclass(frozen=True)
class _Place:
    """Folders, relative to the data's root, that images and masks of one kind go to."""

    images: str
    masks: str
    label: int


def take_in(
    params: Params, category: str, paths: Iterable[Path], label: Label = "good", kind: str | None = None, split: Split | None = None,
    masks: Path | None = None,
) -> Intake:  # fmt: skip
    """Copy the usable ones of some files into the data set, the others into quarantine/<time> beside its root.

    The same picture twice, by the file's or by the decoded pixels' sha256, is taken once. A new image's name is its old one and 16 hex
    digits of its content's sha256, so that doing it again, or again after a kill, adds nothing twice.

    Parameters
    ----------
    paths : files, or folders of images (searched recursively; hidden files are passed over).
    label : what the files are said to show. Defects go to test, never to train.
    kind : of defect, default 'defect'; for good images of a category with several normal classes (layout `folders`) the class.
    split : of good images, default train.
    masks : folder with a mask for each image, <stem>_mask.* or <stem>.*; known images without one get theirs. None: the images have none.

    Raises
    ------
    UserError
        The request itself cannot be met (unknown category, masks of good images, ...); nothing has been changed.
    """
    place = _place(params, category, label, kind, split, masks)
    files = _files(paths, masks)
    root = Path(params.data.root)
    has_images = (root / category).is_dir() if params.data.layout == "mvtec" else root.is_dir()
    known = known_images(params, category) if has_images else []
    if label == "defect" and masks is not None and not masks.is_dir():
        raise UserError(f"--masks: no folder {masks}")
    given = _masks_of(files, masks) if masks else {}
    twins = _Twins(known)
    unmasked = {entry.path for entry, _ in known if not entry.mask and entry.path.startswith(f"{place.images}/")}
    intake = Intake(place.images)
    for folder in (place.images, place.masks):
        for stale in (root / folder).glob(
            ".*.tmp"
        ):  # of a run that was killed; the repository's lock admits one writer
            stale.unlink()
    read: list[tuple[str, str, Record]] = []
    for file in files:
        try:
            data = images.read_bytes(file)
        except UserError as e:
            intake.refused.append((file, str(e).removeprefix(f"{file}: ")))
            continue
        record = image_record(data, str(file))
        if problem := _unusable(record):
            intake.refused.append((file, problem))
            continue
        if (twin := twins.find(record)) is not None:
            path, other = twin
            if other != place.label:
                intake.refused.append((file, f"the same picture as {path}, which has the other label"))
            elif masks is not None and file in given and path in unmasked:  # drawn since
                mask, held, problem = _mask(given[file], record)
                if problem:
                    intake.refused.append((file, problem))
                    continue
                mask_path = f"{place.masks}/{Path(path).stem}_mask{image_suffix(given[file])}"
                _write(root / mask_path, mask)
                read.append(("mask", mask_path, held))
                intake.known.append((file, f"{path}, which has its mask now"))
            else:
                intake.known.append((file, path))
            continue
        name = _name(file, record["sha256"])
        path = f"{place.images}/{name}"
        if masks is not None:
            mask, held, problem = _mask(given.get(file), record)
            if problem:
                intake.refused.append((file, problem))
                continue
            mask_path = f"{place.masks}/{Path(name).stem}_mask{image_suffix(given[file])}"
            _write(
                root / mask_path, mask
            )  # before its image: a kill between the two leaves an image that is still to be added
            read.append(("mask", mask_path, held))
        _write(root / path, data)
        read.append(("image", path, record))
        intake.added.append((file, path))
        twins.add(path, place.label, record)
    if read:
        remember(root, read)
    if masks is not None:
        spare = set(_mask_files(masks)) - set(given.values())
        intake.refused += [(path, "is a mask without an image") for path in sorted(spare)]
    if intake.refused:
        intake.quarantine, intake.quarantined_before = quarantine(root.absolute().parent / "quarantine", intake.refused)
    return intake


def _place(
    params: Params, category: str, label: Label, kind: str | None, split: Split | None, masks: Path | None
) -> _Place:
    layout = params.data.layout
    if layout in torchvision_sets.SETS:
        raise UserError(
            f"data.layout: {layout} is a published set, which nothing is added to; ingest is for mvtec and folders"
        )
    if category not in params.categories:
        raise UserError(
            f"--category: {category!r} is not one of categories in params.yaml ({', '.join(params.categories)}); add it there first"
        )
    if kind is not None and (
        not kind.strip() or kind.startswith(".") or not kind.isprintable() or set(kind) & set('/\\:*?"<>|')
    ):
        raise UserError(f"--kind: {kind!r} cannot be a folder's name; use letters, digits, - and _")
    if label == "defect":
        if split == "train":
            raise UserError("--split train: training images are all good ones; defects go to test")
        kind = kind or "defect"
        normal = ["good"] if layout == "mvtec" else params.data.normal_classes.get(category, [category])
        if kind in normal:
            raise UserError(f"--kind: {kind!r} is where good images of {category} are; name the kind of defect")
        if layout == "mvtec":
            return _Place(f"{category}/test/{kind}", f"{category}/ground_truth/{kind}", 1)
        if masks is not None:
            raise UserError("--masks: data.layout folders has no masks; use mvtec")
        return _Place(f"test/{kind}", f"test/{kind}", 1)
    if masks is not None:
        raise UserError("--masks: good images have none; add --label defect")
    split = split or "train"
    if layout == "mvtec":
        if kind not in (None, "good"):
            raise UserError(f"--kind {kind}: good images have no kind; add --label defect")
        return _Place(f"{category}/{split}/good", f"{category}/{split}/good", 0)
    classes = params.data.normal_classes.get(category, [category])
    if kind is None and len(classes) > 1 or kind is not None and kind not in classes:
        raise UserError(
            f"--kind: name the normal class of {category} that the images show, one of {', '.join(classes)}"
        )
    folder = f"{split}/{kind or classes[0]}"
    return _Place(folder, folder, 0)


def _files(paths: Iterable[Path], masks: Path | None) -> list[Path]:
    """The files, folders walked through in the order of names; the masks' folder is none of them."""
    apart = masks.resolve() if masks else None

    def walk(path: Path) -> Iterable[Path]:
        if not path.is_dir():
            yield path
        elif path.resolve() != apart:
            for child in visible(path):
                yield from walk(child)

    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        found += walk(path)
    if not found:
        raise UserError(f"no files in {', '.join(map(str, paths))}")
    return list(dict.fromkeys(found))


def _mask_files(folder: Path) -> list[Path]:
    return [p for p in visible(folder) if p.is_file()]


def _masks_of(files: list[Path], folder: Path) -> dict[Path, Path]:
    """{image: its mask}, for those that have one."""
    stems: dict[str, Path] = {}
    for file in files:
        if (other := stems.setdefault(file.stem, file)) is not file:
            raise UserError(
                f"--masks: which mask is whose? {other} and {file} have the same name; ingest them one folder at a time"
            )
    by_stem = {p.stem: p for p in _mask_files(folder)}
    pairs = {stem: by_stem.get(f"{stem}_mask") or by_stem.get(stem) for stem in stems}
    return {stems[stem]: mask for stem, mask in pairs.items() if mask is not None}


def _mask(path: Path | None, image: Record) -> tuple[bytes, Record, str]:
    """A mask's bytes, what they hold, and '' or what is wrong with it."""
    if path is None:
        return b"", {}, "has no mask"
    try:
        data = images.read_bytes(path)
    except UserError as e:
        return b"", {}, f"its mask {e}"
    record = mask_record(data, str(path))
    if record["problem"]:
        return data, record, record["problem"]
    if (record["width"], record["height"]) != (image["width"], image["height"]):
        return (
            data,
            record,
            f"its mask {path} is {record['width']} x {record['height']} pixels, the image {image['width']} x {image['height']}",
        )
    if not record["marked"]:
        return (
            data,
            record,
            f"its mask {path} is empty: its largest value is {record['largest']}, marked is 128 and above",
        )
    return data, record, ""


def _unusable(record: Record) -> str:
    if record["problem"]:
        return str(record["problem"])
    width, height = record["width"], record["height"]
    return (
        f"{width} x {height} pixels, too small: at least {MIN_SIDE} x {MIN_SIDE}"
        if min(width, height) < MIN_SIDE
        else ""
    )


class _Twins:
    """Images by content."""

    def __init__(self, known: Iterable[tuple[Entry, Record]]):
        self._by_content: dict[str, tuple[str, int]] = {}
        for entry, record in known:
            self.add(entry.path, entry.label, record)

    def add(self, path: str, label: int, record: Record) -> None:
        for key in ("sha256", "pixels"):
            if key in record:
                self._by_content.setdefault(f"{key} {record[key]}", (path, label))

    def find(self, record: Record) -> tuple[str, int] | None:
        """(path, label) of an image with the file's bytes or the picture's pixels."""
        found = (self._by_content.get(f"{key} {record[key]}") for key in ("sha256", "pixels"))
        return next((twin for twin in found if twin is not None), None)


def _name(file: Path, sha256: str) -> str:
    """Of characters that every file system takes, and without dots: what pairs images with masks ends the stem at the last one."""
    return f"{plain_stem(file).replace('.', '_')}-{sha256[:16]}{image_suffix(file)}"


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with renamed_file(path) as temporary:
        temporary.write_bytes(data)
