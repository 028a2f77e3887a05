"""Decode image files that nobody vouches for, to one form: uint8 RGB, upright.

What is decided here, for every caller (pipeline, command line, REST):

- Formats: PNG, JPEG, BMP, TIFF, WebP and PGM/PPM; nothing else is even tried.
- EXIF orientation is applied. Color profiles are ignored.
- 16-bit gray is scaled from its full range: round(v / 257). A camera that fills only part of the range (10 or 12 bits in a
  16-bit file) comes out dark; stretching each image by its own range would hide brightness defects, so window such images
  once, with one window for all, before handing them in. 12-bit TIFF is scaled from its 4095. 16-bit color keeps its high byte.
- Palette, gray, CMYK, YCbCr and 1-bit become RGB; transparency is laid over white (in masks: over black, 'not marked').
- Floating-point and 32-bit images have no known range, and animations and multi-page files no one picture: refused.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from panda_ad.errors import UserError

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM")
SUFFIXES = frozenset(
    (".png", ".jpg", ".jpeg", ".jpe", ".bmp", ".dib", ".tif", ".tiff", ".webp", ".pgm", ".ppm", ".pbm", ".pnm")
)
"""PixelStatistics endings of their names, lower case: what to pick up from a mixed folder. `decode` goes by content alone."""
MAX_PIXELS = 100_000_000
MAX_BYTES = 256 * 2**20
BATCH, BATCH_PIXELS = 32, 64_000_000
"""Most images, and most pixels of several together, that `batches` puts into one batch."""
MODES = (
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "I;16",
    "I;16L",
    "I;16B",
    "I;16N",
    "I",
)
"""Pillow's modes that can be decoded ("I" only from PGM, where it means 16 bits)."""
T = TypeVar("T")
WHITE, BLACK = (255, 255, 255), (0, 0, 0)

# Ours is the check that counts (below, before any pixel is decoded); Pillow's own stays armed behind it.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


@dataclass(frozen=True)
class Picture:
    """A decoded image.

    Attributes
    ----------
    rgb : uint8 (H, W, 3), upright.
    mode : Pillow's name of the pixel mode as stored in the file, e.g. 'L', 'RGB', 'I;16'.
    """

    rgb: np.ndarray
    mode: str


def decode(data: bytes, name: str) -> np.ndarray:
    """Decode an image file.

    Parameters
    ----------
    data : the file's bytes.
    name : what to call it in an error.

    Returns
    -------
    uint8 (H, W, 3).

    Raises
    ------
    UserError
        Empty, truncated, too large, not an image, or of a kind refused (see the module's text); names `name` and the reason.
    """
    return picture(data, name).rgb


def picture(data: bytes, name: str, background: tuple[int, int, int] = WHITE) -> Picture:
    """`decode`, with the stored mode, and transparency laid over `background` (RGB, 0..255)."""
    if not data:
        raise UserError(f"{name}: the file is empty")
    if len(data) > MAX_BYTES:
        raise UserError(
            f"{name}: {len(data) / 2**20:.0f} MiB, more than the {MAX_BYTES // 2**20} MiB an image file may have"
        )
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _refuse(image, name)
            mode = image.mode
            image.load()
            levels = _levels(image) if mode.startswith("I") else None
            rgb = _to_rgb(ImageOps.exif_transpose(image), levels, background)
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(
            f"{name}: not an image of a known format (PNG, JPEG, BMP, TIFF, WebP, PGM/PPM), or cut off in its header"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"{name}: more than the {MAX_PIXELS:,} pixels an image may have") from None
    except Exception as e:  # Pillow's decoders raise a dozen kinds (SyntaxError, struct.error, ...) on damaged files
        raise UserError(
            f"{name}: truncated or damaged ({' '.join(str(e).split())[:120] or type(e).__name__})"
        ) from None
    return Picture(rgb, mode)


def _refuse(image: Image.Image, name: str) -> None:
    """Raise for what must not be decoded; reads headers only."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UserError(f"{name}: {width} x {height} pixels, more than the {MAX_PIXELS:,} an image may have")
    if image.mode not in MODES or (image.mode == "I" and image.format != "PPM"):
        raise UserError(
            f"{name}: pixel mode {image.mode} has no known value range; save it with 8 or 16 bits per channel"
        )
    # A multi-picture JPEG (MPO) is a photo with previews or other views behind it: the first is the photo.
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1:
        raise UserError(f"{name}: holds {frames} frames or pages; save the one to inspect as a file of its own")


def _levels(image: Image.Image) -> np.ndarray:
    """uint8 (65536,): the gray that each value of a 16-bit image stands for."""
    tags: Any = getattr(image, "tag_v2", {})
    full_scale = 4095 if tags.get(258, (16,)) == (12,) else 65535  # 258: BitsPerSample
    levels = np.rint(np.arange(65536).clip(0, full_scale) * (255 / full_scale)).astype(np.uint8)
    return (
        255 - levels if tags.get(262) == 0 else levels
    )  # PhotometricInterpretation: white is zero, which Pillow sees to up to 8 bits only


def _to_rgb(image: Image.Image, levels: np.ndarray | None, background: tuple[int, int, int]) -> np.ndarray:
    """uint8 (H, W, 3) from any of MODES."""
    if levels is not None:
        values = np.asarray(image)
        rgb = np.empty((*values.shape, 3), np.uint8)
        for row, out in zip(values, rgb, strict=True):  # row by row: an index takes eight bytes a pixel
            out[:] = levels[row.clip(0, 65535)][:, None]
        return rgb
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
    return np.array(image.convert("RGB"))


def read_bytes(path: Path | str, name: str | None = None) -> bytes:
    """A file's bytes, at most MAX_BYTES + 1 of them (so that `decode` refuses a larger one unread). Raises UserError."""
    try:
        with open(path, "rb") as f:
            return f.read(MAX_BYTES + 1)
    except OSError as e:
        raise UserError(f"{name or path}: cannot be read ({e.strerror})") from None


def read_image(path: Path | str, sha256: str | None = None) -> np.ndarray:
    """Read and decode an image file: uint8 (H, W, 3). Raises UserError as `decode` does, and where the file is not the one of `sha256` (hex)."""
    return decode(_known_bytes(path, sha256), str(path))


def _known_bytes(path: Path | str, sha256: str | None) -> bytes:
    data = read_bytes(path)
    if sha256 is not None and hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{path}: has changed since `validate` read it; run `dvc repro` again")
    return data


def pixel_count(file: Path | bytes) -> int:
    """How many pixels an image has, by its header alone; 0 where that cannot be read, of which decoding says why."""
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as image:
            return image.width * image.height
    except Exception:  # as many kinds as decoding damaged files raises
        return 0


def batches(items: Iterable[T], pixels: Callable[[T], int]) -> Iterator[list[T]]:
    """Items in lists of BATCH, shorter where their images (`pixels` each) would take more than BATCH_PIXELS to hold decoded at a time.

    32 small files may be 10 GB of pixels. An image larger than BATCH_PIXELS is a list of its own.
    """
    batch: list[T] = []
    total = 0
    for item in items:
        size = pixels(item)
        if batch and (len(batch) == BATCH or total + size > BATCH_PIXELS):
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += size
    if batch:
        yield batch


def mask_levels(data: bytes, name: str) -> np.ndarray:
    """Decode a mask before it is binarized: uint8 (H, W), the largest channel. Raises UserError as `decode` does."""
    return picture(data, name, BLACK).rgb.max(axis=2)


def decode_mask(data: bytes, name: str) -> np.ndarray:
    """Decode a mask: bool (H, W), true where the largest channel reaches half of its range. Raises UserError as `decode` does."""
    return mask_levels(data, name) >= 128


def read_mask(path: Path | str, sha256: str | None = None) -> np.ndarray:
    """Read a mask file: bool (H, W), true where marked. Raises UserError as `read_image` does."""
    return decode_mask(_known_bytes(path, sha256), str(path))


def image_files(paths: Iterable[Path]) -> list[Path]:
    """Files as given, and the images in folders (recursive, sorted, hidden ones left out). UserError where there are none."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = (p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
            files += sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(path).parts))
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"{path}: no such file or folder")
    if not files:
        raise UserError(f"no images in {', '.join(map(str, paths))}; looked for {' '.join(sorted(SUFFIXES))}")
    return files
