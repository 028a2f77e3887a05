# SPDX-License-Identifier: Apache-2.0
"""Images beside the data set: outliers, brought to the resolution of the normal images, and labeled source images.

Sharpness and color would otherwise tell outliers apart without a look at what they show, and nothing would be learned.
On CIFAR-10's airplane, 64 px outliers against 32 px images left outlier exposure 10 points below the same outliers at
32 px (docs/results.md).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from panda_ad.data.images import pixel_count, read_bytes, read_image
from panda_ad.data.listing import image_files
from panda_ad.errors import UserError
from panda_ad.features.cache import Item


def folder_files(folder: Path, key: str) -> list[Path]:
    """Return the image files below a folder, sorted. UserError names the parameter `key` if there is no such folder."""
    if not folder.is_dir():
        raise UserError(f"{key}: no folder {folder}")
    return image_files([folder])


def plain_item(path: Path) -> Item:
    """Return an image file for the activation cache, as it is."""
    return Item(hashlib.sha256(path.read_bytes()).hexdigest(), functools.partial(read_image, path))


def is_gray(rgb: np.ndarray) -> bool:
    """Return whether the channels of an image, uint8 (H, W, 3), are equal everywhere."""
    return bool((rgb == rgb[:, :, :1]).all())


def outlier_item(path: Path, size: tuple[int, int], gray: bool) -> Item:
    """Return an outlier image for the activation cache, reduced to the resolution of the normal images.

    Parameters
    ----------
    path : its file.
    size : (height, width) of the normal images, pixels. A larger outlier is reduced to that, antialiased.
        A smaller one stays: nothing is invented.
    gray : whether the normal images are gray; the outlier is then made gray too.

    Returns
    -------
    Item whose key holds `size` and `gray`, so that the same file at another resolution is another image.
    """
    digest = hashlib.sha256(read_bytes(path) + f"at most {size[0]} x {size[1]}, {'gray' if gray else 'color'}".encode())
    return Item(digest.hexdigest(), functools.partial(read_outlier, path, size, gray))


def read_outlier(path: Path, size: tuple[int, int], gray: bool) -> np.ndarray:
    """Read an outlier, uint8 (H, W, 3), as `outlier_item` describes. UserError where it cannot be decoded."""
    image = Image.fromarray(read_image(path))
    height, width = min(image.height, size[0]), min(image.width, size[1])
    if (height, width) != (image.height, image.width):
        image = image.resize((width, height), Image.Resampling.BILINEAR)  # antialiased
    return np.array(image.convert("L").convert("RGB") if gray else image)


def coarseness(files: Sequence[Path], size: tuple[int, int], network: tuple[int, int]) -> float:
    """Return how many times coarser outliers are than normal images, as the network sees both: 1 where not.

    Parameters
    ----------
    files : the outliers.
    size : (height, width) of the normal images, pixels.
    network : (height, width) of the network's input, which hides any resolution beyond its own.

    Returns
    -------
    Ratio of lengths, >= 1: the square root of normal pixels per pixel of the median outlier.
    """
    most = network[0] * network[1]
    pixels = [min(found, most) for file in files if (found := pixel_count(file))]
    return max(1.0, (min(size[0] * size[1], most) / float(np.median(pixels))) ** 0.5) if pixels else 1.0
