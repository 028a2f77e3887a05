# SPDX-License-Identifier: Apache-2.0
"""`panda-ad gallery`: the images that the version in place compares with; added, removed, taken back, suspected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from panda_ad.commands.summary import columns
from panda_ad.data.listing import find_images, image_files, no_images
from panda_ad.errors import GateRefused, UserError
from panda_ad.registry import audit
from panda_ad.registry.promote import Decision
from panda_ad.teach import change, look

_DIGITS = 16


def show(category: str) -> None:
    """Print a gallery's images and changes."""
    found = look.listed(category)
    rows = [("sha256", "path", "")]
    rows += [(sha256[:_DIGITS], path, "added" if added else "") for sha256, path, added in found.images]
    print("\n".join(columns(rows)))
    print(f"\n{found.model} version {found.version}: {len(found.images)} images, {len(found.log)} changes")
    for entry in found.log:
        images = ", ".join(image[:_DIGITS] for image in entry.images)
        print(f"  {entry.when[:16]} {entry.what} {images}; {entry.who}{f': {entry.why}' if entry.why else ''}")


def add(category: str, paths: Sequence[Path], reason: str) -> None:
    """Add images; print the gate's decision."""
    files = image_files(paths)
    if not files:
        raise UserError(no_images(paths, find_images(paths)))
    _decided(reason, lambda: change.add(category, files))


def remove(category: str, images: Sequence[str], reason: str) -> None:
    """Remove images; print the gate's decision, and how the next training does without them."""
    _decided(reason, lambda: change.remove(category, images))
    print(
        f"the next training takes them again; `panda-ad ingest --remove -c {category} ...` takes them out of the data"
    )


def undo(category: str, reason: str) -> None:
    """Take the last change back; print the gate's decision."""
    _decided(reason, lambda: change.undo(category))


def suspect(category: str, most: int) -> None:
    """Print the images that look least like the others."""
    rows = [("suspicion", "sha256", "path")]
    rows += [(f"{rank:.1f}", sha256[:_DIGITS], path) for rank, sha256, path in look.suspects(category)[:most]]
    print("\n".join(columns(rows)))


def _decided(reason: str, act: Callable[[], Decision]) -> None:
    with audit.on_behalf("", reason):
        decision = act()
    if decision.outcome != "promoted":
        raise GateRefused(str(decision))
    print(decision)
