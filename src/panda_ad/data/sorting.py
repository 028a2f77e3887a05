# SPDX-License-Identifier: Apache-2.0
"""Which pictures of a folder are good, which are not, and which nobody has sorted, by the names of their folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from panda_ad.data.layouts import GOOD_NAMES, alike
from panda_ad.data.listing import Found, find_images, nfc, no_images, visible
from panda_ad.data.mask_files import MASK_FOLDERS
from panda_ad.errors import UserError

BAD_NAMES = frozenset([
    "bad", "defect", "defects", "defective", "anomaly", "anomalies", "anomalous", "ng", "nok", "n.i.o", "nio", "fail",
    "failed", "fault", "faulty", "reject", "rejects", "rejected", "schlecht", "ausschuss", "fehler", "defekt",
])  # fmt: skip
"""Folder names of defects of no named kind."""


@dataclass(frozen=True)
class Sorted:
    """The pictures of a folder, those in formats that are not read (HEIC, ...) too.

    Attributes
    ----------
    good : to learn from.
    others : to be judged, with what their folder says: 'good', a kind of defect, or '' where it says nothing.
    """

    good: list[Path]
    others: list[tuple[Path, str]]


def sort_pictures(folder: Path, all_good: bool = False) -> Sorted:
    """Sort the pictures below a folder.

    The nearest folder with a telling name decides. Good ones below a folder `test` are kept to be judged.
    Masks (`ground_truth`) are no pictures of parts.

    Parameters
    ----------
    all_good : whether those that no folder's name tells of are good.

    Raises
    ------
    UserError
        There is no such folder, no picture in it, or it holds several categories in MVTec's layout.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    several = [p.name for p in visible(folder) if (p / "train").is_dir()]
    if len(several) > 1:
        raise UserError(f"{folder}: holds several things, {', '.join(several)}; start with one: {folder / several[0]}")
    found = find_images([folder])
    files = [file for file in [*found.images, *found.unread] if not MASK_FOLDERS & set(_names(folder, file))]
    if not found.images or not files:
        raise UserError(no_images([folder], Found([], found.unread, found.passed_over)))
    good, others = [], []
    for file in files:
        names = _names(folder, file)
        kind = _kind(names) or ("good" if all_good or alike(nfc(folder.resolve().name)) in GOOD_NAMES else "")
        if kind == "good" and "test" not in names:
            good.append(file)
        else:
            others.append((file, kind))
    return Sorted(good, others)


def _names(folder: Path, file: Path) -> list[str]:
    """Return the names of the folders between, the nearest to the file first."""
    return [alike(nfc(part)) for part in reversed(file.relative_to(folder).parts[:-1])]


def _kind(names: list[str]) -> str:
    """Return what folder names say: 'good', a kind of defect, or ''."""
    for i, name in enumerate(names):
        if name in GOOD_NAMES:
            return "good"
        if name in BAD_NAMES:
            return names[i - 1] if i else name
        if "test" in names[i + 1 :]:
            return name
    return ""
