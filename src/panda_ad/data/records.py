"""What one reading of an image or mask file found, kept from run to run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from panda_ad.data import images
from panda_ad.errors import UserError
from panda_ad.system.files import atomic_file

CACHE = Path(".cache") / "manifest"

Record = dict[str, Any]
"""What one reading of a file found: sha256, width, height, problem; of an image also mode and pixels, of a mask marked and largest."""


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
    return {
        **record,
        "width": width,
        "height": height,
        "marked": int((levels >= 128).sum()),
        "largest": int(levels.max()),
    }


def digest(root: Path, path: str) -> Record:
    """The sha256 of a file, not decoded; its path where it cannot be read."""
    try:
        return {"sha256": hashlib.sha256(images.read_bytes(root / path, path)).hexdigest()}
    except UserError:
        return {"sha256": path}  # chosen or not like any other; if chosen, reading it again finds the problem


class Records:
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

    def __enter__(self) -> Records:
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


def remember(root: Path, found: Iterable[tuple[str, str, Record]]) -> None:
    """Keep what reading files under `root` found, each (kind: 'image' or 'mask', path, record), so that no run reads them again."""
    with Records(root, keep=True) as cache:
        for kind, path, record in found:
            cache.put(kind, path, record)


def read_all(
    root: Path, paths: set[str], kind: str, read: Callable[[Path, str], Record], cache: Records
) -> dict[str, Record]:
    """`read` each file once, by as many threads as there are cores (decoding releases Python's lock)."""
    from tqdm import tqdm

    held = {path: record for path in paths if (record := cache.held(kind, path)) is not None}
    ordered = sorted(paths - held.keys())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda path: cache.read(kind, path, read), ordered)
        try:
            found = list(
                tqdm(results, total=len(ordered), desc=f"read {kind}s", unit=kind, disable=None if ordered else True)
            )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {**held, **dict(zip(ordered, found, strict=True))}
