# SPDX-License-Identifier: Apache-2.0
"""Which mask belongs to which image of a category in the layout `mvtec`.

Masks lie in `ground_truth/<defect>/` or in `ground_truth/` itself, and are called `<stem>_mask.*` or `<stem>.*`.
The folder may be called otherwise (see MASK_FOLDERS), and names may differ from those in test/ by case.
A folder `<stem>/` holds several masks of one image (MVTec LOCO), which are joined.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from panda_ad.data.listing import is_image, nfc, visible

MASK_FOLDERS = frozenset(["ground_truth", "groundtruth", "ground-truth", "gt", "masks", "mask"]) | {"ground truth"}
"""Names of a category's folder of masks, in any case."""

ByStem = dict[str, list[Path]]


class MaskFiles:
    """The masks of one category, and which of them an image has asked for.

    Parameters
    ----------
    folders : those of the category that are called as in MASK_FOLDERS.
    passed : gets the files there that are no images.
    """

    def __init__(self, folders: Sequence[Path], passed: list[Path]) -> None:
        self.kinds: list[str] = []
        self._folders: dict[str, list[Path]] = defaultdict(list)
        self._direct: ByStem = defaultdict(list)
        self._claimed: Counter[Path] = Counter()
        self._used: set[Path] = set()
        self._offered: list[tuple[str, Path]] = []
        self._passed = passed
        for folder in folders:
            for path in visible(folder):
                if path.is_dir():
                    self._folders[nfc(path.name)].append(path)
                elif is_image(path):
                    self._direct[nfc(path.stem)].append(path)
                else:
                    passed.append(path)

    def claim_direct(self, images: Mapping[str, Sequence[Path]]) -> None:
        """Count for each mask directly in the folder the images it may belong to.

        Parameters
        ----------
        images : per kind of defect; good ones are left out.
        """
        for kind, files in images.items():
            if kind.casefold() != "good" and not self._folders_of(kind):
                for stem in {nfc(f.stem) for f in files}:
                    self._claimed.update(_lookup(self._direct, stem))

    def of(self, kind: str, images: Sequence[Path]) -> dict[Path, tuple[Path | None, str]]:
        """Return each image's mask and '' or what is wrong with it.

        A mask is a file, or a folder of files to join; None where the image has none.
        """
        own = self._folders_of(kind)
        masks = self._read(kind, own) if own else self._direct
        names = Counter(nfc(f.stem) for f in images)
        return {image: self._pair(image, _lookup(masks, nfc(image.stem)), names[nfc(image.stem)]) for image in images}

    def _pair(self, image: Path, found: list[Path], same: int) -> tuple[Path | None, str]:
        self._used.update(found)
        if not found:
            return None, ""
        mask = found[0]
        if len(found) > 1:
            return (
                None,
                f"has several masks, {' and '.join(str(p) for p in found)}: "
                f"keep one, or put them into a folder {image.stem}/",
            )
        if same > 1:
            return (
                None,
                f"shares its mask {mask} with another image called {image.stem}: give each image a name of its own",
            )
        if self._claimed[mask] > 1:
            return (
                None,
                f"its mask {mask} may be of an image of another defect: put masks into {mask.parent.name}/<defect>",
            )
        return mask, ""

    def unused(self) -> Iterator[tuple[Path, str]]:
        """Yield the masks that no image has asked for, and mask folders named like no defect, each with the reason."""
        for name, folders in self._folders.items():
            if name.casefold() != "good" and name.casefold() not in {k.casefold() for k in self.kinds}:
                for folder in folders:
                    yield (
                        folder,
                        f"holds masks, but test/ has no {name}; it has {', '.join(self.kinds) or 'no defects'}",
                    )
        for kind, mask in self._offered:
            if mask not in self._used:
                yield mask, f"is a mask without an image in test/{kind}"
        for mask in (m for masks in self._direct.values() for m in masks):
            if mask not in self._used:
                yield mask, "is a mask without an image in test"

    def _folders_of(self, kind: str) -> list[Path]:
        """Return those of the kind's own name, else of its name in another case."""
        exact = self._folders.get(kind, [])
        return exact or [
            p for name, found in self._folders.items() if name.casefold() == kind.casefold() for p in found
        ]

    def _read(self, kind: str, folders: Sequence[Path]) -> ByStem:
        masks: ByStem = defaultdict(list)
        for path in (p for folder in folders for p in visible(folder)):
            if path.is_dir() or is_image(path):
                masks[nfc(path.name if path.is_dir() else path.stem)].append(path)
                self._offered.append((kind, path))
            else:
                self._passed.append(path)
        return masks


def _lookup(masks: ByStem, stem: str) -> list[Path]:
    return masks.get(f"{stem}_mask", []) + masks.get(stem, [])


def mask_parts(mask: Path) -> list[Path]:
    """Return the files of a mask: itself, or the images in it where it is a folder."""
    return [p for p in visible(mask) if p.is_file() and is_image(p)] if mask.is_dir() else [mask]
