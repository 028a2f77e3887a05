# SPDX-License-Identifier: Apache-2.0
"""Make the sample data: three categories of inspection images in MVTec layout, from a seed.

    python scripts/make_sample.py [--out data] [--seed 7] [--force]

`fabric` is a texture, `grid` a regular structure, `capsule` an object on a background. Light, exposure, position,
rotation, scale, color, grain and focus vary between normal images as they do between photographs. Each image has a
random stream of its own, from (seed, category, part, number): image 17 is the same whether 20 or 200 are made. The same
seed gives the same pixels (with the same versions of numpy and scipy); the bytes of the JPEG files also depend on the
libjpeg inside Pillow, so the files are the same only with the same Pillow wheel. The published bytes are those that
`data.dvc` names.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
from numpy.typing import NDArray
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from sample import capsule, fabric, grid
from sample.camera import apply_defect, draw_camera, photograph, reduce
from sample.shapes import SIZE

_MODULES: dict[str, ModuleType] = {"fabric": fabric, "grid": grid, "capsule": capsule}
CATEGORIES = tuple(_MODULES)
DEFECTS: dict[str, tuple[str, ...]] = {name: tuple(module.DEFECTS) for name, module in _MODULES.items()}
SMALLEST_MASK = 60
"""Pixels; a drawn defect that shows on fewer is drawn again."""
JPEG_QUALITY = 90

RGB = NDArray[np.uint8]
"""(SIZE, SIZE, 3) uint8."""


def image_rng(seed: int, category: str, part: str, index: int) -> np.random.Generator:
    """Return the random stream of one image; `part` is any name, such as 'train' or 'week 3'."""
    return np.random.default_rng([seed, zlib.crc32(category.encode()), zlib.crc32(part.encode()), index])


def normal_image(category: str, rng: np.random.Generator, light: float = 0.0) -> RGB:
    """Return a good part, uint8 (SIZE, SIZE, 3).

    `light` shifts the lamp: 0 as in training, towards 1 dimmer, warmer and more one-sided, towards -1 brighter and
    cooler. An equal `rng` gives the same part under any light.
    """
    module = _MODULES[category]
    scene, camera = module.draw(rng), draw_camera(rng, light)
    return photograph(reduce(module.render(scene)), camera)


def defective_image(
    category: str, defect: str, rng: np.random.Generator, light: float = 0.0
) -> tuple[RGB, NDArray[np.bool_]]:
    """Return a defective part and its mask, uint8 (SIZE, SIZE, 3) and bool (SIZE, SIZE).

    It is the part and photograph that `normal_image` makes from an equal `rng`, with the defect; both are the same
    farther than a few pixels from the mask.
    """
    module = _MODULES[category]
    scene, camera = module.draw(rng), draw_camera(rng, light)
    normal = reduce(module.render(scene))
    while True:
        image, mask = apply_defect(normal, reduce(module.DEFECTS[defect](scene, rng)))
        if mask.sum() >= SMALLEST_MASK:
            return photograph(image, camera), mask


def normal_images(
    category: str, count: int, seed: int, part: str = "train", light: float = 0.0, first: int = 0
) -> Iterator[RGB]:
    """`count` good parts, numbers `first`, `first` + 1, ... of a seed and part."""
    for index in range(first, first + count):
        yield normal_image(category, image_rng(seed, category, part, index), light)


def write_dataset(
    root: Path | str,
    *,
    seed: int = 7,
    train: int = 120,
    good: int = 30,
    per_defect: int = 12,
    categories: Sequence[str] = CATEGORIES,
    held_back: Sequence[str] = (),
    light: float = 0.0,
) -> int:
    """Write a data set in MVTec layout.

    Parameters
    ----------
    root : folder, made where it is absent; files of the same names are overwritten.
    train, good, per_defect : images per category: normal for training, normal for testing, defective per kind.
    held_back : kinds of defect left out, in every category that has them.
    light : see `normal_image`.

    Returns
    -------
    Number of files written, masks included.
    """
    written = 0
    for category in categories:
        base = Path(root) / category
        for part, count in (("train/good", train), ("test/good", good)):
            for index, rgb in enumerate(normal_images(category, count, seed, part, light)):
                _save(Image.fromarray(rgb), base / part / f"{index:03d}.jpg")
                written += 1
        for defect in DEFECTS[category]:
            if defect in held_back:
                continue
            for index in range(per_defect):
                rgb, mask = defective_image(category, defect, image_rng(seed, category, f"test/{defect}", index), light)
                _save(Image.fromarray(rgb), base / "test" / defect / f"{index:03d}.jpg")
                _save(Image.fromarray(mask), base / "ground_truth" / defect / f"{index:03d}_mask.png")
                written += 2
    return written


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".png":
        image.save(path, optimize=True)
    else:
        image.save(path, quality=JPEG_QUALITY, optimize=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Make the sample data (MVTec layout) from a seed.")
    parser.add_argument("--out", type=Path, default=Path("data"), help="folder to make (default: data)")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--force", action="store_true", help="replace the folder where it exists")
    options = parser.parse_args(arguments)
    out: Path = options.out
    if out.exists() and not options.force:
        print(f"{out} exists; add --force to replace it, or name another folder with --out", file=sys.stderr)
        return 2
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{out.name}-", dir=out.parent
    ) as scratch:  # a killed run leaves no half-made data set
        fresh = Path(scratch) / "new"
        count = write_dataset(fresh, seed=options.seed)
        if out.exists():
            out.rename(Path(scratch) / "old")
        fresh.rename(out)
    size = sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    print(f"{out}: {count} files, {size / 1e6:.1f} MB, {SIZE} x {SIZE} pixels, seed {options.seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
