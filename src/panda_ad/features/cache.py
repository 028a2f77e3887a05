# SPDX-License-Identifier: Apache-2.0
"""Cache of frozen activations: each image is decoded and sent through the frozen layers once.

PANDA uses no augmentation and fixed batch-norm statistics, so the frozen layers' output for an image is a constant.
It is kept on disk as float16, memory-mapped, in a folder per (network, input size, engine, precision).
There is one record per sha256 of the image's file.
The pooled features of the pretrained layers are kept too, as float32.
The cache lies outside DVC's and is safe to delete.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from tqdm import tqdm

from panda_ad.features.network import Network
from panda_ad.system.cores import side_by_side

_RULES = (
    *(f"features/{name}.py" for name in ("engine", "export", "network", "preprocessing")),
    *(f"data/{name}.py" for name in ("images", "outliers", "pixels")),
)
_CHUNK = 64  # images decoded, computed and written at a time
_IN_USE = "in-use"  # a file of each cache that its users lock
_LINE = 65  # a sha256 in hex and a newline


class Item(NamedTuple):
    """An image that may be cached: sha256 of its file (hex), and a function that decodes it to uint8 (H, W, 3)."""

    key: str
    read: Callable[[], np.ndarray]


class _Store:
    """Append-only file of equal records and a list of their keys, a line of 65 bytes each.

    A key is listed only after its record is written, and a line cut short does not count.
    So a kill loses nothing that was listed.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: type[np.floating] = np.float16):
        self.shape, self.dtype, self.index = shape, dtype, path.with_suffix(".keys")
        self.path = path.with_suffix(".f16" if dtype is np.float16 else ".f32")
        self.record = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.row: dict[str, int] = {}
        self.reload()

    def _sizes(self) -> int:
        """Return how many records are complete on disk."""
        files = ((self.path, self.record), (self.index, _LINE))
        return min(f.stat().st_size // unit if f.exists() else 0 for f, unit in files)

    def reload(self) -> None:
        """Take up what is on disk."""
        n = self._sizes()
        if n != len(self.row):
            keys = self.index.read_text()[: n * _LINE].split()
            self.row = {key: i for i, key in enumerate(keys)}
        self.array = (
            np.memmap(self.path, self.dtype, "r", shape=(n, *self.shape))
            if n
            else np.empty((0, *self.shape), self.dtype)
        )

    def append(self, keys: Sequence[str], values: np.ndarray) -> None:
        """Add records (B, *shape) of distinct keys that are not there yet."""
        with open(self.path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self._sizes() != len(self.row):  # another process has written
                self.reload()
            new = [i for i, key in enumerate(keys) if key not in self.row]
            n = len(self.row)
            with open(self.path, "ab") as f:
                f.truncate(n * self.record)
                f.write(np.ascontiguousarray(values[new]).data)
            with open(self.index, "ab") as f:
                f.truncate(n * _LINE)
                f.write("".join(f"{keys[i]}\n" for i in new).encode())
            self.row.update({keys[i]: n + j for j, i in enumerate(new)})


class Activations:
    """Activations of the frozen layers for images, computed where the cache does not hold them.

    Parameters
    ----------
    network : its frozen layers compute them, its first adapted ones the pooled features.
    root : folder of all such caches.
    cache_gb : disk budget of `root`, GB.
        Least recently used caches of other backbones or sizes are deleted to stay within it.
        What does not fit then is computed anew each time it is read.
    """

    def __init__(self, network: Network, root: Path, cache_gb: float):
        self.network, self.root = network, root
        self.budget = int(cache_gb * 1e9)
        # what decodes, resizes and computes is part of the key: a model must not compare features of two makes
        rules = b"".join((Path(__file__).parents[1] / name).read_bytes() for name in _RULES) + PIL.__version__.encode()
        key = f"{network.key}-{hashlib.sha256(rules).hexdigest()}"
        self.folder = root / hashlib.sha256(key.encode()).hexdigest()[:24]
        self.folder.mkdir(parents=True, exist_ok=True)
        os.utime(self.folder)
        self._in_use = open(self.folder / _IN_USE, "a")  # noqa: SIM115, held, shared, as long as this object lives
        fcntl.flock(self._in_use, fcntl.LOCK_SH)
        probe = network.activations(np.zeros((1, 3, *network.size), np.float32))
        width = network.features(probe)[0].shape[1]
        self.shapes = {name: values.shape[1:] for name, values in probe.items()}
        self.stores = {name: _Store(self.folder / name, shape) for name, shape in self.shapes.items()}
        self.features = _Store(self.folder / "pooled", (width,), np.float32)

    def compute(self, items: Sequence[Item]) -> dict[str, np.ndarray]:
        """Compute each level of some images, straight from their pixels: float16 (N, C, h, w) each."""
        return self._computed(items, self.network.frozen_levels)

    def _computed(self, items: Sequence[Item], levels: Sequence[str]) -> dict[str, np.ndarray]:
        """Decode, resize and compute, each image in one go: float16 (N, C, h, w) per level."""

        def one(item: Item) -> list[np.ndarray]:
            found = self.network.activations(self.network.preprocess([item.read()]))
            return [found[level] for level in levels]

        parts = zip(*side_by_side(one, items), strict=True)
        return {level: np.concatenate(values) for level, values in zip(levels, parts, strict=True)}

    @property
    def last(self) -> str:
        """The level at which the frozen layers end: what the adapted layers read."""
        return self.network.frozen_levels[-1]

    def warm(self, items: Sequence[Item], layers: Sequence[str] = (), label: str = "frozen layers") -> int:
        """Compute and store what is missing of some levels, by default the last; return how many images it computed."""
        layers = layers or (self.last,)
        distinct = {item.key: item for item in items}
        missing = [item for key, item in distinct.items() if any(key not in self.stores[layer].row for layer in layers)]
        record = sum(self.stores[layer].record for layer in layers)
        room = self._make_room(len(missing) * record) // record
        if room < len(missing):
            print(
                f"activation cache: {len(missing) - room} of {len(distinct)} images "
                f"do not fit into backbone.cache_gb = {self.budget / 1e9:g} "
                "and will be computed at each use; raise it for speed",
                file=sys.stderr,
            )
        missing = missing[:room]
        chunks = [missing[i : i + _CHUNK] for i in range(0, len(missing), _CHUNK)]
        done = 0
        with tqdm(total=sum(map(len, chunks)), desc=label, unit="img", disable=not chunks) as bar:
            for chunk in chunks:
                values = self._computed(chunk, layers)
                for layer in layers:
                    self.stores[layer].append([item.key for item in chunk], values[layer])
                done += len(chunk)
                bar.update(len(chunk))
        for layer in layers:
            self.stores[layer].reload()
        return done

    def view(self, items: Sequence[Item], layer: str | None = None) -> View:
        """Return array-like access to one level of `items`, by default the last, in their order."""
        return View(self, items, layer or self.last)

    def pooled(self, items: Sequence[Item], batch: int = _CHUNK) -> Iterator[np.ndarray]:
        """Yield batches of the pretrained layers' pooled features of `items`, float32 (B, D), in order.

        What is missing is computed and stored.
        """
        store = self.features
        missing = len({item.key for item in items} - store.row.keys())
        room = self._make_room(missing * store.record) // store.record
        for i in range(0, len(items), batch):
            part = items[i : i + batch]
            new = [item for item in {item.key: item for item in part}.values() if item.key not in store.row]
            values = np.empty((0, *store.shape), np.float32)
            if new:
                values = self.network.features({self.last: self.view(new)[:]})[0]
            at = {item.key: n for n, item in enumerate(new)}
            yield np.stack(
                [values[at[item.key]] if item.key in at else store.array[store.row[item.key]] for item in part]
            )
            kept = new[:room]
            room -= len(kept)
            if kept:
                store.append([item.key for item in kept], values[: len(kept)])
                store.reload()

    def _make_room(self, wanted: int) -> int:
        """Delete other caches, oldest first, until `wanted` more bytes fit; returns how many of them do."""
        folders = sorted(
            (f for f in self.root.iterdir() if f.is_dir() and f != self.folder), key=lambda f: f.stat().st_mtime
        )
        sizes = {f: sum(p.stat().st_size for p in f.glob("*.f[13]?")) for f in [*folders, self.folder]}
        while folders and sum(sizes.values()) + wanted > self.budget:
            folder = folders.pop(0)
            if _removed(folder):
                del sizes[folder]
        return max(0, min(wanted, self.budget - sum(sizes.values())))


def _removed(folder: Path) -> bool:
    """Delete another cache, unless a process has it open; whether it is gone."""
    try:
        with open(folder / _IN_USE, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        return not folder.exists()
    return True


class View:
    """One layer of a sequence of images, indexed like an array of shape (N, C, h, w), float16."""

    def __init__(self, activations: Activations, items: Sequence[Item], layer: str):
        self.activations, self.items, self.layer = activations, items, layer
        store = activations.stores[layer]
        self.rows = np.array([store.row.get(item.key, -1) for item in items], dtype=np.int64)
        self.shape = (len(items), *activations.shapes[layer])

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: slice | np.ndarray | Sequence[int]) -> np.ndarray:
        """Return rows by slice or integer array, float16 (B, C, h, w); rows missing in the cache are computed."""
        chosen = np.arange(len(self.items))[index]
        rows = self.rows[chosen]
        out = np.empty((len(chosen), *self.shape[1:]), np.float16)
        held = rows >= 0
        out[held] = self.activations.stores[self.layer].array[rows[held]]
        if not held.all():
            out[~held] = self.activations.compute([self.items[i] for i in chosen[~held]])[self.layer]
        return out
