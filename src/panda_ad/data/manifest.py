"""The manifest: one row per category and image, from files read once each.

Columns (COLUMNS): path, sha256 (of the file), width, height (upright, pixels), mode (Pillow's, as stored), category, split
(train, calibration, test), label (0 normal, 1 anomalous), defect ('good' or its name), mask ('' or path), pixels (sha256 of the
decoded RGB pixels: equal for the same picture in another file format), mask_sha256.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL

from panda_ad.data import images
from panda_ad.data.layouts import Entry, image_root, list_entries
from panda_ad.errors import UserError
from panda_ad.files import atomic_file
from panda_ad.params import Params

if TYPE_CHECKING:
    import pandas as pd

CACHE = Path(".cache") / "manifest"
COLUMNS = ["path", "sha256", "width", "height", "mode", "category", "split", "label", "defect", "mask", "pixels", "mask_sha256"]

Record = dict[str, Any]
"""What one reading of a file found: sha256, width, height, problem; of an image also mode and pixels, of a mask marked and largest."""


def build_manifest(params: Params) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """The rows that can be used, and (path, reason) of everything that cannot. Raises UserError as `list_entries` does."""
    from panda_ad.data.checks import check

    checked = check(collect(params), params)
    return checked.usable, checked.problems + checked.blocking


def collect(params: Params) -> pd.DataFrame:
    """Every image of the categories, usable or not: COLUMNS (split train or test), and what the checks need beyond them.

    `problem` ('' or the reason why the image or its mask could not be read), `mask_width`, `mask_height`, `mask_marked` (pixels)
    and `mask_largest` (0..255), NaN where there is nothing to measure.
    """
    import pandas as pd

    root = image_root(params)
    with _Cache(root) as cache:
        entries = _limit(list_entries(params, root), params, root, cache)
        good = [e for e in entries if not e.problem]
        read = _read_all(root, {e.path for e in good}, "image", inspect_image, cache)
        masks = _read_all(root, {e.mask for e in good if e.mask}, "mask", inspect_mask, cache)
    rows = [_row(e, read.get(e.path, {}), masks.get(e.mask, {})) for e in entries]
    measures = ["mask_width", "mask_height", "mask_marked", "mask_largest"]
    frame = pd.DataFrame(rows, columns=[*COLUMNS, "problem", *measures])
    return frame.astype({"width": "Int64", "height": "Int64", "label": "int64", **dict.fromkeys(measures, "Int64")})


def _row(entry: Entry, image: Record, mask: Record) -> dict[str, Any]:
    problem = entry.problem or image.get("problem", "") or mask.get("problem", "")
    return {
        **{k: getattr(entry, k) for k in ("path", "category", "split", "label", "defect", "mask")},
        **{k: image.get(k, "") for k in ("sha256", "mode", "pixels")},
        **{k: image.get(k) for k in ("width", "height")},
        "mask_sha256": mask.get("sha256", ""),
        **{f"mask_{k}": mask.get(k) for k in ("width", "height", "marked", "largest")},
        "problem": problem,
    }


def known_images(params: Params, category: str) -> list[tuple[Entry, Record]]:
    """Every image of one category with what reading it found; only files that no run has read yet are read."""
    root = image_root(params)
    with _Cache(root, keep=True) as cache:
        entries = list_entries(params.model_copy(update={"categories": [category]}), root)
        read = _read_all(root, {e.path for e in entries if not e.problem}, "image", inspect_image, cache)
    return [(e, read.get(e.path, {})) for e in entries]


def remember(root: Path, found: Iterable[tuple[str, str, Record]]) -> None:
    """Keep what reading files under `root` found, each (kind: 'image' or 'mask', path, record), so that no run reads them again."""
    with _Cache(root, keep=True) as cache:
        for kind, path, record in found:
            cache.put(kind, path, record)


def inspect_image(root: Path, path: str) -> Record:
    """Read and decode one image; a failure is a `problem`, not an exception."""
    try:
        data = images.read_bytes(root / path, path)
    except UserError as e:
        return {"problem": str(e).removeprefix(f"{path}: ")}
    return image_record(data, path)


def image_record(data: bytes, path: str) -> Record:
    """What an image file's bytes hold; `path` is what decoding calls it, and no part of the record."""
    record: Record = {"problem": "", "sha256": hashlib.sha256(data).hexdigest()}
    try:
        picture = images.picture(data, path)
    except UserError as e:
        return {**record, "problem": str(e).removeprefix(f"{path}: ")}
    height, width = picture.rgb.shape[:2]
    digest = hashlib.sha256(f"{width}x{height}".encode())
    digest.update(np.ascontiguousarray(picture.rgb).data)
    return {**record, "width": width, "height": height, "mode": picture.mode, "pixels": digest.hexdigest()}


def inspect_mask(root: Path, path: str) -> Record:
    """Read and decode one mask; a failure is a `problem`, not an exception."""
    try:
        data = images.read_bytes(root / path, path)
    except UserError as e:
        return {"problem": f"its mask {e}"}
    return mask_record(data, path)


def mask_record(data: bytes, path: str) -> Record:
    """What a mask file's bytes hold."""
    record: Record = {"problem": "", "sha256": hashlib.sha256(data).hexdigest()}
    try:
        levels = images.mask_levels(data, path)
    except UserError as e:
        return {**record, "problem": f"its mask {e}"}
    height, width = levels.shape
    return {**record, "width": width, "height": height, "marked": int((levels >= 128).sum()), "largest": int(levels.max())}


def _digest(root: Path, path: str) -> Record:
    try:
        return {"sha256": hashlib.sha256(images.read_bytes(root / path, path)).hexdigest()}
    except UserError:
        return {"sha256": path}  # chosen or not like any other; if chosen, reading it again finds the problem


def draw_key(seed: int, purpose: str, content: str) -> str:
    """A seeded random order that is a property of each image's content: adding images does not reorder the others."""
    return hashlib.sha256(f"{seed}:{purpose}:{content}".encode()).hexdigest()


def _limit(entries: list[Entry], params: Params, root: Path, cache: _Cache) -> list[Entry]:
    """Keep at most limit_train and limit_test images of each category, the latter in proportion to its strata."""
    limits = {"train": params.data.limit_train, "test": params.data.limit_test}
    groups: dict[tuple[str, str], list[Entry]] = defaultdict(list)
    for e in entries:
        if not e.problem:
            groups[e.category, e.split].append(e)
    over = {key: group for key, group in groups.items() if (limit := limits[key[1]]) is not None and len(group) > limit}
    digests = _read_all(root, {e.path for group in over.values() for e in group}, "file", _digest, cache)
    dropped = set()
    for (category, split), group in over.items():
        strata: dict[str, list[Entry]] = defaultdict(list)
        for e in group:
            strata[e.stratum if split == "test" else ""].append(e)
        quota = apportion({name: len(members) for name, members in strata.items()}, limits[split] or 0)
        for name, members in strata.items():
            members.sort(key=lambda e: (draw_key(params.seed, "limit", digests[e.path]["sha256"]), e.path))
            dropped |= {(category, e.split, e.path) for e in members[quota[name] :]}
    return [e for e in entries if e.problem or (e.category, e.split, e.path) not in dropped]


def apportion(sizes: dict[str, int], limit: int) -> dict[str, int]:
    """Share `limit` seats in proportion to `sizes` (largest remainders), at least one each where there are enough seats."""
    total = sum(sizes.values())
    if limit >= total:
        return dict(sizes)
    floor = 1 if limit >= len(sizes) else 0
    spare = limit - floor * len(sizes)
    ideal = {name: spare * (size - floor) / max(1, total - floor * len(sizes)) for name, size in sizes.items()}
    seats = {name: floor + math.floor(share) for name, share in ideal.items()}
    by_remainder = sorted(sizes, key=lambda name: (math.floor(ideal[name]) - ideal[name], name))
    for name in by_remainder[: limit - sum(seats.values())]:
        seats[name] += 1
    return seats


def split_calibration(rows: pd.DataFrame, fraction: float, seed: int) -> pd.DataFrame:
    """Hold ceil(fraction * n) of each category's training images out for calibration: those that come first by `draw_key`."""
    rows = rows.copy()
    for _, train in rows[rows["split"] == "train"].groupby("category", sort=False):
        keys = train["sha256"].map(lambda content: draw_key(seed, "calibration", content))
        held = keys.sort_values(kind="stable").index[: math.ceil(fraction * len(train))]
        rows.loc[held, "split"] = "calibration"
    return rows


def write_manifest(rows: pd.DataFrame, path: Path | str) -> None:
    """Write rows as CSV, atomically. Every text is quoted, so that any file name comes back as it was."""
    with atomic_file(path) as temporary:
        rows.to_csv(temporary, index=False, encoding="utf-8", lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)


def load_manifest(path: Path | str, category: str | None = None) -> pd.DataFrame:
    """Read a manifest, or one category's rows of it (their index is 0, 1, ... either way).

    Raises
    ------
    UserError
        The file cannot be read, or lacks the category.
    """
    import pandas as pd

    try:
        rows = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
        rows = rows.astype({"width": "int64", "height": "int64", "label": "int64"})
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror}); the validate stage writes it") from None
    except (ValueError, KeyError) as e:
        raise UserError(f"{path}: not a manifest ({' '.join(str(e).split())[:120]}); run the validate stage again") from None
    if category is not None:
        rows = rows[rows["category"] == category].reset_index(drop=True)
        if rows.empty:
            raise UserError(f"{path}: holds no images of category {category!r}")
    return rows


def data_hash(rows: pd.DataFrame) -> str:
    """sha256 (hex) over the sorted (path, sha256) of images and masks."""
    files = set(zip(rows["path"], rows["sha256"], strict=True)) | set(zip(rows["mask"], rows["mask_sha256"], strict=True))
    return hashlib.sha256(json.dumps(sorted(f for f in files if f[0])).encode()).hexdigest()


class _Cache:
    """Records of files read before, by (kind, path, size, mtime); safe to delete.

    Kept for the files of the last run only, or, with `keep`, for those of runs before it too.
    """

    def __init__(self, root: Path, keep: bool = False):
        self.root, self.keep = root, keep
        # Another way to decode would find other things: the cache is void when that code or Pillow changes.
        rules = Path(images.__file__).read_bytes() + Path(__file__).read_bytes() + PIL.__version__.encode()
        self.rules = hashlib.sha256(rules).hexdigest()
        self.path = CACHE / f"{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]}.json"
        self.used: dict[str, Record] = {}
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            self.known: dict[str, Record] = stored["records"] if stored["rules"] == self.rules else {}
        except (OSError, ValueError, KeyError, TypeError):
            self.known = {}

    def __enter__(self) -> _Cache:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # interrupted: the rest is still to be asked for
        records = self.used if kind is None and not self.keep else {**self.known, **self.used}
        with atomic_file(self.path) as temporary:
            temporary.write_text(json.dumps({"rules": self.rules, "records": records}), encoding="utf-8")

    def held(self, kind: str, path: str) -> Record | None:
        """What is known of a file as it is now."""
        key = self._key(kind, path)
        record = None if key is None else self.known.get(key)
        if key is not None and record is not None:
            self.used[key] = record
        return record

    def read(self, kind: str, path: str, read: Callable[[Path, str], Record]) -> Record:
        """Read a file and remember what was found."""
        key = self._key(kind, path)  # before: a file that changes meanwhile is read again
        record = read(self.root, path)
        if key is not None:
            self.used[key] = record
        return record

    def put(self, kind: str, path: str, record: Record) -> None:
        """Remember what is known of a file already."""
        if (key := self._key(kind, path)) is not None:
            self.used[key] = record

    def _key(self, kind: str, path: str) -> str | None:
        try:
            stat = os.stat(f"{self.root}/{path}")
        except OSError:
            return None
        return json.dumps([kind, path, stat.st_size, stat.st_mtime_ns])


def _read_all(root: Path, paths: set[str], kind: str, read: Callable[[Path, str], Record], cache: _Cache) -> dict[str, Record]:
    """`read` each file once, by as many threads as there are cores (decoding releases Python's lock)."""
    from tqdm import tqdm

    held = {path: record for path in paths if (record := cache.held(kind, path)) is not None}
    ordered = sorted(paths - held.keys())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda path: cache.read(kind, path, read), ordered)
        try:
            found = list(tqdm(results, total=len(ordered), desc=f"read {kind}s", unit=kind, disable=None if ordered else True))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {**held, **dict(zip(ordered, found, strict=True))}
