# SPDX-License-Identifier: Apache-2.0
"""Pictures for the page, as JPEG: files of log and gallery, checked by what they hold, decoded as everywhere."""

from __future__ import annotations

import hashlib
import io
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from panda_ad.data.images import DEFAULT, Decoding, decode, read_bytes
from panda_ad.errors import UserError

SIDES = {"thumb": 160, "screen": 1600, "full": 4096}
"""Longer side in pixels; the last is for a close look."""
_QUALITY = {"thumb": 80, "screen": 88, "full": 92}


class Cache:
    """Bytes by key, the least recently used go where there are more than `limit` bytes; for several threads."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held, self._lock = limit, 0, threading.Lock()
        self._items: OrderedDict[tuple[str, ...], bytes] = OrderedDict()

    def get(self, key: tuple[str, ...], make: Callable[[], dict[tuple[str, ...], bytes]]) -> bytes:
        """Return what is kept under a key; if nothing is, keep all that `make` gives, and return it."""
        with self._lock:
            if (found := self._items.get(key)) is not None:
                self._items.move_to_end(key)
                return found
        made = make()
        with self._lock:
            for name, data in made.items():
                self._held += len(data) - len(self._items.pop(name, b""))
                self._items[name] = data
            while self._held > self._limit and len(self._items) > 1:
                self._held -= len(self._items.popitem(last=False)[1])
        return made[key]

    def __len__(self) -> int:
        return self._held


class Pictures:
    """JPEGs of files, each made once; at most two are decoded at a time, since one may take 300 MB."""

    def __init__(self, limit: int = 128 * 2**20) -> None:
        self._cache, self._slots = Cache(limit), threading.Semaphore(2)

    def jpeg(self, path: Path, sha256: str, side: str, decoding: Decoding = DEFAULT) -> bytes:
        """Return a file as JPEG of at most `SIDES[side]` pixels a side.

        Raises
        ------
        UserError
            The file is gone, is no longer the one of `sha256`, or cannot be decoded.
        """

        def make() -> dict[tuple[str, ...], bytes]:
            with self._slots:
                rgb = read_exactly(path, sha256, decoding)
                sides = ("full",) if side == "full" else ("thumb", "screen")
                picture = Image.fromarray(rgb)
                return {(sha256, name): _encoded(picture, name) for name in sides}

        return self._cache.get((sha256, side), make)


def read_exactly(path: Path, sha256: str, decoding: Decoding) -> np.ndarray:
    """Decode a file, uint8 (H, W, 3). UserError where it is gone, another one by now, or no image."""
    if not path.exists():
        raise UserError(f"{path}: the image is gone since it was scored")
    data = read_bytes(path, decoding=decoding)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{path}: holds another image than the one that was scored")
    return decode(data, str(path), decoding)


def _encoded(picture: Image.Image, name: str) -> bytes:
    side, out = SIDES[name], io.BytesIO()
    if max(picture.size) > side:
        scale = side / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        picture = picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
    picture.save(out, "JPEG", quality=_QUALITY[name], subsampling=0 if name == "full" else -1)
    return out.getvalue()


def heat_png(heatmap: np.ndarray, color_range: tuple[float, float]) -> bytes:
    """Return a heat map, float (h, w), as PNG to lay over its image, in the colors of `panda-ad score --heatmaps`.

    What normal images show is transparent; from there it goes from yellow to red.
    """
    start, full = color_range
    strength = np.clip((heatmap - start) / max(full - start, 1e-12), 0, 1)
    rgba = np.zeros((*heatmap.shape, 4), np.uint8)
    rgba[..., 0] = 255
    rgba[..., 1] = np.round(220 * (1 - strength))
    rgba[..., 3] = np.round(255 * strength)
    out = io.BytesIO()
    Image.fromarray(rgba).save(out, "PNG", compress_level=4)
    return out.getvalue()
