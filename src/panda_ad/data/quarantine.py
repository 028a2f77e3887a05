# SPDX-License-Identifier: Apache-2.0
"""Copies of files that cannot be used, with the reasons."""

from __future__ import annotations

import csv
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

from panda_ad.data.listing import SUFFIXES, printable
from panda_ad.system.files import atomic_folder, digest_if_readable

REASONS = "reasons.csv"


def quarantine(parent: Path, refused: Sequence[tuple[Path, str]]) -> tuple[Path | None, int]:
    """Copy the refused files into a folder named by the time, with reasons.csv.

    Its columns are path, reason, copy (the copy's name) and sha256.

    Returns
    -------
    The folder, None where there was nothing to copy, and how many of the files were left out.
    A file is left out where an earlier folder holds its content.
    """
    copied = _copied(parent)
    digests = {path: digest_if_readable(path) for path, _ in refused}
    new = [(path, reason) for path, reason in refused if digests[path] not in copied]
    if not new:
        return None, len(refused)
    stamp = time.strftime("%Y-%m-%d_%H%M%S")
    folder = next(
        f for f in (parent / f"{stamp}{tail}" for tail in ("", *(f"-{n}" for n in range(2, 10_000)))) if not f.exists()
    )
    with atomic_folder(folder) as temporary:
        rows = []
        for n, (path, why) in enumerate(new, 1):
            copy, reason = f"{n:04d}-{plain_stem(path)}{image_suffix(path)}", why
            try:
                shutil.copyfile(path, temporary / copy)
            except OSError as e:  # it could not be read in the first place
                copy, reason = "", f"{why}; no copy was made ({e.strerror})"
            rows.append([printable(str(path)), printable(" ".join(reason.split())), printable(copy), digests[path]])
        with open(temporary / REASONS, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n")
            writer.writerow(["path", "reason", "copy", "sha256"])
            writer.writerows(rows)
    return folder, len(refused) - len(new)


def _copied(parent: Path) -> set[str]:
    """Return sha256 of the copies that are there; folders from before reasons.csv had that column hold unknown ones."""
    found = set()
    for path in parent.glob(f"*/{REASONS}"):
        with open(
            path, encoding="utf-8", errors="replace", newline=""
        ) as file:  # a spreadsheet may have saved it since
            found |= {
                row["sha256"]
                for row in csv.DictReader(file)
                if row.get("sha256") and (path.parent / (row.get("copy") or "")).is_file()
            }
    return found


def plain_stem(file: Path) -> str:
    """Return a file's name without its ending, of characters that every file system takes, and not too many."""
    return re.sub(r"[^\w.-]+", "_", file.stem).strip("._-")[:40] or "image"


def image_suffix(file: Path) -> str:
    """Return a file's ending in lower case where it is one of an image, else ''."""
    suffix = file.suffix.lower()
    return suffix if suffix in SUFFIXES else ""
