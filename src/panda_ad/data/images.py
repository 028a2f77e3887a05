# SPDX-License-Identifier: Apache-2.0
"""Decode image files that nobody vouches for, to one form: uint8 RGB, upright.

What is decided here, for every caller (pipeline, command line, REST):

- Formats: PNG, JPEG, BMP, TIFF, WebP and PGM/PPM; nothing else is even tried.
- EXIF orientation is applied; other EXIF fields are not even read. Color profiles are ignored.
- 16-bit gray is scaled from its full range, round(v / 257), or from `Decoding.gray_range`.
  An image of a camera that fills only part of it (10 or 12 bits in a 16-bit file) else comes out dark.
  It is one range for all images, since stretching each by its own would hide brightness defects.
  12-bit TIFF is scaled from its 4095. 16-bit color keeps its high byte.
- Palette, gray, CMYK, YCbCr and 1-bit become RGB. Transparency is laid over white (in masks: over black, 'not marked'),
  or ignored where all is transparent.
  The one transparent color of a PNG of 16-bit color is refused: which pixels have it is no longer known.
- Of camera raw (NEF, DNG, ...) a preview alone could be read: refused.
- Floating-point and 32-bit images have no known range, and animations and multi-page files no one picture: refused.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from panda_ad.data.pixels import gray_levels, set_clear_color, tiff_tags, to_rgb, upright
from panda_ad.errors import UserError

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM")
MAX_PIXELS = 100_000_000
MAX_BYTES = 256 * 2**20
BATCH, BATCH_PIXELS = 32, 64_000_000
"""Most images, and most pixels of several together, that `batches` puts into one batch."""
MODES: tuple[str, ...] = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
MODES += ("I;16", "I;16L", "I;16B", "I;16N", "I")
"""Pillow's modes that can be decoded ("I" only from PGM, where it means 16 bits)."""
T = TypeVar("T")
WHITE = (255, 255, 255)

# Ours is the check that counts (below, before any pixel is decoded); Pillow's own stays armed behind it.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
# of EXIF data that cannot be read, with the path of Pillow's code: what matters of a file is said by ours
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


class _Choice(Protocol):
    @property
    def gray_range(self) -> Sequence[int] | None: ...
    @property
    def max_megapixels(self) -> int: ...


@dataclass(frozen=True)
class Decoding:
    """What files leave open; one choice for all images of a model, which keeps it.

    Attributes
    ----------
    gray_range : values of 16-bit gray that become black and white.
    max_megapixels : larger images are refused, and files of more than 2.7 bytes for each pixel allowed.
    """

    gray_range: tuple[int, int] = (0, 65535)
    max_megapixels: int = MAX_PIXELS // 1_000_000

    @classmethod
    def of(cls, chosen: _Choice) -> Decoding:
        """Return what `data` of params.yaml, or a detector's configuration, chooses."""
        low, high = chosen.gray_range or DEFAULT.gray_range
        return cls((low, high), chosen.max_megapixels)

    @property
    def max_bytes(self) -> int:
        """Most bytes of a file."""
        return MAX_BYTES * self.max_megapixels * 1_000_000 // MAX_PIXELS


DEFAULT = Decoding()


@dataclass(frozen=True)
class Picture:
    """A decoded image.

    Attributes
    ----------
    rgb : uint8 (H, W, 3), upright.
    mode : Pillow's name of the pixel mode as stored in the file, e.g. 'L', 'RGB', 'I;16'.
    values : smallest and largest value of 16-bit gray; None of other images.
    """

    rgb: np.ndarray
    mode: str
    values: tuple[int, int] | None = None


def decode(data: bytes, name: str, decoding: Decoding = DEFAULT) -> np.ndarray:
    """Decode an image file.

    Parameters
    ----------
    data : the file's bytes.
    name : what to call it in an error.
    decoding : what the file leaves open.

    Returns
    -------
    uint8 (H, W, 3).

    Raises
    ------
    UserError
        Empty, truncated, too large, not an image, or of a kind refused (see the module's text).
        The message names `name` and the reason.
    """
    return picture(data, name, WHITE, decoding).rgb


def picture(data: bytes, name: str, background: tuple[int, int, int] = WHITE, decoding: Decoding = DEFAULT) -> Picture:
    """Decode as `decode` does, with the stored mode, and transparency laid over `background` (RGB, 0..255)."""
    if not data:
        raise UserError(f"{name}: the file is empty")
    if len(data) > decoding.max_bytes:
        raise UserError(
            f"{name}: more than the {decoding.max_bytes // 2**20} MiB an image file may have; "
            "data.max_megapixels raises that"
        )
    if decoding.max_megapixels * 1_000_000 > (Image.MAX_IMAGE_PIXELS or 0):
        Image.MAX_IMAGE_PIXELS = decoding.max_megapixels * 1_000_000
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _refuse(image, name, decoding)
            mode = image.mode
            image.load()
            set_clear_color(image, data[24:25], name)
            gray = np.asarray(image) if mode.startswith("I") else None
            levels = None if gray is None else gray_levels(image, decoding.gray_range)
            values = None if gray is None else (int(gray.min()), int(gray.max()))
            rgb = to_rgb(upright(image), levels, background)
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"{name}: {_not_an_image(data)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(_too_large(name, "", decoding)) from None
    except Exception as e:  # Pillow's decoders raise a dozen kinds (SyntaxError, struct.error, ...) on damaged files
        raise UserError(
            f"{name}: truncated or damaged ({' '.join(str(e).split())[:120] or type(e).__name__})"
        ) from None
    return Picture(rgb, mode, values)


def _not_an_image(data: bytes) -> str:
    known = "PNG, JPEG, BMP, TIFF, WebP, PGM/PPM"
    if data[4:8] == b"ftyp":
        return f"HEIC, AVIF or a film, which is not read; save it as one of {known}"
    if data.startswith(b"version https://git-lfs"):
        return "only a pointer of Git LFS; run `git lfs pull`"
    return f"not an image of a known format ({known}), or cut off in its header"


def _too_large(name: str, size: str, decoding: Decoding) -> str:
    return (
        f"{name}: {size}more than the {decoding.max_megapixels * 1_000_000:,} pixels an image may have; "
        f"data.max_megapixels raises that"
    )


def _refuse(image: Image.Image, name: str, decoding: Decoding) -> None:
    """Raise for what must not be decoded; reads headers only."""
    width, height = image.size
    if width * height > decoding.max_megapixels * 1_000_000:
        raise UserError(_too_large(name, f"{width} x {height} pixels, ", decoding))
    if image.mode not in MODES or (image.mode == "I" and image.format != "PPM"):
        raise UserError(
            f"{name}: pixel mode {image.mode} is not read; save it as gray or RGB of 8 or 16 bits, whose range is known"
        )
    # TIFF 6.0, NewSubfileType (254): NEF, DNG and ARW are TIFF files whose first picture is a small preview
    if image.format == "TIFF" and tiff_tags(image).get(254, 0) & 1:
        raise UserError(f"{name}: camera raw, of which only the preview could be read; save the picture as PNG or TIFF")
    # A multi-picture JPEG (MPO) is a photo with previews or other views behind it: the first is the photo.
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1:
        raise UserError(f"{name}: holds {frames} frames or pages; save the one to inspect as a file of its own")


def read_bytes(path: Path | str, name: str | None = None, decoding: Decoding = DEFAULT) -> bytes:
    """Read a file, at most one byte more than `decode` takes, so that `decode` refuses a larger one.

    Raises UserError where the file cannot be read.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():  # a pipe would be waited for
            raise UserError(f"{name or path}: cannot be read (not a file)")
        with open(path, "rb") as f:
            return f.read(decoding.max_bytes + 1)
    except OSError as e:
        raise UserError(f"{name or path}: cannot be read ({e.strerror})") from None


def read_image(path: Path | str, sha256: str | None = None, decoding: Decoding = DEFAULT) -> np.ndarray:
    """Read and decode an image file: uint8 (H, W, 3).

    Raises UserError as `decode` does, and where the file is not the one of `sha256` (hex).
    """
    data = read_bytes(path, decoding=decoding)
    require_digest([data], sha256, path)
    return decode(data, str(path), decoding)


def digest(parts: Sequence[bytes]) -> str:
    """Return the sha256 (hex) of a file's bytes or, of several files, of their digests."""
    digests = [hashlib.sha256(data).hexdigest() for data in parts]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def require_digest(parts: Sequence[bytes], sha256: str | None, path: Path | str) -> None:
    """UserError unless `digest` of what was read is `sha256` (None: any)."""
    if sha256 is not None and digest(parts) != sha256:
        raise UserError(f"{path}: has changed since `validate` read it; run `dvc repro` again")


def pixel_count(file: Path | bytes) -> int:
    """Return how many pixels an image has, by its header alone; 0 where that cannot be read (decoding says why)."""
    if not isinstance(file, bytes) and not file.is_file():  # a pipe would be waited for
        return 0
    try:
        with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file, formats=FORMATS) as image:
            return image.width * image.height
    except Exception:  # as many kinds as decoding damaged files raises
        return 0


def batches(items: Iterable[T], pixels: Callable[[T], int]) -> Iterator[list[T]]:
    """Yield items in lists of BATCH, or fewer where their images would take more than BATCH_PIXELS.

    `pixels` gives how many pixels an item's image has when decoded.

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
