# SPDX-License-Identifier: Apache-2.0
"""Which entries of a folder are images, wherever folders are listed.

These are data sets, files to score, drop folders and files to add.

Hidden entries and those that file servers and operating systems leave behind do not exist. Other files are known as
images by their ending or, where they have none that says anything, by their first bytes.
What is not an image is passed over and counted.
"""

from __future__ import annotations

import os
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from panda_ad.errors import UserError

SUFFIXES = frozenset(
    [
        ".png",
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".jif",
        ".pjpeg",
        ".pjp",
        ".bmp",
        ".dib",
        ".tif",
        ".tiff",
        ".webp",
        ".pgm",
        ".ppm",
        ".pbm",
        ".pnm",
    ]
)
"""Image files' endings, lower case. Decoding goes by content alone."""
UNREAD = frozenset(
    [
        ".heic",
        ".heif",
        ".hif",
        ".avif",
        ".gif",
        ".jp2",
        ".j2k",
        ".jpx",
        ".jxl",
        ".jxr",
        ".dng",
        ".cr2",
        ".cr3",
        ".nef",
        ".arw",
        ".orf",
        ".rw2",
        ".raf",
        ".raw",
        ".psd",
        ".exr",
        ".hdr",
        ".dcm",
    ]
)
"""Endings of pictures that are not decoded: they are named, not only counted."""
_INCOMPLETE = frozenset(
    [".tmp", ".temp", ".part", ".partial", ".filepart", ".crdownload", ".download", ".bak", ".old", ".orig", ".swp"]
)
"""Endings of copies that are not finished, and of backups: never read, whatever they hold."""
_SYSTEM = frozenset(
    [
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
        "icon\r",
        "@eadir",
        "@recycle",
        "@tmp",
        "@sharebin",
        "@recently-snapshot",
        "#recycle",
        "#snapshot",
        "~snapshot",
        "$recycle.bin",
        "recycler",
        "lost+found",
        "__macosx",
        "found.000",
    ]
) | {"system volume information", "network trash folder", "temporary items"}
"""Files and folders that file servers and operating systems leave behind.

Hidden ones, as .Trash-1000 and ._000.png, are passed over by their dot.
"""
_NAMED = 3


def visible(folder: Path) -> list[Path]:
    """Return a folder's entries in the order of their names, none where there is no such folder.

    Raises UserError where it cannot be listed.
    """
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as e:
        raise UserError(f"{folder}: cannot be listed ({e.strerror})") from None
    return [folder / name for name in names if not hidden(name)]


def hidden(name: str) -> bool:
    """Tell whether a file or folder of this name does not exist for us."""
    return name.startswith(".") or name.lower() in _SYSTEM


def is_image(file: Path) -> bool:
    """Tell whether a file claims to be an image: by its ending, else by its first bytes."""
    suffix = file.suffix.lower()
    if suffix in SUFFIXES:
        return True
    if suffix in UNREAD or suffix in _INCOMPLETE or file.name.endswith("~") or not file.is_file():
        return False
    try:
        with open(file, "rb") as f:
            start = f.read(16)
    except OSError:
        return False
    return (
        start.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"MM\0*"))
        or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")
        or (start[:2] == b"BM" and start[6:10] == bytes(4))
    )


def same_name(a: str, b: str) -> bool:
    """Compare names as people read them: macOS writes ä as two characters, others as one."""
    return nfc(a) == nfc(b)


def nfc(name: str) -> str:
    """Return a name in Unicode's composed form."""
    return unicodedata.normalize("NFC", name)


@dataclass(frozen=True)
class Found:
    """Files of some folders.

    Attributes
    ----------
    images : to be decoded.
    unread : pictures in formats that are not decoded (HEIC, GIF, camera raw, ...).
    passed_over : other files.
    """

    images: list[Path]
    unread: list[Path]
    passed_over: list[Path]


def find_images(paths: Iterable[Path]) -> Found:
    """Sort files into images and others.

    Those given by name count as images. Folders are searched with all below them, links to folders followed once.

    Raises
    ------
    UserError
        A path does not exist, or a folder cannot be listed.
    """
    found = Found([], [], [])
    for path in paths:
        if path.is_dir():
            for file in _walk(path, set()):
                if is_image(file):
                    found.images.append(file)
                else:
                    (found.unread if file.suffix.lower() in UNREAD else found.passed_over).append(file)
        elif path.is_file():
            found.images.append(path)
        else:
            known = "leads to no file or folder" if path.is_symlink() else "is no file or folder, and is not read"
            raise UserError(f"{path}: {known if os.path.lexists(path) else 'no such file or folder'}")
    return found


def image_files(paths: Iterable[Path]) -> list[Path]:
    """Return files as given and the images in folders, as `find_images`. UserError where there are none."""
    paths = list(paths)
    found = find_images(paths)
    if not found.images:
        raise UserError(no_images(paths, found))
    return found.images


def no_images(paths: Iterable[Path], found: Found) -> str:
    """Say that folders hold no image, and what they hold instead."""
    others = describe(found.unread + found.passed_over)
    return f"no images in {', '.join(map(str, paths))}; looked for {' '.join(sorted(SUFFIXES))}" + (
        f", passed over {others}" if others else ""
    )


def _walk(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """Yield all files below a folder, in the order of names."""
    try:
        stat = folder.stat()
    except OSError as e:
        raise UserError(f"{folder}: cannot be listed ({e.strerror})") from None
    if (stat.st_dev, stat.st_ino) in seen:
        return
    seen.add((stat.st_dev, stat.st_ino))
    for path in visible(folder):
        if path.is_dir():
            yield from _walk(path, seen)
        else:
            yield path


def settled(files: Iterable[Path], seconds: float) -> tuple[list[Path], list[Path]]:
    """Divide files into those that nobody writes to, and those that may still be being copied.

    Files changed within `seconds` (or in the future, by a server's clock) are looked at again after as long.
    What has not changed by then is complete. Files that have gone count as neither.
    """
    files = list(files)
    before = {file: _state(file) for file in files}
    now = time.time_ns()
    young = [f for f in files if (state := before[f]) is not None and max(state[1:]) > now - seconds * 1e9]
    if young:
        time.sleep(seconds)
    moving = {f for f in young if _state(f) != before[f]}
    return [f for f in files if before[f] is not None and f not in moving], sorted(moving)


def _state(file: Path) -> tuple[int, int, int] | None:
    """Return size, and times of change of content and of the file; None where it has gone."""
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def describe(files: Iterable[Path]) -> str:
    """Count files once per ending, and name those that may be pictures.

    An example: '30 .json, 1 .heic (phone.heic), 1 without ending (x)'.
    """
    files = list(files)
    counts = Counter(f.suffix.lower() for f in files)
    parts = []
    for suffix, n in sorted(counts.items()):
        names = [printable(f.name) for f in files if f.suffix.lower() == suffix]
        more = f" and {n - _NAMED} more" if n > _NAMED else ""
        named = f" ({', '.join(names[:_NAMED])}{more})" if suffix in UNREAD or not suffix else ""
        parts.append(f"{n} {suffix or 'without ending'}{named}")
    return printable(" ".join(", ".join(parts).split()))


def printable(text: str) -> str:
    r"""Return the text with bytes that are not UTF-8 (which Python keeps as lone surrogates) written as \x escapes."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def one_line(text: str) -> str:
    """Return `printable` text with line breaks and control characters as escapes too, for tables and messages.

    Python 3.11 writes a carriage return into CSV without quotes, where readers begin a row.
    """
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]", lambda found: rf"\x{ord(found[0]):02x}", printable(text))
