# SPDX-License-Identifier: Apache-2.0
"""What one reading of an image or mask file found, kept from run to run."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image

from panda_ad.data import images, masks
from panda_ad.data.damage import __file__ as damage_code
from panda_ad.data.damage import doubt
from panda_ad.data.images import Decoding
from panda_ad.data.mask_files import mask_parts
from panda_ad.data.sessions import __file__ as sessions_code
from panda_ad.data.sessions import taken_at
from panda_ad.errors import UserError
from panda_ad.system.files import atomic_file

CACHE = Path(".cache") / "manifest"

Record = dict[str, Any]
"""What one reading of a file found.

Every record has sha256, width, height and problem. One of an image has also mode, pixels, thumb, doubt and, for 16-bit
gray, values and, where EXIF data say so, taken; one of a mask has marked and largest.
"""

_Stored = tuple[list[list[int]], Record]
"""Of each of its files size, times of change (of content, of the file) in ns, and inode; and what was found."""
THUMB = 16
"""Side of the reduced picture that near copies are found by."""


def inspect_image(root: Path, path: str, decoding: Decoding = images.DEFAULT) -> Record:
    """Read and decode one image; a failure is a `problem`, not an exception."""
    try:
        data = images.read_bytes(root / path, path, decoding)
    except UserError as e:
        return {"problem": str(e).removeprefix(f"{path}: ")}
    return image_record(data, path, decoding)


def image_record(data: bytes, path: str, decoding: Decoding = images.DEFAULT) -> Record:
    """Return what an image file's bytes hold; `path` is what decoding calls it, and no part of the record."""
    record: Record = {"problem": "", "sha256": hashlib.sha256(data).hexdigest()}
    try:
        picture = images.picture(data, path, decoding=decoding)
    except UserError as e:
        return {**record, "problem": str(e).removeprefix(f"{path}: ")}
    height, width = picture.rgb.shape[:2]
    digest = hashlib.sha256(f"{width}x{height}".encode())
    digest.update(np.ascontiguousarray(picture.rgb).data)
    return {
        **record,
        "width": width,
        "height": height,
        "mode": picture.mode,
        "pixels": digest.hexdigest(),
        "thumb": _thumb(picture.rgb),
        **({"doubt": found} if (found := doubt(data, picture.rgb)) else {}),
        **({"values": picture.values} if picture.values else {}),
        **({"taken": when} if (when := taken_at(data)) else {}),
    }


def _thumb(rgb: np.ndarray) -> str:
    """Return base64 of float16 (THUMB, THUMB): mean luma, 0..255, of each part of an image."""
    image = Image.fromarray(rgb).convert("L").convert("F")
    reduced = np.asarray(image.resize((THUMB, THUMB), Image.Resampling.BOX))
    return base64.b64encode(reduced.astype(np.float16).tobytes()).decode()


def inspect_mask(root: Path, path: str, decoding: Decoding = images.DEFAULT) -> Record:
    """Read and decode one mask; a failure is a `problem`, not an exception."""
    try:
        parts = masks.mask_bytes(root / path, path, decoding)
    except UserError as e:
        return {"problem": f"its mask {e}"}
    return mask_record(parts, path, decoding)


def mask_record(parts: Sequence[bytes], path: str, decoding: Decoding = images.DEFAULT) -> Record:
    """Return what a mask's file, or its files to join, hold."""
    record: Record = {"problem": "", "sha256": images.digest(parts) if parts else ""}
    try:
        levels = masks.mask_levels(parts, path, decoding)
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
    """Return the sha256 of a file, not decoded; its path where it cannot be read."""
    try:
        return {"sha256": hashlib.sha256(images.read_bytes(root / path, path)).hexdigest()}
    except UserError:
        return {"sha256": path}  # chosen or not like any other; if chosen, reading it again finds the problem


class Records:
    """Records of files read before, by kind and path; safe to delete.

    A record holds while its file has the same size and times and is the same file. One of the same size and time of
    change that is another file, or has another link to it (a replaced file, a copy, a restored one), is compared by
    content, which is cheaper than decoding.

    Kept for the files of the last run only, or, with `keep`, for those of runs before it too.
    """

    def __init__(self, root: Path, keep: bool = False, decoding: Decoding = images.DEFAULT):
        self.root, self.keep = root, keep
        # Another way to decode would find other things: the cache is void when that code or Pillow changes.
        rules = b"".join(Path(file).read_bytes() for file in (images.__file__, damage_code, sessions_code, __file__))
        self.rules = hashlib.sha256(rules + f"{PIL.__version__} {decoding}".encode()).hexdigest()
        # by the root as it is written: a copy of the checkout that shares its .cache has the same records
        self.path = CACHE / f"{hashlib.sha256(os.fsencode(root)).hexdigest()[:16]}.json"
        self.used: dict[str, _Stored] = {}
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            self.stored: dict[str, _Stored] = dict(stored["records"]) if stored["rules"] == self.rules else {}
        except (OSError, ValueError, KeyError, TypeError):
            self.stored = {}

    def __enter__(self) -> Records:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # interrupted: the rest is still to be asked for
        records = self.used if kind is None and not self.keep else {**self.stored, **self.used}
        with atomic_file(self.path) as temporary:
            temporary.write_text(json.dumps({"rules": self.rules, "records": records}), encoding="utf-8")

    def cached(self, kind: str, path: str) -> Record | None:
        """Return what an earlier run found in a file as it is now; None where none did."""
        states, stored = self._states(kind, path), self.stored.get(f"{kind} {path}")
        if states is None or stored is None:
            return None
        then, record = stored
        if states != then and not (
            [state[:2] for state in states] == [state[:2] for state in then] and self._same(kind, path, record)
        ):
            return None
        self.used[f"{kind} {path}"] = states, record
        return record

    def read(self, kind: str, path: str, read: Callable[[Path, str], Record]) -> Record:
        """Read a file and remember what was found."""
        states = self._states(kind, path)  # before: a file that changes meanwhile is read again
        record = read(self.root, path)
        if states is not None:
            self.used[f"{kind} {path}"] = states, record
        return record

    def put(self, kind: str, path: str, record: Record) -> None:
        """Remember what is known of a file already."""
        if (states := self._states(kind, path)) is not None:
            self.used[f"{kind} {path}"] = states, record

    def _parts(self, kind: str, path: str) -> list[Path]:
        file = Path(f"{self.root}/{path}")
        return mask_parts(file) if kind == "mask" else [file]

    def _states(self, kind: str, path: str) -> list[list[int]] | None:
        try:
            found = [part.stat() for part in self._parts(kind, path)]
        except OSError:
            return None
        return [[stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino] for stat in found]

    def _same(self, kind: str, path: str, record: Record) -> bool:
        """Return whether the files hold what they held."""
        try:
            return images.digest([part.read_bytes() for part in self._parts(kind, path)]) == record.get("sha256")
        except OSError:
            return False


def remember(root: Path, found: Iterable[tuple[str, str, Record]], decoding: Decoding = images.DEFAULT) -> None:
    """Keep what reading files under `root` found, so that no run reads them again.

    Parameters
    ----------
    found : (kind: 'image' or 'mask', path, record) of each.
    """
    with Records(root, keep=True, decoding=decoding) as cache:
        for kind, path, record in found:
            cache.put(kind, path, record)


def read_all(paths: set[str], kind: str, read: Callable[[Path, str], Record], cache: Records) -> dict[str, Record]:
    """Read each file once with `read`, by as many threads as there are cores (decoding releases Python's lock)."""
    from tqdm import tqdm

    cached = {path: record for path in paths if (record := cache.cached(kind, path)) is not None}
    ordered = sorted(paths - cached.keys())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda path: cache.read(kind, path, read), ordered)
        try:
            found = list(
                tqdm(results, total=len(ordered), desc=f"read {kind}s", unit=kind, disable=None if ordered else True)
            )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return {**cached, **dict(zip(ordered, found, strict=True))}
